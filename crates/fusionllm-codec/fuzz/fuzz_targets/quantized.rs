//! Any bytes as `int8` and `int4`: what decodes is finite.
#![no_main]

mod common;

use fusionllm_codec::Codec;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mut input = input;
    let codec = [Codec::Int8, Codec::Int4][usize::from(common::byte(&mut input) % 2)];
    let shape = common::shape(&mut input);
    common::decode(codec, &shape, input);
    let mut into = Vec::<f32>::new();
    if codec.decode_slice(&shape, input, &mut into).is_ok() {
        assert!(into.iter().all(|x| x.is_finite()));
    }
});
