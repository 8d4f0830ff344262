//! What is known of machines and links when a placement is made: the profile.

mod file;
mod measured;

use std::sync::Arc;

use fusionllm_graph::Kernels;
use serde::{Deserialize, Serialize};

pub use file::{ClusterFile, DeviceEntry, LinkEntry};
pub use measured::{FpBp, Host, Measured};

use crate::PlanError;

/// Most CompNodes that a job or a cluster file may have. Links are a table of every pair, and a thousand CompNodes are
/// planned in seconds, not ten thousand.
pub const MAX_COMPNODES: usize = 2048;

/// One CompNode as the planner sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct CompNodeProfile {
    /// Name shown to people; unique in the cluster.
    pub name: String,
    /// Peak speed S in FLOP/s.
    pub flop_per_s: f64,
    /// λ: the share of the peak that matrix products of real shapes reach, above 0 and at most 1.
    pub efficiency: f64,
    /// Bytes per second to and from the device's memory, which bounds elementwise ops; infinite if not known.
    pub memory_bytes_per_s: f64,
    /// Bytes that a job may fill.
    pub memory_bytes: u64,
    /// How it computes ops of several steps, by which what FP keeps is counted.
    pub kernels: Kernels,
    /// Whether it makes activations anew in BP instead of keeping them all.
    pub recompute: bool,
    /// The organisation that it belongs to, if somebody said so: its machines are kept apart where data is private.
    pub org: Option<String>,
    /// The CPU or GPU that it may share with others; nothing if it is its own.
    pub host: Option<Host>,
    /// What was measured; it goes before what follows from the speeds above.
    pub measured: Option<Arc<Measured>>,
}

impl CompNodeProfile {
    /// A CompNode of unit speed and boundless memory.
    pub fn unit(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            flop_per_s: 1.0,
            efficiency: 1.0,
            memory_bytes_per_s: f64::INFINITY,
            memory_bytes: u64::MAX,
            kernels: Kernels::Plain,
            recompute: false,
            org: None,
            host: None,
            measured: None,
        }
    }

    /// The same at another speed: all that it computes takes `factor` times as long.
    pub fn slowed(&self, factor: f64) -> Self {
        let slower = |measured: &Arc<Measured>| {
            let seconds = |op: &FpBp| FpBp { fp_s: op.fp_s * factor, bp_s: op.bp_s * factor };
            let ops = measured.ops.iter().map(|(work, op)| (work.clone(), seconds(op))).collect();
            Arc::new(Measured {
                ops,
                update_s_per_byte: measured.update_s_per_byte * factor,
                copy_s_per_byte: measured.copy_s_per_byte,
            })
        };
        Self {
            flop_per_s: self.flop_per_s / factor,
            memory_bytes_per_s: self.memory_bytes_per_s / factor,
            measured: self.measured.as_ref().map(slower),
            ..self.clone()
        }
    }

    /// Seconds of copying a tensor of this many bytes between host and device.
    pub fn copy_s(&self, bytes: f64) -> f64 {
        self.measured.as_ref().map_or(0.0, |m| m.copy_s_per_byte * bytes)
    }

    /// Seconds for work of this many FLOPs that moves this many bytes (a roofline: whichever takes longer).
    pub fn seconds(&self, flops: f64, bytes: f64) -> f64 {
        (flops / (self.flop_per_s * self.efficiency)).max(bytes / self.memory_bytes_per_s)
    }
}

/// One direction between two CompNodes: α seconds of latency, and bandwidth 1/β.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkProfile {
    /// α: seconds from the last bit sent to the last bit received.
    pub latency_s: f64,
    /// 1/β: bytes per second.
    pub bytes_per_s: f64,
}

impl LinkProfile {
    /// A link that costs nothing.
    pub const FREE: Self = Self { latency_s: 0.0, bytes_per_s: f64::INFINITY };

    /// β·M: seconds for which a message of `bytes` occupies the link.
    pub fn occupied_s(&self, bytes: f64) -> f64 {
        bytes / self.bytes_per_s
    }

    /// α + β·M: seconds from the first bit sent to the last bit received.
    pub fn transfer_s(&self, bytes: f64) -> f64 {
        self.latency_s + self.occupied_s(bytes)
    }
}

