//! How much each boundary edge is compressed: AdaTopK's ratios (the paper's section on adaptive compression).
//!
//! The published form is r_i = max(1, 3·r·R_i / R_max), where the 3 is what an f32 value with an int64 index costs over
//! a dense f32. Taken literally it sends more than dense wherever 1 < r_i < 3. Ours is the general form: with c bytes
//! per kept entry and b per dense one, r_i = max(1, (c/b)·r·R_i / R_max), dense wherever r_i < c/b, with R from the
//! bandwidth part of the link time alone (latency cannot be compressed), and r no higher than what makes the slowest
//! link as fast as the slowest stage.

use serde::{Deserialize, Serialize};

/// What a Top-K codec's entries cost, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EntryBytes {
    /// c: per kept entry, value and position.
    pub kept: f64,
    /// b: per entry of the dense form.
    pub dense: f64,
}

impl EntryBytes {
    /// An f32 value and an int64 index beside dense f32: the paper's.
    pub const F32_INDEX64: Self = Self { kept: 12.0, dense: 4.0 };

    fn factor(self) -> f64 {
        self.kept / self.dense
    }
}

/// Which edges are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "policy", rename_all = "kebab-case")]
pub enum Compression {
    /// None.
    #[default]
    Dense,
    /// Every boundary edge by the same ratio of bytes.
    UniformTopk {
        /// Dense bytes over encoded bytes.
        ratio: f64,
    },
    /// Each direction of each edge as its link is slow.
    AdaTopk {
        /// r: the ratio of bytes on the slowest link.
        ratio: f64,
        /// The published formula, factor 3 and all.
        literal: bool,
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
        }
    }
}

/// How one direction of one edge is sent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EdgeCompression {
    /// Name of the codec.
    pub codec: String,
    /// Of d entries, d / `sparsity` are kept; 1 is dense.
    pub sparsity: f64,
    /// Dense bytes over encoded bytes; below 1 the message is larger than dense.
    pub ratio: f64,
}

impl EdgeCompression {
    fn dense() -> Self {
        Self { codec: "dense".to_owned(), sparsity: 1.0, ratio: 1.0 }
    }

    fn topk(sparsity: f64, entry: EntryBytes) -> Self {
        Self { codec: "topk".to_owned(), sparsity, ratio: sparsity / entry.factor() }
    }
}

/// The compression of each direction, given R: the seconds for which its dense message occupies the link.
/// `slowest_stage_s` is the time of the slowest stage for one micro-batch.
pub fn compress(policy: Compression, entry: EntryBytes, dense_s: &[f64], slowest_stage_s: f64) -> Vec<EdgeCompression> {
    let longest = dense_s.iter().copied().fold(0.0, f64::max);
    let factor = entry.factor();
    let of = |seconds: f64| match policy {
        Compression::Dense => EdgeCompression::dense(),
        Compression::UniformTopk { ratio } if ratio > 1.0 => EdgeCompression::topk(ratio * factor, entry),
        Compression::UniformTopk { .. } => EdgeCompression::dense(),
        Compression::AdaTopk { .. } if longest <= 0.0 => EdgeCompression::dense(),
        Compression::AdaTopk { ratio, literal: true } => {
            let sparsity = (3.0 * ratio * seconds / longest).max(1.0);
            if sparsity > 1.0 { EdgeCompression::topk(sparsity, entry) } else { EdgeCompression::dense() }
        }
        Compression::AdaTopk { ratio, literal: false } => {
            let useful = if slowest_stage_s > 0.0 { ratio.min(longest / slowest_stage_s) } else { ratio };
            let sparsity = factor * useful * seconds / longest;
            if sparsity > factor { EdgeCompression::topk(sparsity, entry) } else { EdgeCompression::dense() }
        }
    };
    dense_s.iter().map(|&seconds| of(seconds)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ADA: Compression = Compression::AdaTopk { ratio: 100.0, literal: false };

    fn ratios(policy: Compression, dense_s: &[f64], slowest_stage_s: f64) -> Vec<f64> {
        let edges = compress(policy, EntryBytes::F32_INDEX64, dense_s, slowest_stage_s);
        edges.iter().map(|e| e.ratio).collect()
    }

    #[test]
    fn compressed_links_take_the_same_time() {
        let dense = [8.0, 4.0, 0.5, 0.01];
        let ratios = ratios(ADA, &dense, 0.0);
        assert_eq!(ratios, [100.0, 50.0, 6.25, 1.0]);
        let times: Vec<f64> = dense.iter().zip(&ratios).map(|(s, r)| s / r).collect();
        assert!(times[..3].iter().all(|t| (t - 0.08).abs() < 1e-12) && times[3] < 0.08);
    }

    #[test]
    fn the_literal_form_makes_middling_links_larger() {
        // The paper page's example: at r = 100, a link at 1/200 of the slowest sends twice the dense bytes.
        let literal = Compression::AdaTopk { ratio: 100.0, literal: true };
        assert_eq!(ratios(literal, &[200.0, 1.0], 0.0), [100.0, 0.5]);
        assert_eq!(ratios(ADA, &[200.0, 1.0], 0.0), [100.0, 1.0]);
    }

    #[test]
    fn no_link_is_made_faster_than_the_slowest_stage() {
        assert_eq!(ratios(ADA, &[8.0, 2.0], 1.0), [8.0, 2.0]);
        assert_eq!(ratios(ADA, &[0.5, 0.1], 1.0), [1.0, 1.0]);
    }

    #[test]
    fn uniform_is_uniform() {
        assert_eq!(ratios(Compression::UniformTopk { ratio: 10.0 }, &[8.0, 0.0], 1.0), [10.0, 10.0]);
        assert_eq!(ratios(Compression::Dense, &[8.0, 0.0], 1.0), [1.0, 1.0]);
        assert_eq!(ratios(ADA, &[0.0, 0.0], 1.0), [1.0, 1.0]);
    }

    proptest! {
        #[test]
        fn nothing_is_ever_larger_than_dense_and_the_slowest_link_gets_the_ratio(
            dense in prop::collection::vec(0.0f64..100.0, 1..20),
            ratio in 1.0f64..1000.0,
            kept in 2.0f64..12.0,
        ) {
            let entry = EntryBytes { kept, dense: 4.0 };
            let policy = Compression::AdaTopk { ratio, literal: false };
            let edges = compress(policy, entry, &dense, 0.0);
            let longest = dense.iter().copied().fold(0.0, f64::max);
            for (edge, seconds) in edges.iter().zip(&dense) {
                prop_assert!(edge.ratio >= 1.0);
                prop_assert!(seconds / edge.ratio <= longest / ratio * (1.0 + 1e-9));
            }
        }
    }
}
