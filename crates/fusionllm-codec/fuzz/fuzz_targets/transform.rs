//! Any bytes as a first and a second `transform` message of an edge.
#![no_main]

mod common;

use fusionllm_codec::{Codec, EdgeDecoder, EdgeOptions};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mut input = input;
    let form = common::byte(&mut input);
    let codec = Codec::Transform { bits: common::bits(&mut input) };
    let [rows, width] = common::shape(&mut input);
    let shape = [rows % 32, width % 32];
    common::decode(codec, &shape, input);
    let mut decoder = EdgeDecoder::new(EdgeOptions { predict: form & 128 != 0, ..EdgeOptions::default() });
    let mut into = Vec::new();
    let first = codec.encoded_bytes(&shape).unwrap() as usize;
    let steady = codec.steady_bytes(&shape).unwrap() as usize;
    for (size, form) in [(first, 1), (steady, 0)] {
        // The header is right, or nothing behind it would ever be reached.
        let mut payload = vec![1, form, 7, 0, 0, 0];
        payload.extend(input.iter().copied().take(size - 6));
        let before = decoder.state().clone();
        match decoder.decode(codec, &shape, &payload, &mut into) {
            Ok(()) => assert_eq!(into.len(), shape[0] * shape[1]),
            Err(_) => assert_eq!(*decoder.state(), before),
        }
        input = &input[input.len().min(size - 6)..];
    }
});
