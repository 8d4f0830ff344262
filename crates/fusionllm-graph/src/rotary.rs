//! Frequencies of rotary position embedding, and how they are scaled for longer sequences.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// How the frequencies of rotary position embedding change for sequences longer than a model was first trained with, under
/// Hugging Face's names.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum RotaryScaling {
    /// As they are.
    #[default]
    None,
    /// All positions are divided by `factor` (Chen et al., arXiv 2306.15595).
    Linear {
        /// How many times longer sequences are.
        factor: f64,
    },
    /// Llama 3.1's: long wavelengths are divided, short ones stay, and those between are blended.
    Llama3 {
        /// How many times longer sequences are.
        factor: f64,
        /// Wavelengths of more than `original_positions` over this are divided.
        low_freq_factor: f64,
        /// Wavelengths of less than `original_positions` over this stay.
        high_freq_factor: f64,
        /// The longest sequence before.
        original_positions: usize,
    },
    /// YaRN (Peng et al., arXiv 2309.00071).
    Yarn {
        /// How many times longer sequences are.
        factor: f64,
        /// The longest sequence before.
        original_positions: usize,
        /// Dimensions that turn more often than this in the original length stay.
        beta_fast: f64,
        /// Dimensions that turn less often than this in the original length are divided.
        beta_slow: f64,
        /// Whether the ends of the blend are rounded to whole dimensions.
        truncate: bool,
        /// What queries and keys are multiplied by besides.
        attention_factor: f64,
    },
}

/// An attribute, its value and what it ought to be.
type Wrong = (&'static str, f64, &'static str);

impl RotaryScaling {
    /// Whether frequencies stay as they are.
    pub fn is_none(&self) -> bool {
        *self == Self::None
    }

    /// Whether all numbers are in their range.
    pub(crate) fn check(&self) -> Result<(), Wrong> {
        let positive = |key, value: f64| {
            let fits = value.is_finite() && value > 0.0;
            if fits { Ok(()) } else { Err((key, value, "a finite number over 0")) }
        };
        match *self {
            Self::None => Ok(()),
            Self::Linear { factor } => positive("factor", factor),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                positive("factor", factor)?;
                positive("low_freq_factor", low_freq_factor)?;
                positive("high_freq_factor", high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    return Err(("high_freq_factor", high_freq_factor, "more than low_freq_factor"));
                }
                positive("original_positions", original_positions as f64)
            }
            Self::Yarn { factor, original_positions, beta_fast, beta_slow, attention_factor, truncate: _ } => {
                positive("factor", factor)?;
                positive("original_positions", original_positions as f64)?;
                positive("beta_fast", beta_fast)?;
                positive("beta_slow", beta_slow)?;
                positive("attention_factor", attention_factor)
            }
        }
    }

    /// Radians by which the pairs of a head turn from one position to the next, `head_dim / 2` of them.
    pub fn frequencies(&self, head_dim: usize, base: f64) -> Vec<f64> {
        let pairs = head_dim / 2;
        let plain = (0..pairs).map(|pair| base.powf(-2.0 * pair as f64 / head_dim as f64));
        match *self {
            Self::None => plain.collect(),
            Self::Linear { factor } => plain.map(|frequency| frequency / factor).collect(),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let scaled = |frequency: f64| {
                    let turns = original_positions as f64 * frequency / (2.0 * PI);
                    if turns < low_freq_factor {
                        return frequency / factor;
                    }
                    if turns > high_freq_factor {
                        return frequency;
                    }
                    let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - kept) * frequency / factor + kept * frequency
                };
                plain.map(scaled).collect()
            }
            Self::Yarn { factor, original_positions, beta_fast, beta_slow, truncate, attention_factor: _ } => {
                let positions = original_positions as f64;
                // The dimension that turns this often in the original length.
                let dimension =
                    |turns: f64| head_dim as f64 * (positions / (turns * 2.0 * PI)).ln() / (2.0 * base.ln());
                let (first, last) = (dimension(beta_fast), dimension(beta_slow));
                let (first, last) = if truncate { (first.floor(), last.ceil()) } else { (first, last) };
                let (first, last) = (first.max(0.0), last.min(head_dim as f64 - 1.0));
                let width = if first == last { 0.001 } else { last - first };
                let blended = |(pair, frequency): (usize, f64)| {
                    let divided = ((pair as f64 - first) / width).clamp(0.0, 1.0);
                    frequency / factor * divided + frequency * (1.0 - divided)
                };
                plain.enumerate().map(blended).collect()
            }
        }
    }

    /// What turned queries and keys are multiplied by: 1 but for YaRN.
    pub fn attention_factor(&self) -> f64 {
        if let Self::Yarn { attention_factor, .. } = *self { attention_factor } else { 1.0 }
    }

    /// Cosines and sines for `positions` positions of heads of `head_dim`, `[positions, head_dim / 2]` each, times the
    /// attention factor.
    pub fn table(&self, head_dim: usize, base: f64, positions: usize) -> (Vec<f32>, Vec<f32>) {
        let (frequencies, factor) = (self.frequencies(head_dim, base), self.attention_factor());
        let angles = (0..positions).flat_map(|position| frequencies.iter().map(move |f| f * position as f64));
        angles.map(|angle| ((angle.cos() * factor) as f32, (angle.sin() * factor) as f32)).unzip()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        for (a, b) in got.iter().zip(expected) {
            assert!((a - b).abs() <= 1e-6 * b.abs(), "{got:?} against {expected:?}");
        }
    }

    #[test]
    fn frequencies_fall_from_one_and_linear_scaling_divides_them() {
        near(&RotaryScaling::None.frequencies(4, 1e4), &[1.0, 0.01]);
        near(&RotaryScaling::Linear { factor: 4.0 }.frequencies(4, 1e4), &[0.25, 0.0025]);
        let (cos, sin) = RotaryScaling::None.table(4, 1e4, 2);
        assert_eq!((cos.len(), cos[0], sin[0]), (4, 1.0, 0.0));
        assert!((f64::from(sin[2]) - 1f64.sin()).abs() < 1e-7);
    }

    #[test]
    fn llama3_and_yarn_are_those_of_transformers() {
        let llama3 =
            RotaryScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 64 };
        let expected = [1.0, 0.079403013, 0.00470075384, 0.000911583134, 0.000176776681, 3.42810235e-05];
        near(&llama3.frequencies(16, 5e5)[..6], &expected);
        let yarn = |beta_fast, beta_slow, truncate| RotaryScaling::Yarn {
            factor: 4.0,
            original_positions: 64,
            beta_fast,
            beta_slow,
            truncate,
            attention_factor: 1.0,
        };
        let expected = [1.0, 0.237170815, 0.049999997, 0.00790569466, 0.00249999994, 0.000790569466];
        near(&yarn(32.0, 1.0, true).frequencies(16, 1e4)[..6], &expected);
        let expected = [1.0, 0.160589159, 0.0250000004, 0.00790569466, 0.00249999994, 0.000790569466];
        near(&yarn(8.0, 2.0, false).frequencies(16, 1e4)[..6], &expected);
    }
}
