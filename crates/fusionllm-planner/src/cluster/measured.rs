//! What was measured of a device: more exact than its data sheet.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Seconds that the ops of a job take on one device, as measured there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// FP and BP of one micro-batch, in seconds, by [`fusionllm_graph::OpDag::work`].
    pub ops: BTreeMap<String, FpBp>,
    /// Seconds of UPDATE per byte of f32 parameters.
    pub update_s_per_byte: f64,
    /// Seconds per byte of a tensor that is copied between host and device, either way.
    pub copy_s_per_byte: f64,
}

/// Seconds of FP and of BP of one micro-batch through an op or a stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FpBp {
    /// Seconds of FP.
    pub fp_s: f64,
    /// Seconds of BP; 0 where no gradient flows.
    pub bp_s: f64,
}

impl FpBp {
    /// Seconds of both.
    pub fn both_s(self) -> f64 {
        self.fp_s + self.bp_s
    }
}

impl Measured {
    /// Whether every number is one that time can have.
    pub fn is_sane(&self) -> bool {
        let seconds = self.ops.values().flat_map(|op| [op.fp_s, op.bp_s]);
        let rest = [self.update_s_per_byte, self.copy_s_per_byte];
        seconds.chain(rest).all(|s| s.is_finite() && s >= 0.0)
    }
}

/// A machine or a GPU whose compute several CompNodes share, such as processes on one CPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// Name of the machine, or of the GPU in it.
    pub name: String,
    /// How many of its CompNodes compute at full speed at once; beyond that they share.
    pub lanes: f64,
    /// How many cores a CompNode computes on, one of which messages take while they are handled; 0 for a GPU, from which
    /// they take nothing.
    #[serde(default = "one")]
    pub threads: u32,
}

fn one() -> u32 {
    1
}
