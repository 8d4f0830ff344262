//! Properties of the two ends of an edge.

use proptest::prelude::*;

use super::*;
use crate::testing::{any_codec, any_value, transform_codec};

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
        feedback in any::<bool>(), predict in any::<bool>(), unbiased in any::<bool>(),
    ) {
        let mut ends = ends(EdgeOptions { unbiased, ..options(feedback, predict) });
        let values = &values[..rows * width];
        for codec in codecs {
            let (encoded, back) = send(codec, &[rows, width], values, &mut ends);
            prop_assert_eq!(back.len(), values.len());
            let most = codec.encoded_bytes(&[rows, width]).unwrap();
            let fits = if matches!(codec, Codec::Transform { .. }) { encoded.bytes <= most } else { encoded.bytes == most };
            prop_assert!(fits, "{}: {} of {}", codec, encoded.bytes, most);
            prop_assert_eq!(&ends.0.state.prediction, &ends.1.state.prediction);
            prop_assert_eq!(&ends.0.state.sender.basis, &ends.1.state.sender.basis);
            ends.0.state.check().unwrap();
        }
    }

    #[test]
    fn a_changed_transform_byte_gives_a_tensor_or_an_error(
        codec in transform_codec(), rows in 1usize..6, width in 1usize..30,
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
    fn any_transform_bytes_give_a_tensor_or_an_error(
        codec in transform_codec(), rows in 0usize..5, width in 0usize..20, form in 0u8..2,
        seed in prop::collection::vec(any::<u8>(), 1..64),
    ) {
        let shape = [rows, width];
        let (mut encoder, mut decoder) = ends(EdgeOptions::default());
        let (mut first, mut back) = (Vec::new(), Vec::new());
        encoder.encode(codec, &shape, &noise(rows * width, 5), &mut first).unwrap();
        decoder.decode(codec, &shape, &first, &mut back).unwrap();
        let size = if form == 1 { codec.encoded_bytes(&shape) } else { codec.steady_bytes(&shape) };
        let mut bytes: Vec<u8> = seed.into_iter().cycle().take(size.unwrap() as usize).collect();
        // The header is right, or nothing behind it would ever be reached.
        bytes[..6].copy_from_slice(&[1, form, 0, 0, 0, 0]);
        if decoder.decode(codec, &shape, &bytes, &mut back).is_ok() {
            prop_assert_eq!(back.len(), rows * width);
        }
    }

    #[test]
    fn a_stateless_transform_payload_carries_its_basis(
        codec in transform_codec(), values in prop::collection::vec(any_value(), 1..120)
    ) {
        let (mut bytes, mut back) = (Vec::new(), Vec::<f32>::new());
        codec.encode_slice(&[values.len()], &values, &mut bytes).unwrap();
        prop_assert!(bytes.len() as u64 <= codec.encoded_bytes(&[values.len()]).unwrap());
        codec.decode_slice(&[values.len()], &bytes, &mut back).unwrap();
        prop_assert_eq!(back.len(), values.len());
    }
}

