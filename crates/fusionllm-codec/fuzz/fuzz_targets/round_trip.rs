//! Any numbers through both ends of an edge, with feedback and prediction: sizes are as predicted, ends agree.
#![no_main]

mod common;

use fusionllm_codec::{Codec, EdgeDecoder, EdgeEncoder, EdgeOptions};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mut input = input;
    let form = common::byte(&mut input);
    let options = EdgeOptions { error_feedback: form & 64 != 0, predict: form & 128 != 0, ..EdgeOptions::default() };
    let (density, values) = common::sparse(&mut input);
    let bits = common::bits(&mut input);
    let codec = match form % 8 {
        0 => Codec::Dense,
        1 => Codec::Bf16,
        2 => Codec::F16,
        3 => Codec::Int8,
        4 => Codec::Int4,
        5 => Codec::TopK { density, values },
        _ => Codec::Transform { bits },
    };
    let width = usize::from(common::byte(&mut input)).max(1);
    let numbers: Vec<f32> = input.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    let shape = [numbers.len() / width, width];
    let numbers = &numbers[..shape[0] * width];
    let (mut encoder, mut decoder) = (EdgeEncoder::new(options), EdgeDecoder::new(options));
    let mut into = Vec::new();
    for _ in 0..2 {
        let mut payload = Vec::new();
        let encoded = encoder.encode_and_measure(codec, &shape, numbers, &mut payload, form & 32 != 0).unwrap();
        // A small basis may come with every message.
        let has_basis = payload.get(1) == Some(&1) && matches!(codec, Codec::Transform { .. });
        let most = if has_basis { codec.encoded_bytes(&shape) } else { codec.steady_bytes(&shape) }.unwrap();
        assert_eq!(payload.len() as u64, encoded.bytes);
        assert!(encoded.bytes <= most);
        assert!(encoded.bytes == most || matches!(codec, Codec::Transform { .. }));
        decoder.decode(codec, &shape, &payload, &mut into).unwrap();
        assert_eq!(into.len(), numbers.len());
        assert!(encoder.residual().is_none_or(|(_, residual)| residual.iter().all(|x| x.is_finite())));
    }
});
