//! What tests of several modules draw from.

use proptest::prelude::*;

use crate::{BitRate, Codec, Density, TopKValues};

pub(crate) fn any_density() -> impl Strategy<Value = Density> {
    prop_oneof![1u32..=1_000_000, 1u32..=50_000, Just(1_000_000)].prop_map(|ppm| Density::from_ppm(ppm).unwrap())
}

pub(crate) fn any_topk_values() -> impl Strategy<Value = TopKValues> {
    prop_oneof![Just(TopKValues::F32), Just(TopKValues::Bf16), Just(TopKValues::Int8)]
}

pub(crate) fn stateless_codec() -> impl Strategy<Value = Codec> {
    prop_oneof![
        Just(Codec::Dense),
        Just(Codec::Bf16),
        Just(Codec::F16),
        Just(Codec::Int8),
        Just(Codec::Int4),
        (any_density(), any_topk_values()).prop_map(|(density, values)| Codec::TopK { density, values }),
    ]
}

pub(crate) fn transform_codec() -> impl Strategy<Value = Codec> {
    (10u32..=8_000).prop_map(|bits| Codec::Transform { bits: BitRate::from_thousandths(bits).unwrap() })
}

pub(crate) fn any_codec() -> impl Strategy<Value = Codec> {
    prop_oneof![3 => stateless_codec(), 1 => transform_codec()]
}

/// Mostly ordinary numbers, some equal, some extreme, some neither.
pub(crate) fn any_value() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -10.0f32..10.0,
        2 => prop_oneof![Just(0.0f32), Just(-0.0), Just(1.0), Just(-1.0)],
        1 => prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY), Just(f32::MAX), Just(1e-42)],
        1 => any::<u32>().prop_map(f32::from_bits),
    ]
}
