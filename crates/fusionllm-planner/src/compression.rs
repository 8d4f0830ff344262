//! How much each boundary edge is compressed, and by which codec (the paper's section on adaptive compression).
//!
//! AdaTopK's published form is r_i = max(1, 3·r·R_i / R_max), where the 3 is what an f32 value with an int64 index costs
//! over a dense f32. Ours is the general form, in bytes: the message of direction i is made r_i = r·R_i / R_max times
//! smaller than dense, and sent dense where r_i ≤ 1; R is the bandwidth part of the link time alone (latency cannot be
//! compressed), and r is no higher than what makes the slowest link as fast as the slowest stage. What density gives
//! that many bytes follows from the codec's own size, so no message is ever larger than dense.

use fusionllm_codec::{BitRate, Codec, Density, MOST_RANK, TopKValues};
use serde::{Deserialize, Serialize};

use crate::Way;

/// Bytes of f32 per second that an encoder and a decoder work through together, one after the other, on one core.
/// Conservative figures of `cargo bench -p fusionllm-codec`.
const DENSE_BYTES_PER_S: f64 = 2e9;
const SPARSE_BYTES_PER_S: f64 = 1e9;
/// Likewise of `transform`: elements whose integers are coded, and products with the vectors of its basis, each two
/// operations, with which a third of the time goes to finding bases.
const CODED_ELEMENTS_PER_S: f64 = 4e7;
const TRANSFORM_FLOP_PER_S: f64 = 3e10;
/// The messages of `transform` with its bases, over those without.
const BASES: f64 = 1.1;
/// Bits of an activation over the mean of activation and gradient, under transform coding: what an activation lacks
/// disturbs the loss more than what a gradient lacks, which is right on average.
const ACTIVATION_BITS: f64 = 1.4;
/// A gradient has no fewer bits, unless activations have as few: below, training stalls.
const LEAST_GRADIENT_BITS: f64 = 1.0;
const F32_BITS: f64 = 32.0;
/// No boundary tensor keeps less than this many entries in a million.
const LEAST_PPM: u32 = 10;

/// Which edges are compressed, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "policy", rename_all = "kebab-case")]
pub enum Compression {
    /// No edge: every element as it is.
    #[default]
    Dense,
    /// Top-K on every boundary edge, by the same ratio of bytes.
    UniformTopk {
        /// Dense bytes over encoded bytes.
        ratio: f64,
        /// Form of the kept values.
        values: TopKValues,
    },
    /// Top-K on each direction of each edge as its link is slow: the paper's AdaTopK.
    AdaTopk {
        /// r: the ratio of bytes on the slowest link.
        ratio: f64,
        /// Form of the kept values.
        values: TopKValues,
        /// The published formula, factor 3 and all: it gives the density, whatever bytes follow.
        literal: bool,
    },
    /// As AdaTopK, but each direction with the codec that loses least at its ratio, and links faster than the slowest
    /// stage where the step gains from it: 1F1B waits for round trips, of which a link is only a part.
    Adaptive {
        /// r: the ratio of bytes on the slowest link.
        ratio: f64,
    },
    /// These codecs on every boundary edge.
    Fixed {
        /// Codec of what goes forward.
        activations: Codec,
        /// Codec of what goes back.
        gradients: Codec,
    },
}

impl Compression {
    /// Its name in job files and tables.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::UniformTopk { .. } => "uniform-topk",
            Self::AdaTopk { literal: false, .. } => "ada-topk",
            Self::AdaTopk { literal: true, .. } => "ada-topk-literal",
            Self::Adaptive { .. } => "adaptive",
            Self::Fixed { .. } => "fixed",
        }
    }

    /// Dense bytes over sent bytes on the slowest link.
    pub(crate) fn highest_ratio(&self) -> f64 {
        match self {
            Self::Dense => 1.0,
            Self::UniformTopk { ratio, .. } | Self::AdaTopk { ratio, .. } | Self::Adaptive { ratio } => *ratio,
            Self::Fixed { activations, gradients } => activations.ratio().min(gradients.ratio()),
        }
    }
}

/// One direction of one boundary edge.
#[derive(Clone, Debug, PartialEq)]
pub struct Direction {
    /// Shape of the tensor of one micro-batch.
    pub shape: Vec<usize>,
    /// R: seconds for which its dense message occupies the link.
    pub dense_s: f64,
    /// Whether it carries activations or gradients.
    pub way: Way,
}

