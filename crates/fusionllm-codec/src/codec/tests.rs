//! Properties of the codecs without state.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::testing::{any_codec, any_value, stateless_codec};

fn topk(share: f64, values: TopKValues) -> Codec {
    Codec::TopK { density: Density::from_share(share).unwrap(), values }
}

fn round_trip(codec: Codec, values: &[f32]) -> Vec<f32> {
    let (mut bytes, mut back) = (Vec::new(), Vec::<f32>::new());
    codec.encode_slice(&[values.len()], values, &mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, codec.encoded_bytes(&[values.len()]).unwrap(), "{codec}");
    codec.decode_slice(&[values.len()], &bytes, &mut back).unwrap();
    back
}

fn magnitude(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

proptest! {
    #[test]
    fn dense_round_trip_is_bit_exact(bits in prop::collection::vec(any::<u32>(), 0..200)) {
        let values: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
        let back: Vec<u32> = round_trip(Codec::Dense, &values).iter().map(|x| x.to_bits()).collect();
        prop_assert_eq!(back, bits);
    }

    #[test]
    fn integers_round_trip(values in prop::collection::vec(any::<i32>(), 0..200)) {
        let tensor = HostTensor::new(vec![values.len()], Values::I32(values)).unwrap();
        let mut bytes = Vec::new();
        Codec::Dense.encode(&tensor, &mut bytes).unwrap();
        prop_assert_eq!(Codec::Dense.decode(tensor.shape(), ElementType::I32, &bytes).unwrap(), tensor);
    }

    #[test]
    fn half_codecs_stay_within_their_precision(values in prop::collection::vec(-1e4f32..1e4, 1..100)) {
        for (codec, relative) in [(Codec::Bf16, 1.0 / 256.0), (Codec::F16, 1.0 / 2048.0)] {
            for (a, b) in values.iter().zip(round_trip(codec, &values)) {
                prop_assert!((a - b).abs() <= a.abs() * relative + 1e-7);
            }
        }
    }

    #[test]
    fn integer_codecs_stay_within_half_a_step_of_their_block(
        values in prop::collection::vec(-1e4f32..1e4, 1..300), exponent in -30i32..30
    ) {
        let values: Vec<f32> = values.iter().map(|x| x * 2f32.powi(exponent)).collect();
        for (codec, most) in [(Codec::Int8, 127.0), (Codec::Int4, 7.0)] {
            let back = round_trip(codec, &values);
            for (block, back) in values.chunks(64).zip(back.chunks(64)) {
                let largest = block.iter().fold(0f32, |m, x| m.max(x.abs()));
                let half_step = 0.5 * largest / most * (1.0 + 1.0 / 127.0);
                for (a, b) in block.iter().zip(back) {
                    prop_assert!((a - b).abs() <= half_step, "{} {} {}", a, b, half_step);
                }
            }
        }
    }

    #[test]
    fn topk_keeps_what_a_stable_sort_puts_first(
        values in prop::collection::vec(any_value(), 0..400), codec in stateless_codec()
    ) {
        let Codec::TopK { density, .. } = codec else { return Ok(()) };
        let back = round_trip(Codec::TopK { density, values: TopKValues::F32 }, &values);
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(magnitude(values[i])));
        order.truncate(density.kept(values.len() as u64) as usize);
        for (i, (value, back)) in values.iter().zip(&back).enumerate() {
            let expected = if order.contains(&i) { value.to_bits() } else { 0 };
            prop_assert_eq!(back.to_bits(), expected, "element {}", i);
        }
    }

    #[test]
    fn every_tensor_has_the_predicted_size_and_comes_back(
        codec in stateless_codec(), values in prop::collection::vec(any_value(), 0..300)
    ) {
        let back = round_trip(codec, &values);
        prop_assert_eq!(back.len(), values.len());
        let again = round_trip(codec, &values);
        prop_assert!(back.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits()), "not deterministic");
    }

    #[test]
    fn narrow_elements_are_encoded_as_their_f32(
        codec in stateless_codec(), values in prop::collection::vec(any_value(), 0..200)
    ) {
        let shape = [values.len()];
        let narrow: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
        let wide: Vec<f32> = narrow.iter().map(|x| x.to_f32()).collect();
        let (mut from_narrow, mut from_wide) = (Vec::new(), Vec::new());
        codec.encode_slice(&shape, &narrow, &mut from_narrow).unwrap();
        codec.encode_slice(&shape, &wide, &mut from_wide).unwrap();
        prop_assert_eq!(&from_narrow, &from_wide);
        let (mut half, mut full) = (Vec::<f16>::new(), Vec::<f32>::new());
        codec.decode_slice(&shape, &from_wide, &mut half).unwrap();
        codec.decode_slice(&shape, &from_wide, &mut full).unwrap();
        let rounded: Vec<u16> = full.iter().map(|&x| f16::from_f32(x).to_bits()).collect();
        prop_assert_eq!(half.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), rounded);
    }

    #[test]
    fn decode_answers_any_bytes_with_a_value_or_an_error(
        codec in any_codec(),
        shape in prop::collection::vec(0usize..1 << 40, 0..4),
        bytes in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        if let Ok(tensor) = codec.decode(&shape, ElementType::F32, &bytes) {
            prop_assert_eq!(codec.encoded_bytes(tensor.shape()).unwrap(), bytes.len() as u64);
        }
    }

    #[test]
    fn any_bytes_of_the_right_length_are_a_tensor_or_an_error(
        codec in stateless_codec(), n in 0usize..300, seed in prop::collection::vec(any::<u8>(), 1..64), version in any::<bool>()
    ) {
        let size = codec.encoded_bytes(&[n]).unwrap() as usize;
        let mut bytes: Vec<u8> = seed.into_iter().cycle().take(size).collect();
        if version && let Some(first) = bytes.first_mut() {
            *first = 1;
        }
        let mut back = Vec::<f32>::new();
        if codec.decode_slice(&[n], &bytes, &mut back).is_ok() {
            prop_assert_eq!(back.len(), n);
        }
    }

    #[test]
    fn a_changed_byte_gives_a_tensor_or_an_error(
        codec in stateless_codec(),
        values in prop::collection::vec(any_value(), 1..300),
        place in any::<prop::sample::Index>(),
        change in 1u8..,
    ) {
        let mut bytes = Vec::new();
        codec.encode_slice(&[values.len()], &values, &mut bytes).unwrap();
        let place = place.index(bytes.len());
        bytes[place] ^= change;
        let mut back = Vec::<f32>::new();
        if codec.decode_slice(&[values.len()], &bytes, &mut back).is_ok() {
            prop_assert_eq!(back.len(), values.len());
        }
    }
}

