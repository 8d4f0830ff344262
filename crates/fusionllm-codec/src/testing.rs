//! What tests of several modules draw from.

use proptest::prelude::*;

use crate::{Codec, Density, LowRankValues, Residual, TopKValues};

pub(crate) fn any_density() -> impl Strategy<Value = Density> {
    prop_oneof![1u32..=1_000_000, 1u32..=50_000, Just(1_000_000)].prop_map(|ppm| Density::from_ppm(ppm).unwrap())
}

pub(crate) fn any_topk_values() -> impl Strategy<Value = TopKValues> {
    prop_oneof![Just(TopKValues::F32), Just(TopKValues::Bf16), Just(TopKValues::Int8)]
}

fn any_residual() -> impl Strategy<Value = Residual> {
    (any_density(), any_topk_values()).prop_map(|(density, values)| Residual { density, values })
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

pub(crate) fn low_rank_codec() -> impl Strategy<Value = Codec> {
    let values = prop_oneof![Just(LowRankValues::Bf16), Just(LowRankValues::Int8), Just(LowRankValues::Int4)];
    (1u32..20, values, prop::option::of(any_residual())).prop_map(|(rank, values, residual)| Codec::LowRank {
        rank,
        values,
        residual,
    })
}

pub(crate) fn any_codec() -> impl Strategy<Value = Codec> {
    prop_oneof![3 => stateless_codec(), 1 => low_rank_codec()]
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
