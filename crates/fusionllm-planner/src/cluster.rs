//! What is known of the machines when a placement is made.

use serde::{Deserialize, Serialize};

/// One CompNode as the planner sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompNodeProfile {
    /// Name shown to people; unique in the cluster.
    pub name: String,
    /// Relative or absolute compute speed, in FLOP/s; only ratios between CompNodes matter to the partitioners.
    pub flop_per_s: f64,
}

/// The CompNodes a job may use. The first one owns the data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// The CompNodes, data owner first.
    pub compnodes: Vec<CompNodeProfile>,
}

impl Cluster {
    /// `count` CompNodes of one speed, named `compnode-0`, `compnode-1`, ...
    pub fn uniform(count: usize) -> Self {
        let profile = |i| CompNodeProfile { name: format!("compnode-{i}"), flop_per_s: 1.0 };
        Self { compnodes: (0..count).map(profile).collect() }
    }
}
