//! Properties of the two ends of an edge.

use proptest::prelude::*;

use super::*;
use crate::testing::{any_codec, any_value, low_rank_codec};

fn options(error_feedback: bool, predict: bool) -> EdgeOptions {
    EdgeOptions { error_feedback, predict, ..EdgeOptions::default() }
}

fn codec(text: &str) -> Codec {
    text.parse().unwrap()
}

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next() + next() + next()).collect()
}

fn send(codec: Codec, shape: &[usize], values: &[f32], ends: &mut (EdgeEncoder, EdgeDecoder)) -> (Encoded, Vec<f32>) {
    let (mut bytes, mut back) = (Vec::new(), Vec::new());
    let encoded = ends.0.encode_and_measure(codec, shape, values, &mut bytes, true).unwrap();
    assert_eq!(encoded.bytes, bytes.len() as u64);
    ends.1.decode(codec, shape, &bytes, &mut back).unwrap();
    (encoded, back)
}

fn ends(options: EdgeOptions) -> (EdgeEncoder, EdgeDecoder) {
    (EdgeEncoder::new(options), EdgeDecoder::new(options))
}

fn error(values: &[f32], back: &[f32]) -> f64 {
    let lost: Vec<f32> = values.iter().zip(back).map(|(a, b)| a - b).collect();
    (square_sum(&lost) / square_sum(values)).sqrt()
}

proptest! {
    #[test]
    fn both_ends_remember_the_same_whatever_is_sent(
        codecs in prop::collection::vec(any_codec(), 1..5),
        rows in 0usize..6, width in 1usize..40,
        values in prop::collection::vec(any_value(), 240),
        feedback in any::<bool>(), predict in any::<bool>(),
    ) {
        let mut ends = ends(options(feedback, predict));
        let values = &values[..rows * width];
        for codec in codecs {
            let (encoded, back) = send(codec, &[rows, width], values, &mut ends);
            prop_assert_eq!(back.len(), values.len());
            let sizes = [codec.encoded_bytes(&[rows, width]).unwrap(), codec.steady_bytes(&[rows, width]).unwrap()];
            prop_assert!(sizes.contains(&encoded.bytes), "{} is not in {:?}", encoded.bytes, sizes);
            prop_assert_eq!(&ends.0.state.prediction, &ends.1.state.prediction);
            prop_assert_eq!(&ends.0.state.sender.basis, &ends.1.state.sender.basis);
            ends.0.state.check().unwrap();
        }
    }

    #[test]
    fn a_changed_low_rank_byte_gives_a_tensor_or_an_error(
        codec in low_rank_codec(), rows in 1usize..6, width in 1usize..30,
        place in any::<prop::sample::Index>(), change in 1u8.., steady in any::<bool>(),
    ) {
        let values = noise(rows * width, 3);
        let (mut encoder, mut decoder) = ends(EdgeOptions::default());
        let (mut first, mut second, mut back) = (Vec::new(), Vec::new(), Vec::new());
        encoder.encode(codec, &[rows, width], &values, &mut first).unwrap();
        encoder.encode(codec, &[rows, width], &values, &mut second).unwrap();
        if steady {
            decoder.decode(codec, &[rows, width], &first, &mut back).unwrap();
        }
        let mut bytes = if steady { second } else { first };
        let place = place.index(bytes.len());
        bytes[place] ^= change;
        let before = decoder.state.clone();
        match decoder.decode(codec, &[rows, width], &bytes, &mut back) {
            Ok(()) => prop_assert_eq!(back.len(), values.len()),
            Err(_) => prop_assert_eq!(&decoder.state, &before),
        }
        decoder.state.check().unwrap();
    }

    #[test]
    fn any_low_rank_bytes_give_a_tensor_or_an_error(
        codec in low_rank_codec(), rows in 0usize..5, width in 0usize..20, form in 0u8..2,
        seed in prop::collection::vec(any::<u8>(), 1..64),
    ) {
        let shape = [rows, width];
        let size = if form == 1 { codec.encoded_bytes(&shape) } else { codec.steady_bytes(&shape) };
        let mut bytes: Vec<u8> = seed.into_iter().cycle().take(size.unwrap() as usize).collect();
        bytes[..2].copy_from_slice(&[1, form]);
        let mut back = Vec::new();
        if EdgeDecoder::default().decode(codec, &shape, &bytes, &mut back).is_ok() {
            prop_assert_eq!(back.len(), rows * width);
        }
    }

    #[test]
    fn a_stateless_low_rank_payload_carries_its_basis(
        codec in low_rank_codec(), values in prop::collection::vec(any_value(), 1..120)
    ) {
        let (mut bytes, mut back) = (Vec::new(), Vec::<f32>::new());
        codec.encode_slice(&[values.len()], &values, &mut bytes).unwrap();
        prop_assert_eq!(bytes.len() as u64, codec.encoded_bytes(&[values.len()]).unwrap());
        codec.decode_slice(&[values.len()], &bytes, &mut back).unwrap();
        prop_assert_eq!(back.len(), values.len());
    }
}

