//! How fast one core encodes and decodes: `cargo bench -p fusionllm-codec [-- FILTER]`.
//!
//! GB/s are of dense f32 bytes, medians over rounds that take all codecs in turn, with a memcpy of the same tensor
//! beside each. `benches/peers/topk_torch.py` measures torch.topk on tensors of the same sizes and kind.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a program that measures")]

use std::hint::black_box;
use std::time::Instant;

use fusionllm_codec::{Codec, EdgeDecoder, EdgeEncoder, EdgeOptions};

const ROUNDS: usize = 15;
const CODECS: [&str; 16] = [
    "dense",
    "bf16",
    "f16",
    "int8",
    "int4",
    "topk:0.001:bf16",
    "topk:0.01:f32",
    "topk:0.01:bf16",
    "topk:0.01:int8",
    "topk:0.05:bf16",
    "topk:0.1:bf16",
    "topk:0.3:bf16",
    "transform:0.25",
    "transform:1",
    "transform:2",
    "transform:4",
];

/// Gaussian, with one channel in 128 twenty times as large, as activations of transformers have them.
fn activations(shape: &[usize]) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let width = *shape.last().unwrap();
    let n = shape.iter().product();
    (0..n)
        .map(|i| {
            let gaussian = (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
            if i % width % 128 == 7 { 20.0 * gaussian } else { gaussian }
        })
        .collect()
}

fn seconds(run: impl FnOnce()) -> f64 {
    let began = Instant::now();
    run();
    began.elapsed().as_secs_f64()
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

struct Row {
    name: String,
    codec: Codec,
    measure: bool,
    encoder: EdgeEncoder,
    decoder: EdgeDecoder,
    bytes: Vec<u8>,
    encode: Vec<f64>,
    decode: Vec<f64>,
    copy: Vec<f64>,
}

fn rows(filter: &str) -> Vec<Row> {
    let feedback = EdgeOptions { error_feedback: true, ..EdgeOptions::default() };
    let row = |text: &str, with: &str, options| Row {
        name: format!("{text}{with}"),
        measure: with.ends_with("measured"),
        codec: text.parse().unwrap(),
        encoder: EdgeEncoder::new(options),
        decoder: EdgeDecoder::new(options),
        bytes: Vec::new(),
        encode: Vec::new(),
        decode: Vec::new(),
        copy: Vec::new(),
    };
    let plain = CODECS.iter().map(|text| row(text, "", EdgeOptions::default()));
    let predict = EdgeOptions { predict: true, ..feedback };
    let more = ["topk:0.01:bf16", "int4"].map(|text| {
        let measured = row(text, ", measured", EdgeOptions::default());
        [measured, row(text, ", feedback", feedback), row(text, ", feedback, prediction", predict)]
    });
    plain.chain(more.into_iter().flatten()).filter(|row| row.name.contains(filter)).collect()
}

fn measure(shape: &[usize], filter: &str) {
    let values = activations(shape);
    let (mut decoded, mut copied) = (Vec::new(), vec![0.0f32; values.len()]);
    let mut rows = rows(filter);
    for round in 0..=ROUNDS {
        for row in &mut rows {
            let Row { codec, measure, encoder, decoder, bytes, .. } = row;
            bytes.clear();
            let copy = seconds(|| black_box(&mut copied).copy_from_slice(black_box(&values)));
            let encode = seconds(|| {
                encoder.encode_and_measure(*codec, shape, black_box(&values), bytes, *measure).unwrap();
            });
            let decode = seconds(|| decoder.decode(*codec, shape, black_box(bytes), &mut decoded).unwrap());
            // The first round fills memory that is reused, and the basis.
            if round > 0 {
                row.copy.push(copy);
                row.encode.push(encode);
                row.decode.push(decode);
            }
        }
    }
    println!("\nshape {shape:?}, {ROUNDS} rounds, GB/s of f32 input");
    println!("{:<38} {:>10} {:>8} {:>8} {:>8}", "codec", "bytes/elt", "encode", "decode", "memcpy");
    for row in rows {
        let rate = |times| 4e-9 * values.len() as f64 / median(times);
        let size = row.bytes.len() as f64 / values.len() as f64;
        let (encode, decode, copy) = (rate(row.encode), rate(row.decode), rate(row.copy));
        println!("{:<38} {size:>10.4} {encode:>8.2} {decode:>8.2} {copy:>8.2}", row.name);
    }
}

fn main() {
    // Cargo passes `--bench`.
    let filter = std::env::args().skip(1).find(|a| !a.starts_with("--")).unwrap_or_default();
    for shape in [vec![4, 1024, 1024], vec![1, 1024, 768], vec![4, 128, 256]] {
        measure(&shape, &filter);
    }
}
