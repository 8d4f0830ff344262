//! `[lora]`: low-rank adapters instead of the model's own parameters.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::refusal::fail;
use super::validate::{fits_f32, in_range, is_share};
use crate::JobError;

/// Largest rank; that of a linear op is bounded by its width.
const MAX_RANK: u32 = 1 << 16;
/// Most bytes of a target: no longer than a parameter's name.
const MAX_TARGET_BYTES: usize = 256;

/// `[lora]`: whether adapters are trained, and which.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LoraSpec {
    /// Rank of the adapters; 0: there are none, and all parameters are trained.
    pub rank: u32,
    /// What an adapter adds is scaled by this over the rank; twice the rank if not given.
    pub alpha: Option<f64>,
    /// The linear ops that get one, by the ends of their modules' names, or `all-linear`; empty: as PEFT has it for the
    /// model's family.
    pub targets: Vec<String>,
    /// Probability with which an element of an adapter's input is left out in training.
    pub dropout: f64,
    /// Divide by the root of the rank instead of the rank (Kalajdzievski, arXiv 2312.03732).
    pub rslora: bool,
    /// A PEFT folder to go on from, on the broker's machine; it says what the other keys say.
    pub adapter: Option<PathBuf>,
}

impl LoraSpec {
    /// Whether adapters are trained.
    pub fn is_on(&self) -> bool {
        self.rank > 0 || self.adapter.is_some()
    }

    /// Factor on what an adapter of the job's rank adds.
    pub fn scaling(&self) -> f64 {
        scaling(self.alpha.unwrap_or(2.0 * f64::from(self.rank)), self.rank, self.rslora)
    }

    pub(super) fn validate(&self) -> Result<(), JobError> {
        in_range("lora.rank", self.rank.into(), self.rank <= MAX_RANK, &format!("at most {MAX_RANK}"))?;
        if let Some(alpha) = self.alpha {
            in_range("lora.alpha", alpha, alpha > 0.0, "above 0")?;
            fits_f32("lora.alpha", alpha)?;
        }
        in_range("lora.dropout", self.dropout, is_share(self.dropout), "at least 0 and below 1")?;
        let is_target = |target: &&String| target.trim().is_empty() || target.len() > MAX_TARGET_BYTES;
        if let Some(target) = self.targets.iter().find(is_target) {
            return fail("lora.targets", format!("has {target:?}, expected names of linear ops, such as \"q_proj\""));
        }
        let given = [
            ("lora.alpha", self.alpha.is_some()),
            ("lora.targets", !self.targets.is_empty()),
            ("lora.dropout", self.dropout != 0.0),
            ("lora.rslora", self.rslora),
        ];
        match given.into_iter().find(|(_, given)| *given && !self.is_on()) {
            Some((key, _)) => {
                fail(key, "is given, but there are no adapters: expected lora.rank above 0 too".to_owned())
            }
            None => Ok(()),
        }
    }
}

/// Factor on what an adapter adds.
pub fn scaling(alpha: f64, rank: u32, rslora: bool) -> f64 {
    let rank = f64::from(rank.max(1));
    alpha / if rslora { rank.sqrt() } else { rank }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alpha_is_twice_the_rank_and_stands_over_it_or_its_root() {
        let spec = LoraSpec { rank: 16, ..LoraSpec::default() };
        assert_eq!((spec.scaling(), spec.is_on(), LoraSpec::default().is_on()), (2.0, true, false));
        assert_eq!(LoraSpec { alpha: Some(4.0), ..spec.clone() }.scaling(), 0.25);
        assert_eq!(LoraSpec { alpha: Some(4.0), rslora: true, ..spec }.scaling(), 1.0);
    }
}