#[test]
fn feedback_sends_in_the_end_what_it_dropped() {
    let values = noise(64 * 32, 1);
    for text in ["topk:0.05:bf16", "topk:0.05:int8", "int4", "lowrank:4:int8", "lowrank:4:int4+topk:0.02:bf16"] {
        let mean_error = |feedback| {
            let mut ends = ends(EdgeOptions { refresh_every: 5, ..options(feedback, false) });
            let mut sum = vec![0.0; values.len()];
            for _ in 0..80 {
                let (_, back) = send(codec(text), &[64, 32], &values, &mut ends);
                sum.iter_mut().zip(back).for_each(|(sum, x)| *sum += x / 80.0);
            }
            error(&values, &sum)
        };
        let (without, with) = (mean_error(false), mean_error(true));
        assert!(with < 0.5 * without, "{text}: {with} of {without}");
    }
}

#[test]
fn a_basis_is_sent_once_and_again_when_it_is_due_or_worn() {
    let (shape, low) = ([128, 48], codec("lowrank:4:bf16"));
    let (with, without) = (low.encoded_bytes(&shape).unwrap(), low.steady_bytes(&shape).unwrap());
    assert_eq!(with - without, 2 * 4 * 48);
    let rank_four = |seed| {
        let factors = noise(4 * (128 + 48), seed);
        let mut x = Vec::new();
        crate::codecs::subspace::rebuild(&factors[..4 * 128], 128, 48, &factors[4 * 128..], &mut x);
        x
    };
    let (a, b) = (rank_four(1), rank_four(2));
    let mut ends = ends(EdgeOptions { refresh_every: 20, ..EdgeOptions::default() });
    let mut sizes = Vec::new();
    for i in 0..50 {
        let (encoded, _) = send(low, &shape, if i < 30 { &a } else { &b }, &mut ends);
        let relative = encoded.relative_error.unwrap();
        sizes.push(encoded.bytes == with);
        assert_eq!(relative < 0.01, sizes[i] || i != 30, "{i}: {relative}");
        if i == 30 {
            break;
        }
    }
    // Due after 20; the other subspace after the 30th shows as wear.
    assert_eq!(sizes.iter().enumerate().filter(|(_, s)| **s).map(|(i, _)| i).collect::<Vec<_>>(), [0, 20, 30]);
}

#[test]
fn a_decoder_without_the_basis_says_which_it_needs() {
    let low = codec("lowrank:2:bf16");
    let mut encoder = EdgeEncoder::default();
    let (mut first, mut second, mut back) = (Vec::new(), Vec::new(), Vec::new());
    encoder.encode(low, &[4, 8], &noise(32, 1), &mut first).unwrap();
    encoder.encode(low, &[4, 8], &noise(32, 1), &mut second).unwrap();
    let mut decoder = EdgeDecoder::default();
    let error = decoder.decode(low, &[4, 8], &second, &mut back).unwrap_err();
    assert_eq!(error, CodecError::MissingBasis { needed: 0, held: None });
    assert_eq!(error.to_string(), "lowrank payload needs basis 0, this end holds none");
    decoder.decode(low, &[4, 8], &first, &mut back).unwrap();
    decoder.decode(low, &[4, 8], &second, &mut back).unwrap();
    assert!(decoder.state_bytes() >= 2 * 8 * 4);
}

#[test]
fn saved_ends_go_on_as_the_old_ones() {
    let values = noise(16 * 24, 9);
    for text in ["topk:0.1:bf16", "lowrank:3:int8+topk:0.05:int8"] {
        let mut old = ends(options(true, true));
        for _ in 0..3 {
            send(codec(text), &[16, 24], &values, &mut old);
        }
        let text_form = serde_json::to_string(&(old.0.state(), old.1.state())).unwrap();
        let (sender, receiver): (EdgeState, EdgeState) = serde_json::from_str(&text_form).unwrap();
        let mut new = ends(options(true, true));
        new.0.restore(sender).unwrap();
        new.1.restore(receiver).unwrap();
        assert_eq!(send(codec(text), &[16, 24], &values, &mut old), send(codec(text), &[16, 24], &values, &mut new));
        let (shape, residual) = old.0.residual().unwrap();
        let (shape, residual) = (shape.to_vec(), residual.to_vec());
        assert!(new.0.restore_residual(shape.clone(), residual[1..].to_vec()).is_err());
        new.0.restore_residual(shape, residual).unwrap();
        assert_eq!(old.0.residual(), new.0.residual());
    }
}