#[test]
fn nan_and_infinity_survive_the_float_codecs() {
    let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0];
    for codec in [Codec::Dense, Codec::Bf16, Codec::F16, topk(0.75, TopKValues::F32), topk(0.75, TopKValues::Bf16)] {
        let back = round_trip(codec, &values);
        assert!(back[0].is_nan() && back[1] == f32::INFINITY && back[2] == f32::NEG_INFINITY, "{codec}");
    }
}

#[test]
fn integer_codecs_make_nan_zero_and_infinity_the_largest_of_its_block() {
    let mut values = vec![1.0; 64];
    values[..4].copy_from_slice(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -4.0]);
    values.extend([f32::INFINITY, f32::NAN, 0.0]);
    for codec in [Codec::Int8, Codec::Int4, topk(1.0, TopKValues::Int8)] {
        let back = round_trip(codec, &values);
        assert_eq!(back[0], 0.0, "{codec}");
        assert!((back[1] - 4.0).abs() < 0.04 && back[2] == -back[1], "{codec}: {back:?}");
        assert!((back[3] + 4.0).abs() < 0.04, "{codec}: {back:?}");
        // A block without finite magnitudes has scale 0.
        assert_eq!(back[64..], [0.0; 3], "{codec}");
    }
}

#[test]
fn decoded_integers_are_finite_at_both_ends_of_the_range() {
    for codec in [Codec::Int8, Codec::Int4] {
        let back = round_trip(codec, &[f32::MAX, f32::MIN, 0.0]);
        assert!(back.iter().all(|x| x.is_finite()) && back[0] > 0.8 * f32::MAX, "{codec}: {back:?}");
        let back = round_trip(codec, &[f32::MIN_POSITIVE, 1e-45, 3e-38]);
        assert!((back[2] - 3e-38).abs() <= f32::MIN_POSITIVE, "{codec}: {back:?}");
    }
}

