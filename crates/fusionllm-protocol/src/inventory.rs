//! What is measured of machines and links, and the cluster that follows from it.

use std::collections::BTreeMap;
use std::sync::Arc;

use fusionllm_graph::Kernels;
use fusionllm_planner::{Cluster, CompNodeProfile, Host, LinkProfile, Measured};
use serde::{Deserialize, Serialize};

use crate::JobId;

/// What a CompNode says of its device when it joins. Measured on no job's shapes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceProfile {
    /// S: FLOP/s of a large square matrix product.
    pub flop_per_s: f64,
    /// Bytes per second to and from the device's memory, by adding two large tensors.
    pub memory_bytes_per_s: f64,
    /// Bytes of memory that are free for a job; nothing if the device does not tell.
    pub memory_bytes: Option<u64>,
    /// Which machine it is, the same for all CompNodes on it.
    pub host: String,
    /// How it computes on the machine's CPU; nothing if it computes on a GPU.
    pub cpu: Option<CpuShare>,
    /// How it computes ops of several steps.
    pub kernels: Kernels,
}

impl DeviceProfile {
    /// Whether it can be planned with: every figure is a positive number.
    ///
    /// # Errors
    /// Which is not, for people.
    pub fn check(&self) -> Result<(), String> {
        let lanes = self.cpu.map_or(1.0, |cpu| cpu.lanes);
        let bandwidth = ("memory_bytes_per_s", self.memory_bytes_per_s);
        for (what, got) in [("flop_per_s", self.flop_per_s), bandwidth, ("lanes", lanes)] {
            if !(got.is_finite() && got > 0.0) {
                return Err(format!("its device profile has {what} = {got}, expected a positive number"));
            }
        }
        Ok(())
    }
}

/// What a CompNode takes of its machine's CPU.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpuShare {
    /// How many such CompNodes compute at full speed at once.
    pub lanes: f64,
    /// Cores that each computes on.
    pub threads: u32,
}

/// Both directions between two CompNodes, as the one that dialled saw them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairProfile {
    /// From the one that dialled to the other.
    pub there: LinkProfile,
    /// The direction back.
    pub back: LinkProfile,
    /// Whether it leads over the broker's relay, since no direct way was found.
    pub relayed: bool,
}

/// One machine in an inventory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineReport {
    /// The CompNode's name.
    pub name: String,
    /// Its public key in hexadecimal, shortened.
    pub id: String,
    /// Its device, for people.
    pub device: String,
    /// The job it works on.
    pub job: Option<JobId>,
    /// The organisation that it says it belongs to.
    pub org: Option<String>,
    /// What it said of its device.
    pub profile: DeviceProfile,
    /// What it measured of the ops of the job that was asked about.
    pub measured: Option<Measured>,
    /// λ: the share of S that the ops of that job reach together.
    pub efficiency: Option<f64>,
}

impl MachineReport {
    /// What it computes on, alone or with others: the machine's CPU, or a GPU in it.
    fn computes_on(&self) -> Host {
        match self.profile.cpu {
            Some(CpuShare { lanes, threads }) => Host { name: self.profile.host.clone(), lanes, threads },
            None => Host { name: format!("{} {}", self.profile.host, self.device), lanes: 1.0, threads: 0 },
        }
    }
}

/// One direction in an inventory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkReport {
    /// Name of the sending CompNode.
    pub from: String,
    /// Name of the receiving CompNode.
    pub to: String,
    /// What was measured; nothing if the two could not reach each other.
    pub link: Option<LinkProfile>,
    /// Whether it leads over the broker's relay.
    pub relayed: bool,
    /// Seconds since it was measured.
    pub age_s: f64,
}

/// What the joined machines and links can do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Inventory {
    /// Every CompNode that is connected, in the order in which they joined.
    pub machines: Vec<MachineReport>,
    /// Every direction that was measured.
    pub links: Vec<LinkReport>,
    /// Measurements that are still to come.
    pub pending: u32,
    /// Whether the broker has a relay.
    pub relay: bool,
}

/// A link over which nothing comes: no plan will use it where there is another way.
const UNREACHABLE: LinkProfile = LinkProfile { latency_s: 1e6, bytes_per_s: 1.0 };