#[test]
fn a_prediction_spares_what_is_constant() {
    let topk = codec("topk:0.05:bf16");
    let run = |predict| {
        let mut ends = ends(options(false, predict));
        let mut last = 0.0;
        for seed in 0..20 {
            let mut values = noise(64 * 100, seed);
            // Five of a hundred channels have an offset, and would fill all that is kept.
            values.chunks_exact_mut(100).for_each(|row| row[..5].iter_mut().for_each(|x| *x += 30.0));
            let (encoded, back) = send(topk, &[64, 100], &values, &mut ends);
            last = error(&values, &back);
            let relative = encoded.relative_error.unwrap();
            assert!((relative - last).abs() < 1e-3, "{relative} {last}");
        }
        last
    };
    let (without, with) = (run(false), run(true));
    assert!(with < 0.95 * without, "{with} of {without}");
}

#[test]
fn a_non_finite_element_does_not_spoil_the_next_tensor() {
    let mut values = noise(8 * 16, 4);
    let sound = values.clone();
    (values[3], values[70]) = (f32::NAN, f32::INFINITY);
    for text in ["topk:0.1:bf16", "int8", "bf16", "lowrank:4:bf16", "lowrank:4:int8+topk:0.1:bf16"] {
        let mut ends = ends(options(true, true));
        let (_, back) = send(codec(text), &[8, 16], &values, &mut ends);
        assert_eq!(back[3].is_nan(), text != "int8" && text != "lowrank:4:bf16", "{text}");
        for _ in 0..20 {
            let (_, back) = send(codec(text), &[8, 16], &sound, &mut ends);
            assert!(back.iter().all(|x| x.is_finite()), "{text}");
        }
    }
}

#[test]
fn wrong_low_rank_payloads_are_told_apart() {
    let low = codec("lowrank:1:bf16+topk:0.5:bf16");
    // One row of two, along the first axis: header, basis (1, 0), coefficient 3, residual 5 at position 1.
    let sound = [1, 1, 7, 0, 0, 0, 0x80, 0x3f, 0, 0, 0x40, 0x40, 1, 0b10, 0xa0, 0x40];
    let mut back = Vec::new();
    EdgeDecoder::default().decode(low, &[1, 2], &sound, &mut back).unwrap();
    assert_eq!(back, [3.0, 5.0]);
    let mut error = |place: usize, byte: u8| {
        let mut bytes = sound;
        bytes[place] = byte;
        EdgeDecoder::default().decode(low, &[1, 2], &bytes, &mut back).unwrap_err().to_string()
    };
    assert_eq!(error(0, 2), "lowrank payload has layout version 2, expected 1");
    assert_eq!(error(1, 2), "lowrank payload is corrupt: its form is unknown");
    assert_eq!(error(1, 0), "lowrank payload of shape [1, 2] has 16 bytes, expected 12");
    assert_eq!(error(6, 0x81), "lowrank payload is corrupt: a number of the basis is above 1 or none");
    assert_eq!(error(12, 0), "topk payload has layout version 0, expected 1");
    assert!(error(13, 0b11).contains("more positions"));
}

#[test]
fn an_empty_tensor_costs_a_header_and_a_wrong_one_nothing() {
    let mut ends = ends(options(true, true));
    for (text, size) in [("dense", 0), ("int4", 1), ("topk:0.1", 1), ("lowrank:4", 6)] {
        let (encoded, back) = send(codec(text), &[0, 5], &[], &mut ends);
        assert_eq!((encoded.bytes, encoded.relative_error, back.len()), (size, Some(0.0), 0), "{text}");
    }
    let before = ends.0.state.clone();
    let mut out = Vec::new();
    let error = ends.0.encode(codec("topk:0.1"), &[2, 3], &[0.0; 5], &mut out).unwrap_err();
    assert!(matches!(error, CodecError::ValueCount { expected: 6, got: 5, .. }));
    assert!(out.is_empty() && ends.0.state == before);
}