/// The codec of each direction. No link is made faster than `least_link_s`, the time of the slowest stage for one
/// micro-batch or less; `otherwise` is for what need not be smaller.
pub fn compress(policy: Compression, directions: &[Direction], least_link_s: f64, otherwise: Codec) -> Vec<Codec> {
    let longest = directions.iter().map(|d| d.dense_s).fold(0.0, f64::max);
    let share = |d: &Direction| if longest > 0.0 { d.dense_s / longest } else { 0.0 };
    let ratio_of = |d: &Direction, ratio: f64| useful_ratio(ratio, longest, least_link_s) * share(d);
    let of = |d: &Direction| match policy {
        Compression::Dense => otherwise,
        Compression::UniformTopk { ratio, values } => topk_of_ratio(&d.shape, ratio, values, otherwise),
        Compression::AdaTopk { ratio, values, literal: true } => {
            let sparsity = 3.0 * ratio * share(d);
            if sparsity > 1.0 { topk(1.0 / sparsity, values) } else { otherwise }
        }
        Compression::AdaTopk { ratio, values, literal: false } => {
            topk_of_ratio(&d.shape, ratio_of(d, ratio), values, otherwise)
        }
        Compression::Adaptive { ratio } => best_in_time(d, ratio_of(d, ratio), otherwise),
        Compression::Fixed { activations, .. } if d.way == Way::Activation => activations,
        Compression::Fixed { gradients, .. } => gradients,
    };
    directions.iter().map(of).collect()
}

/// The codec of a shared parameter's gradient, of which a dense message takes `dense_s` on the slowest link between its
/// holders. That link is `slowness` times as slow as the slowest that carries activations. Only the adaptive policy
/// compresses it, and only by quantizing: the paper does not treat shared parameters.
pub(crate) fn compress_shared(
    policy: Compression,
    shape: &[usize],
    dense_s: f64,
    slowness: f64,
    least_link_s: f64,
) -> Codec {
    let Compression::Adaptive { ratio } = policy else { return Codec::Dense };
    let wanted = useful_ratio(ratio, dense_s, least_link_s) * slowness.min(1.0);
    if wanted <= 1.0 {
        return Codec::Dense;
    }
    let fits = |codec: &Codec| codec.ratio_of(shape).is_ok_and(|r| r >= wanted);
    [Codec::Bf16, Codec::Int8].into_iter().find(fits).unwrap_or(Codec::Int4)
}

/// The ratio, or what makes a link's dense seconds the least that are worth having, if that is lower.
fn useful_ratio(ratio: f64, dense_s: f64, least_link_s: f64) -> f64 {
    if least_link_s > 0.0 { ratio.min(dense_s / least_link_s) } else { ratio }
}

/// The highest number from `low` to `high` that fits, where all below one that fits do; `low` if none does.
fn highest(mut low: u32, mut high: u32, fits: impl Fn(u32) -> bool) -> u32 {
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if fits(middle) { low = middle } else { high = middle - 1 }
    }
    low
}

fn topk(share: f64, values: TopKValues) -> Codec {
    let density = Density::from_share(share.min(1.0)).or_else(|_| Density::from_ppm(LEAST_PPM));
    Codec::TopK { density: density.unwrap_or(Density::FULL), values }
}

/// The densest Top-K whose message is `ratio` times smaller than dense f32; `otherwise` where that is as small.
pub fn topk_of_ratio(shape: &[usize], ratio: f64, values: TopKValues, otherwise: Codec) -> Codec {
    let wanted = |codec: Codec| codec.ratio_of(shape).is_ok_and(|r| r >= ratio);
    if ratio <= 1.0 || wanted(otherwise) {
        return otherwise;
    }
    let ppm = highest(LEAST_PPM, Density::FULL.ppm(), |ppm| {
        Density::from_ppm(ppm).is_ok_and(|density| wanted(Codec::TopK { density, values }))
    });
    topk(f64::from(ppm) / 1e6, values)
}

/// The codec that loses least of those whose message is `ratio` times smaller than dense f32: by what training lost in
/// docs/compression.md, the coarsest number that fits as long as one does, and beyond that transform coding. Of its bits
/// activations get more than gradients, so that the ratio is that of both together.
pub fn best_of_ratio(shape: &[usize], ratio: f64, way: Way, otherwise: Codec) -> Codec {
    if ratio <= 1.0 {
        return otherwise;
    }
    let wanted = |codec: &Codec| codec.ratio_of(shape).is_ok_and(|r| r >= ratio);
    let plain = [otherwise, Codec::Bf16, Codec::Int8, Codec::Int4].into_iter().find(wanted);
    plain.unwrap_or_else(|| {
        let ratio = ratio * BASES;
        transform_of_ratio(shape, ratio / share_of_bits(way, F32_BITS / ratio))
    })
}