#[test]
fn a_kept_entry_costs_what_the_format_promises() {
    let n = 4 << 20;
    let kept = (n as f64 * 0.01).ceil();
    for (values, most) in [(TopKValues::F32, 5.08), (TopKValues::Bf16, 3.08), (TopKValues::Int8, 2.11)] {
        let bytes = topk(0.01, values).encoded_bytes(&[n]).unwrap() as f64;
        assert!(bytes / kept < most, "{values}: {}", bytes / kept);
    }
}

#[test]
fn known_bytes_of_every_layout() {
    let values = [1.0f32, -2.0, 0.5, 0.0, 4.0];
    let encode = |codec: Codec| {
        let mut bytes = Vec::new();
        codec.encode_slice(&[5], &values, &mut bytes).unwrap();
        bytes
    };
    // 4/127 and 4/7, rounded up to bfloat16: 0x3d02 and 0x3f13.
    assert_eq!(encode(Codec::Int8), [1, 0x02, 0x3d, 32, 193, 16, 0, 126]);
    assert_eq!(encode(Codec::Int4), [1, 0x13, 0x3f, 0x02, 0x7d, 0x01]);
    // Positions 1 and 4 as a bitmap, then -2 and 4 as bfloat16.
    assert_eq!(encode(topk(0.4, TopKValues::Bf16)), [1, 0b1_0010, 0x00, 0xc0, 0x80, 0x40]);
    // 4 of 400 by Elias-Fano: six low bits each, then high parts 0, 1, 3, 6 in unary.
    let mut long = [0.0f32; 400];
    (long[3], long[100], long[200], long[399]) = (1.0, 1.0, 1.0, 1.0);
    let mut bytes = Vec::new();
    topk(0.01, TopKValues::Bf16).encode_slice(&[400], &long, &mut bytes).unwrap();
    let low = (3u32 | 36 << 6 | 8 << 12 | 15 << 18).to_le_bytes();
    assert_eq!(bytes[..6], [1, low[0], low[1], low[2], 0b0010_0101, 0b10]);
}

#[test]
fn wrong_payloads_are_told_apart() {
    let error = |codec: Codec, bytes: &[u8], shape: &[usize]| {
        codec.decode(shape, ElementType::F32, bytes).unwrap_err().to_string()
    };
    assert_eq!(error(Codec::Bf16, &[0; 11], &[2, 3]), "bf16 payload of shape [2, 3] has 11 bytes, expected 12");
    assert_eq!(error(Codec::Int8, &[2, 0, 0, 0], &[1]), "int8 payload has layout version 2, expected 1");
    assert!(error(Codec::Int8, &[1, 0x80, 0x7f, 0], &[1]).contains("scale"));
    assert!(error(Codec::Int4, &[1, 0, 0, 0x10], &[1]).contains("last half byte"));
    let one_of_three = topk(0.1, TopKValues::Bf16);
    assert!(error(one_of_three, &[1, 0b011, 0, 0], &[3]).contains("more positions"));
    assert!(error(one_of_three, &[1, 0b000, 0, 0], &[3]).contains("fewer positions"));
    assert!(error(one_of_three, &[1, 0b1000, 0, 0], &[3]).contains("leave the tensor"));
    let huge = topk(1e-6, TopKValues::Bf16).encoded_bytes(&[1 << 32]);
    assert!(matches!(huge, Err(CodecError::ShapeOverflow { .. })));
}

#[test]
fn messages_and_files_keep_their_form() {
    let text = |codec: Codec| serde_json::to_string(&codec).unwrap();
    assert_eq!(text(Codec::Bf16), "\"bf16\"");
    assert_eq!(text(topk(0.01, TopKValues::Bf16)), r#"{"top-k":{"density":10000,"values":"bf16"}}"#);
    for (codec, byte) in [(Codec::Dense, 0), (Codec::Bf16, 1), (Codec::F16, 2), (Codec::Int8, 3), (Codec::Int4, 4)] {
        assert_eq!(postcard::to_stdvec(&codec).unwrap(), [byte]);
    }
    assert!(serde_json::from_str::<Codec>(r#"{"top-k":{"density":0,"values":"bf16"}}"#).is_err());
}
