//! Any bytes as `dense`, `bf16` and `f16`.
#![no_main]

mod common;

use fusionllm_codec::Codec;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mut input = input;
    let codec = [Codec::Dense, Codec::Bf16, Codec::F16][usize::from(common::byte(&mut input) % 3)];
    let shape = common::shape(&mut input);
    common::decode(codec, &shape, input);
});