/// The ratio for which [`best_of_ratio`] has picked a codec, nearly.
pub(crate) fn ratio_behind(codec: Codec, shape: &[usize], way: Way) -> f64 {
    let Codec::Transform { bits } = codec else { return codec.ratio_of(shape).unwrap_or(1.0) };
    let bits = f64::from(bits.thousandths()) / 1e3;
    // The mean of both directions of which this one has so many bits; where that is low, both have as many.
    let skewed = bits / share_of_bits(way, f64::INFINITY);
    let least = LEAST_GRADIENT_BITS / (2.0 - ACTIVATION_BITS);
    let mean = match () {
        () if skewed >= least => skewed,
        () if bits <= LEAST_GRADIENT_BITS => bits,
        // Between the two, gradients have the least and activations the rest.
        () if way == Way::Gradient => LEAST_GRADIENT_BITS,
        () => f64::midpoint(bits, LEAST_GRADIENT_BITS),
    };
    F32_BITS / mean / BASES
}

/// Bits of a direction over the mean of both, where that is `mean` bits.
fn share_of_bits(way: Way, mean: f64) -> f64 {
    let of_gradient = (2.0 - ACTIVATION_BITS).max(LEAST_GRADIENT_BITS / mean).min(1.0);
    match way {
        Way::Activation => 2.0 - of_gradient,
        Way::Gradient => of_gradient,
    }
}

/// [`best_of_ratio`], or `int4` where transform coding would take longer than what it spares the link.
pub(crate) fn best_in_time(direction: &Direction, ratio: f64, otherwise: Codec) -> Codec {
    let Direction { shape, dense_s, way } = direction;
    let codec = best_of_ratio(shape, ratio, *way, otherwise);
    let seconds = |codec: Codec| dense_s / codec.ratio_of(shape).unwrap_or(1.0) + codec_s(codec, shape);
    let is_slower = matches!(codec, Codec::Transform { .. }) && seconds(codec) > seconds(Codec::Int4);
    if is_slower { Codec::Int4 } else { codec }
}

/// Transform coding at the most bits with which a message is `ratio` times smaller than dense f32.
fn transform_of_ratio(shape: &[usize], ratio: f64) -> Codec {
    let codec = |thousandths| BitRate::from_thousandths(thousandths).map(|bits| Codec::Transform { bits });
    let thousandths = highest(BitRate::LEAST.thousandths(), BitRate::MOST.thousandths(), |thousandths| {
        codec(thousandths).and_then(|codec| codec.ratio_of(shape)).is_ok_and(|r| r >= ratio)
    });
    codec(thousandths).unwrap_or(Codec::Transform { bits: BitRate::LEAST })
}