impl Inventory {
    /// The cluster of all machines, in their order. CompNodes on one CPU or one GPU share it and its memory.
    pub fn cluster(&self) -> Cluster {
        let hosts: Vec<Host> = self.machines.iter().map(MachineReport::computes_on).collect();
        let members = |host: &Host| hosts.iter().filter(|other| other.name == host.name).count() as u64;
        // CompNodes that measured the same share it, so that the planner sees that they are alike.
        let mut shared: Vec<Arc<Measured>> = Vec::new();
        let mut share = |measured: &Measured| {
            let known = shared.iter().find(|known| ***known == *measured).cloned();
            known.unwrap_or_else(|| {
                shared.push(Arc::new(measured.clone()));
                shared[shared.len() - 1].clone()
            })
        };
        let profile = |(machine, host): (&MachineReport, &Host)| CompNodeProfile {
            name: machine.name.clone(),
            flop_per_s: machine.profile.flop_per_s,
            efficiency: machine.efficiency.unwrap_or(1.0),
            memory_bytes_per_s: machine.profile.memory_bytes_per_s,
            memory_bytes: machine.profile.memory_bytes.map_or(u64::MAX, |bytes| bytes / members(host)),
            kernels: machine.profile.kernels,
            recompute: false,
            org: machine.org.clone(),
            host: Some(host.clone()),
            measured: machine.measured.as_ref().map(&mut share),
        };
        let compnodes: Vec<CompNodeProfile> = self.machines.iter().zip(&hosts).map(profile).collect();
        let mut links = vec![vec![UNREACHABLE; compnodes.len()]; compnodes.len()];
        let index: BTreeMap<&str, usize> = self.machines.iter().map(|m| m.name.as_str()).zip(0..).collect();
        for link in &self.links {
            if let (Some(&from), Some(&to)) = (index.get(link.from.as_str()), index.get(link.to.as_str())) {
                links[from][to] = link.link.unwrap_or(UNREACHABLE);
            }
        }
        Cluster { compnodes, links }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(name: &str, host: &str, lanes: Option<f64>) -> MachineReport {
        let profile = DeviceProfile {
            flop_per_s: 1e10,
            memory_bytes_per_s: 1e10,
            memory_bytes: Some(8_000_000_000),
            host: host.to_owned(),
            cpu: lanes.map(|lanes| CpuShare { lanes, threads: 1 }),
            kernels: if lanes.is_some() { Kernels::Fused } else { Kernels::Plain },
        };
        let measured = Some(Measured { copy_s_per_byte: 1e-9, ..Measured::default() });
        let device = if lanes.is_some() { "cpu" } else { "cuda:0" };
        let (name, id, device) = (name.to_owned(), "00".to_owned(), device.to_owned());
        MachineReport { name, id, device, job: None, org: None, profile, measured, efficiency: Some(0.5) }
    }

    #[test]
    fn machines_become_a_cluster_and_share_what_they_share() {
        let link = LinkProfile { latency_s: 0.01, bytes_per_s: 1e6 };
        let report = |from: &str, to: &str, link| LinkReport {
            from: from.to_owned(),
            to: to.to_owned(),
            link,
            relayed: false,
            age_s: 1.0,
        };
        let inventory = Inventory {
            machines: vec![
                machine("a", "office", Some(2.0)),
                machine("b", "office", Some(2.0)),
                machine("gpu", "rack", None),
                machine("same", "rack", None),
                machine("other", "attic", None),
            ],
            links: vec![report("a", "b", Some(link)), report("b", "gpu", None)],
            pending: 0,
            relay: false,
        };
        let cluster = inventory.cluster();
        cluster.validate().unwrap();
        let memory: Vec<u64> = cluster.compnodes.iter().map(|c| c.memory_bytes).collect();
        assert_eq!(memory, [4_000_000_000, 4_000_000_000, 4_000_000_000, 4_000_000_000, 8_000_000_000]);
        assert_eq!(cluster.link(0, 1), link);
        assert_eq!((cluster.link(1, 2), cluster.link(1, 0)), (UNREACHABLE, UNREACHABLE));
        let measured = |i: usize| cluster.compnodes[i].measured.clone().unwrap();
        assert!(Arc::ptr_eq(&measured(0), &measured(2)));
        let gpu = Host { name: "rack cuda:0".to_owned(), lanes: 1.0, threads: 0 };
        assert_eq!(cluster.compnodes[2].host, Some(gpu));
        assert_eq!(cluster.compnodes[2].host, cluster.compnodes[3].host);
        let kernels: Vec<Kernels> = cluster.compnodes.iter().map(|c| c.kernels).collect();
        assert_eq!(kernels, [Kernels::Fused, Kernels::Fused, Kernels::Plain, Kernels::Plain, Kernels::Plain]);
    }
}
