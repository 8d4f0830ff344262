//! Any bytes as `topk`.
#![no_main]

mod common;

use fusionllm_codec::Codec;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mut input = input;
    let (density, values) = common::sparse(&mut input);
    let shape = common::shape(&mut input);
    common::decode(Codec::TopK { density, values }, &shape, input);
});