/// Seconds of encoding and decoding a tensor of this shape.
pub(crate) fn codec_s(codec: Codec, shape: &[usize]) -> f64 {
    let elements = shape.iter().map(|&d| d as f64).product::<f64>();
    let bytes = 4.0 * elements;
    match codec {
        Codec::Dense | Codec::Bf16 | Codec::F16 | Codec::Int8 | Codec::Int4 => bytes / DENSE_BYTES_PER_S,
        Codec::TopK { .. } => bytes / SPARSE_BYTES_PER_S,
        Codec::Transform { .. } => {
            let rank = shape.last().map_or(1, |&width| (width as u64).min(MOST_RANK));
            elements / CODED_ELEMENTS_PER_S + 2.0 * 2.0 * elements * rank as f64 / TRANSFORM_FLOP_PER_S
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHAPE: [usize; 3] = [4, 128, 256];
    const VALUES: TopKValues = TopKValues::Bf16;
    const ADA: Compression = Compression::AdaTopk { ratio: 100.0, values: VALUES, literal: false };

    fn directions(dense_s: &[f64]) -> Vec<Direction> {
        dense_s.iter().map(|&dense_s| Direction { shape: SHAPE.to_vec(), dense_s, way: Way::Activation }).collect()
    }

    fn ratios(policy: Compression, dense_s: &[f64], slowest_stage_s: f64) -> Vec<f64> {
        let codecs = compress(policy, &directions(dense_s), slowest_stage_s, Codec::Dense);
        codecs.iter().map(|codec| codec.ratio_of(&SHAPE).unwrap()).collect()
    }

    /// Equal to within a kept entry or so.
    fn near(got: &[f64], expected: &[f64]) {
        let fits = got.iter().zip(expected).all(|(g, e)| *g >= *e && *g <= e * 1.03);
        assert!(fits, "{got:?}, expected {expected:?}");
    }

    #[test]
    fn compressed_links_take_the_same_time() {
        let dense = [8.0, 4.0, 0.5, 0.01];
        let ratios = ratios(ADA, &dense, 0.0);
        near(&ratios, &[100.0, 50.0, 6.25, 1.0]);
        let times: Vec<f64> = dense.iter().zip(&ratios).map(|(s, r)| s / r).collect();
        assert!(times[..3].iter().all(|t| (t - 0.08).abs() < 0.003) && times[3] < 0.08, "{times:?}");
    }

    #[test]
    fn the_literal_form_sparsifies_what_would_be_fast_enough() {
        // The paper page's example: at r = 100, a link at 1/200 of the slowest keeps two thirds of its entries.
        let literal = Compression::AdaTopk { ratio: 100.0, values: VALUES, literal: true };
        let codecs = compress(literal, &directions(&[200.0, 1.0]), 0.0, Codec::Dense);
        let shares: Vec<f64> =
            codecs.iter().map(|c| if let Codec::TopK { density, .. } = c { density.share() } else { 1.0 }).collect();
        assert!((shares[0] - 1.0 / 300.0).abs() < 1e-6 && (shares[1] - 2.0 / 3.0).abs() < 1e-6, "{shares:?}");
        near(&ratios(ADA, &[200.0, 1.0], 0.0)[1..], &[1.0]);
    }

    #[test]
    fn no_link_is_made_faster_than_the_slowest_stage() {
        near(&ratios(ADA, &[8.0, 2.0], 1.0), &[8.0, 2.0]);
        assert_eq!(ratios(ADA, &[0.5, 0.1], 1.0), [1.0, 1.0]);
    }

    #[test]
    fn uniform_is_uniform() {
        near(&ratios(Compression::UniformTopk { ratio: 10.0, values: VALUES }, &[8.0, 0.0], 1.0), &[10.0, 10.0]);
        assert_eq!(ratios(Compression::Dense, &[8.0, 0.0], 1.0), [1.0, 1.0]);
        assert_eq!(ratios(ADA, &[0.0, 0.0], 1.0), [1.0, 1.0]);
    }

    #[test]
    fn the_adaptive_policy_climbs_from_exact_to_coarse() {
        let codec = |ratio| best_of_ratio(&SHAPE, ratio, Way::Activation, Codec::Dense);
        assert_eq!(
            [codec(0.5), codec(1.5), codec(3.0), codec(7.0)],
            [Codec::Dense, Codec::Bf16, Codec::Int8, Codec::Int4]
        );
        for ratio in [10.0, 30.0, 100.0] {
            let both = Way::ALL.map(|way| best_of_ratio(&SHAPE, ratio, way, Codec::Dense));
            let bytes = both.map(|codec| codec.steady_bytes(&SHAPE).unwrap() as f64);
            assert!(2.0 * 4.0 * (4 * 128 * 256) as f64 / (bytes[0] + bytes[1]) >= ratio, "{both:?}");
            assert_eq!(bytes[0] > bytes[1], ratio < 29.0, "{both:?}");
            let behind = Way::ALL.map(|way| ratio_behind(both[way as usize], &SHAPE, way));
            assert!(behind.iter().all(|behind| (behind / ratio - 1.0).abs() < 0.05), "{behind:?}");
        }
    }

    #[test]
    fn transform_coding_is_for_links_that_are_slower_than_it() {
        let codecs = |dense_s| {
            compress(Compression::Adaptive { ratio: 16.0 }, &directions(&[dense_s]), dense_s / 100.0, Codec::Dense)
        };
        assert!(matches!(codecs(1.0)[..], [Codec::Transform { .. }]));
        assert_eq!(codecs(0.05), [Codec::Int4]);
    }

    #[test]
    fn shared_gradients_are_quantized_as_their_link_is_slow() {
        let adaptive = Compression::Adaptive { ratio: 10.0 };
        let codec = |dense_s, slowness| compress_shared(adaptive, &[96, 64], dense_s, slowness, 1.0);
        assert_eq!([codec(0.5, 1.0), codec(8.0, 0.1)], [Codec::Dense, Codec::Dense]);
        assert_eq!([codec(1.5, 1.0), codec(3.0, 1.0), codec(80.0, 2.0)], [Codec::Bf16, Codec::Int8, Codec::Int4]);
        assert_eq!(compress_shared(ADA, &[96, 64], 80.0, 1.0, 1.0), Codec::Dense);
    }

    proptest! {
        #[test]
        fn nothing_is_ever_larger_than_dense_and_the_slowest_link_gets_the_ratio(
            dense in prop::collection::vec(0.0f64..100.0, 1..20),
            ratio in 1.0f64..500.0,
            adaptive in any::<bool>(),
        ) {
            let policy = if adaptive { Compression::Adaptive { ratio } } else {
                Compression::AdaTopk { ratio, values: VALUES, literal: false }
            };
            let longest = dense.iter().copied().fold(0.0, f64::max);
            for (got, seconds) in ratios(policy, &dense, 0.0).iter().zip(&dense) {
                prop_assert!(*got >= 1.0);
                // An activation has more than its share of bits, and scales and step are the smallest there is.
                let least = if adaptive { ratio.min(200.0) / ACTIVATION_BITS } else { ratio };
                // And where transform coding takes longer than it spares, int4 is as fast.
                let coding = if adaptive { 0.02 } else { 0.0 };
                prop_assert!(seconds / got <= longest / least * (1.0 + 1e-9) + coding);
            }
        }
    }
}
