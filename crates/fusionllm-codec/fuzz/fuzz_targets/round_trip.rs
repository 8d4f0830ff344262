//! Any numbers through both ends of an edge, with feedback and prediction: sizes are as predicted, ends agree.
#![no_main]

mod common;

use fusionllm_codec::{Codec, EdgeDecoder, EdgeEncoder, EdgeOptions, LowRankValues, Residual};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mut input = input;
    let form = common::byte(&mut input);
    let options = EdgeOptions { error_feedback: form & 64 != 0, predict: form & 128 != 0, ..EdgeOptions::default() };
    let Residual { density, values } = common::sparse(&mut input);
    let low_rank = |values, residual| Codec::LowRank { rank: 3, values, residual };
    let codec = match form % 8 {
        0 => Codec::Dense,
        1 => Codec::Bf16,
        2 => Codec::F16,
        3 => Codec::Int8,
        4 => Codec::Int4,
        5 => Codec::TopK { density, values },
        6 => low_rank(LowRankValues::Int8, Some(Residual { density, values })),
        _ => low_rank(LowRankValues::Int4, None),
    };
    let width = usize::from(common::byte(&mut input)).max(1);
    let numbers: Vec<f32> = input.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    let shape = [numbers.len() / width, width];
    let numbers = &numbers[..shape[0] * width];
    let (mut encoder, mut decoder) = (EdgeEncoder::new(options), EdgeDecoder::new(options));
    let mut into = Vec::new();
    for turn in 0..2 {
        let mut payload = Vec::new();
        let encoded = encoder.encode_and_measure(codec, &shape, numbers, &mut payload, form & 32 != 0).unwrap();
        let size = if turn == 0 { codec.encoded_bytes(&shape) } else { codec.steady_bytes(&shape) };
        assert_eq!((encoded.bytes, payload.len() as u64), (size.unwrap(), encoded.bytes));
        decoder.decode(codec, &shape, &payload, &mut into).unwrap();
        assert_eq!(into.len(), numbers.len());
        assert!(encoder.residual().is_none_or(|(_, residual)| residual.iter().all(|x| x.is_finite())));
    }
});