#[test]
fn feedback_sends_in_the_end_what_it_dropped() {
    let values = noise(64 * 32, 1);
    for text in ["topk:0.05:bf16", "topk:0.05:int8", "int4", "transform:1"] {
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

/// Rows of which `rank` directions hold all.
fn of_rank(rank: usize, rows: usize, width: usize, seed: u32) -> Vec<f32> {
    let factors = noise(rank * (rows + width), seed);
    let mut x = Vec::new();
    crate::codecs::subspace::rebuild(&factors[..rank * rows], rows, width, &factors[rank * rows..], &mut x);
    x
}

#[test]
fn a_basis_is_sent_once_and_again_when_it_is_due_or_worn() {
    let (shape, half) = ([128, 48], codec("transform:0.5"));
    let (a, b) = (of_rank(4, 128, 48, 1), of_rank(4, 128, 48, 2));
    let mut ends = ends(EdgeOptions { refresh_every: 20, ..EdgeOptions::default() });
    let mut with_basis = Vec::new();
    for i in 0..31 {
        let (encoded, _) = send(half, &shape, if i < 30 { &a } else { &b }, &mut ends);
        if encoded.bytes > half.steady_bytes(&shape).unwrap() {
            with_basis.push(i);
        }
        assert!(encoded.relative_error.unwrap() < 0.25, "{i}: {encoded:?}");
    }
    // Due after 20; the other subspace after the 30th shows as wear.
    assert_eq!(with_basis, [0, 20, 30]);
}

#[test]
fn few_directions_need_few_bits_and_many_get_the_bits_they_are_worth() {
    let shape = [512, 128];
    let relative = |text: &str, values: &[f32]| {
        let mut ends = ends(EdgeOptions::default());
        send(codec(text), &shape, values, &mut ends);
        send(codec(text), &shape, values, &mut ends).0.relative_error.unwrap()
    };
    let mut mixed = of_rank(8, 512, 128, 3);
    // Beside eight strong directions a floor that is a tenth as strong in all.
    mixed.iter_mut().zip(noise(512 * 128, 4)).for_each(|(x, n)| *x += 0.28 * n);
    let errors = ["transform:0.3", "transform:0.5", "transform:1", "transform:2", "transform:4", "transform:8"]
        .map(|text| relative(text, &mixed));
    assert!(errors.windows(2).all(|pair| pair[1] < pair[0]), "{errors:?}");
    // The floor alone is a tenth of the norm; a bit an element beyond what it needs halves the error.
    assert!(errors[1] < 0.12 && errors[3] < 0.07 && errors[4] < 0.02 && errors[5] < 0.0015, "{errors:?}");
    assert!(errors[3] < 0.4 * relative("int4", &mixed), "{errors:?}");
}

#[test]
fn bits_are_used_and_not_exceeded() {
    let shape = [512, 128];
    let values = of_rank(100, 512, 128, 6);
    for bits in [0.05, 0.2, 1.0, 3.0, 6.0] {
        let codec = codec(&format!("transform:{bits}"));
        let mut ends = ends(EdgeOptions::default());
        send(codec, &shape, &values, &mut ends);
        let (encoded, _) = send(codec, &shape, &values, &mut ends);
        let (bytes, most) = (encoded.bytes as f64, codec.steady_bytes(&shape).unwrap() as f64);
        // At low rates whole directions are dropped at a time.
        let least = if bits < 0.1 { 0.7 } else { 0.95 };
        assert!(bytes <= most && bytes > least * most - 16.0, "{bits}: {bytes} of {most}");
        assert!(most <= (512.0 * 128.0 * bits / 8.0) + 10.0, "{bits}: {most}");
    }
}

#[test]
fn a_decoder_without_the_basis_says_which_it_needs() {
    let low = codec("transform:4");
    let mut encoder = EdgeEncoder::default();
    let (mut first, mut second, mut back) = (Vec::new(), Vec::new(), Vec::new());
    encoder.encode(low, &[4, 8], &noise(32, 1), &mut first).unwrap();
    encoder.encode(low, &[4, 8], &noise(32, 1), &mut second).unwrap();
    let mut decoder = EdgeDecoder::default();
    let error = decoder.decode(low, &[4, 8], &second, &mut back).unwrap_err();
    assert_eq!(error, CodecError::MissingBasis { needed: 0, held: None });
    assert_eq!(error.to_string(), "transform payload needs basis 0, this end holds none");
    decoder.decode(low, &[4, 8], &first, &mut back).unwrap();
    decoder.decode(low, &[4, 8], &second, &mut back).unwrap();
    assert!(decoder.state_bytes() >= 8 * 4);
}

#[test]
fn saved_ends_go_on_as_the_old_ones() {
    let values = noise(16 * 24, 9);
    for text in ["topk:0.1:bf16", "transform:1.5"] {
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
    for text in ["topk:0.1:bf16", "int8", "bf16", "transform:4"] {
        let mut ends = ends(options(true, true));
        let (_, back) = send(codec(text), &[8, 16], &values, &mut ends);
        assert_eq!(back[3].is_nan(), text != "int8" && text != "transform:4", "{text}");
        for _ in 0..20 {
            let (_, back) = send(codec(text), &[8, 16], &sound, &mut ends);
            assert!(back.iter().all(|x| x.is_finite()), "{text}");
        }
    }
}

#[test]
fn wrong_transform_payloads_are_told_apart() {
    let four = codec("transform:4");
    // One row of two along the first axis: header, rank 1, its basis (scale 1/128, codes 127 and 0), a step of 3, a scale
    // of mean magnitude 1, and of that model the symbol of 1.
    let sound = [1, 1, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0x3c, 127, 0, 0, 0, 0x40, 0x40, 41, 0, 0, 0, 0x70];
    let mut back = Vec::new();
    EdgeDecoder::default().decode(four, &[1, 2], &sound, &mut back).unwrap();
    assert_eq!(back, [3.0, 0.0]);
    let mut refuse = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = sound.to_vec();
        change(&mut bytes);
        EdgeDecoder::default().decode(four, &[1, 2], &bytes, &mut back).unwrap_err().to_string()
    };
    assert_eq!(refuse(&|b| b[0] = 2), "transform payload has layout version 2, expected 1");
    assert_eq!(refuse(&|b| b[1] = 2), "transform payload is corrupt: its form is unknown");
    assert_eq!(refuse(&|b| b[1] = 0), "transform payload of shape [1, 2] has 23 bytes, expected at most 20");
    assert_eq!(refuse(&|b| b.extend([0; 40])), "transform payload of shape [1, 2] has 63 bytes, expected at most 30");
    for rank in [0, 3] {
        let error = refuse(&|b| b[6] = rank);
        assert_eq!(error, "transform payload is corrupt: its basis has no vectors or too many");
    }
    assert_eq!(refuse(&|b| b[11] = 0xff), "int8 payload is corrupt: a scale is negative, too large or not finite");
    assert_eq!(refuse(&|b| b[17] = 0xff), "transform payload is corrupt: its step is negative or no number");
    assert_eq!(refuse(&|b| b[18] = 146), "transform payload is corrupt: a scale is unknown");
    assert_eq!(refuse(&|b| b.truncate(22)), "transform payload is corrupt: its integers are no whole words");
    assert_eq!(refuse(&|b| b.truncate(18)), "transform payload is corrupt: it ends early");
}

#[test]
fn an_empty_tensor_costs_a_header_and_a_wrong_one_nothing() {
    let mut ends = ends(options(true, true));
    for (text, size) in [("dense", 0), ("int4", 1), ("topk:0.1", 1), ("transform:4", 6)] {
        let (encoded, back) = send(codec(text), &[0, 5], &[], &mut ends);
        assert_eq!((encoded.bytes, encoded.relative_error, back.len()), (size, Some(0.0), 0), "{text}");
    }
    let before = ends.0.state.clone();
    let mut out = Vec::new();
    let error = ends.0.encode(codec("topk:0.1"), &[2, 3], &[0.0; 5], &mut out).unwrap_err();
    assert!(matches!(error, CodecError::ValueCount { expected: 6, got: 5, .. }));
    assert!(out.is_empty() && ends.0.state == before);
}