/// The CompNodes that a job may use, and the links between them. The first CompNode owns the data, unless the planner
/// is free to choose.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cluster {
    /// The CompNodes; a [`NodeIndex`](crate::NodeIndex) counts in this order.
    pub compnodes: Vec<CompNodeProfile>,
    /// `links[a][b]` is the direction from `a` to `b`; empty if all links are free.
    pub links: Vec<Vec<LinkProfile>>,
}

impl Cluster {
    /// `count` CompNodes of one speed over free links, named `compnode-0`, `compnode-1`, ...
    pub fn uniform(count: usize) -> Self {
        let profile = |i| CompNodeProfile::unit(format!("compnode-{i}"));
        Self { compnodes: (0..count).map(profile).collect(), links: Vec::new() }
    }

    /// The direction from `a` to `b`.
    pub fn link(&self, a: usize, b: usize) -> LinkProfile {
        if a == b {
            return LinkProfile::FREE;
        }
        self.links.get(a).and_then(|row| row.get(b)).copied().unwrap_or(LinkProfile::FREE)
    }

    /// The same, where every CompNode makes activations anew in BP, or none does.
    pub(crate) fn recomputing(&self, recompute: bool) -> Self {
        let mut cluster = self.clone();
        cluster.compnodes.iter_mut().for_each(|compnode| compnode.recompute = recompute);
        cluster
    }

    /// The CompNodes with these indices, in this order.
    pub fn select(&self, indices: &[usize]) -> Self {
        let compnodes = indices.iter().filter_map(|&i| self.compnodes.get(i)).cloned().collect();
        let row = |&a: &usize| indices.iter().map(|&b| self.link(a, b)).collect();
        let links = if self.links.is_empty() { Vec::new() } else { indices.iter().map(row).collect() };
        Self { compnodes, links }
    }

    /// Holds every number against its range.
    ///
    /// # Errors
    /// [`PlanError::NoCompNodes`], [`PlanError::Profile`] or [`PlanError::Link`] for the first that cannot be.
    pub fn validate(&self) -> Result<(), PlanError> {
        if self.compnodes.is_empty() {
            return Err(PlanError::NoCompNodes);
        }
        for node in &self.compnodes {
            let fail = |what: &'static str, got: f64, expected: &'static str| {
                Err(PlanError::Profile { name: node.name.clone(), what, got: got.to_string(), expected })
            };
            if !(node.flop_per_s.is_finite() && node.flop_per_s > 0.0) {
                return fail("flop_per_s", node.flop_per_s, "a positive number");
            }
            if !(node.efficiency > 0.0 && node.efficiency <= 1.0) {
                return fail("efficiency", node.efficiency, "above 0 and at most 1");
            }
            if let Some(host) = &node.host
                && (host.lanes.is_nan() || host.lanes <= 0.0)
            {
                return fail("lanes", host.lanes, "a positive number");
            }
            if node.measured.as_ref().is_some_and(|m| !m.is_sane()) {
                return fail("measured seconds", f64::NAN, "finite numbers of at least 0");
            }
            if node.memory_bytes_per_s.is_nan() || node.memory_bytes_per_s <= 0.0 {
                return fail("memory_bytes_per_s", node.memory_bytes_per_s, "a positive number");
            }
        }
        let (names, links) = (|i: usize| self.compnodes[i].name.clone(), self.links.as_slice());
        let is_square = links.len() == self.compnodes.len() && links.iter().all(|row| row.len() == links.len());
        if !links.is_empty() && !is_square {
            return Err(PlanError::LinkTable { compnodes: self.compnodes.len(), rows: links.len() });
        }
        for (a, row) in links.iter().enumerate() {
            for (b, link) in row.iter().enumerate().filter(|(b, _)| *b != a) {
                let latency_fits = link.latency_s.is_finite() && link.latency_s >= 0.0;
                if !latency_fits || link.bytes_per_s.is_nan() || link.bytes_per_s <= 0.0 {
                    let got = format!("{} s and {} bytes/s", link.latency_s, link.bytes_per_s);
                    return Err(PlanError::Link { from: names(a), to: names(b), got });
                }
            }
        }
        Ok(())
    }
}
