//! The form of a cluster file: devices, singly or by the dozen, and rules for the links between them.

use std::collections::BTreeSet;
use std::sync::Arc;

use fusionllm_graph::Kernels;
use serde::{Deserialize, Serialize};

use super::{Cluster, CompNodeProfile, Host, LinkProfile, MAX_COMPNODES, Measured};
use crate::PlanError;

/// Bytes in the gigabyte of `memory_gb`.
const GIGABYTE: f64 = 1e9;

/// A cluster file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterFile {
    /// What it describes.
    #[serde(default)]
    pub name: String,
    /// Devices: the sections `[[device]]` of the file.
    #[serde(default)]
    pub device: Vec<DeviceEntry>,
    /// Rules for links; of those that fit a pair the last one counts.
    #[serde(default)]
    pub link: Vec<LinkEntry>,
}

/// One or several devices of one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceEntry {
    /// Name; with `count`, numbers are appended: `gpu-0`, `gpu-1`, ...
    pub name: String,
    /// How many such devices there are.
    #[serde(default = "one")]
    pub count: usize,
    /// Where they stand, for link rules.
    #[serde(default)]
    pub site: String,
    /// Peak speed S in FLOP/s.
    pub flop_per_s: f64,
    /// λ, above 0 and at most 1.
    #[serde(default = "full")]
    pub efficiency: f64,
    /// Speed of the device's memory in GB/s; left out, it bounds nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_gb_per_s: Option<f64>,
    /// Memory that a job may fill, in GB; left out, it is boundless.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_gb: Option<f64>,
    /// How it computes ops of several steps; left out, `fused` if `host` has threads, else `plain`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernels: Option<Kernels>,
    /// The organisation that it belongs to; left out, it stands for itself alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub org: Option<String>,
    /// The machine whose compute it shares with others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Host>,
    /// Seconds of ops, as measured; they go before what follows from the speeds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
}

/// One rule for links.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkEntry {
    /// The sending end: name of a device or of a site, or `*`.
    pub from: String,
    /// The receiving end: name of a device or of a site, or `*`.
    pub to: String,
    /// α, one way, in milliseconds.
    pub latency_ms: f64,
    /// Bandwidth in Mbit/s.
    pub mbit_per_s: f64,
    /// Only from `from` to `to`, not back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub one_way: bool,
}

impl DeviceEntry {
    /// How it computes ops of several steps. Where a file does not say, only a device that computes on its host's threads
    /// is taken for one with fused kernels: a plan that counts too much memory can still be run.
    fn kernels(&self) -> Kernels {
        let is_cpu = self.host.as_ref().is_some_and(|host| host.threads > 0);
        self.kernels.unwrap_or(if is_cpu { Kernels::Fused } else { Kernels::Plain })
    }
}

fn one() -> usize {
    1
}

fn full() -> f64 {
    1.0
}

impl ClusterFile {
    /// A file that describes `cluster`: every device and every direction by itself.
    pub fn of(cluster: &Cluster, name: &str) -> Self {
        let device = |node: &CompNodeProfile| DeviceEntry {
            name: node.name.clone(),
            count: 1,
            site: String::new(),
            flop_per_s: node.flop_per_s,
            efficiency: node.efficiency,
            memory_gb_per_s: node.memory_bytes_per_s.is_finite().then_some(node.memory_bytes_per_s / GIGABYTE),
            memory_gb: (node.memory_bytes < u64::MAX).then_some(node.memory_bytes as f64 / GIGABYTE),
            kernels: Some(node.kernels),
            org: node.org.clone(),
            host: node.host.clone(),
            measured: node.measured.as_deref().cloned(),
        };
        let names = || cluster.compnodes.iter().map(|c| c.name.as_str()).enumerate();
        let pairs = names().flat_map(|a| names().map(move |b| (a, b))).filter(|(a, b)| a.0 != b.0);
        let link = |((a, from), (b, to)): ((usize, &str), (usize, &str))| {
            let link = cluster.link(a, b);
            // A free link has no number that a file could hold.
            let mbit_per_s = (link.bytes_per_s * 8.0 / 1e6).min(1e9);
            let (from, to) = (from.to_owned(), to.to_owned());
            LinkEntry { from, to, latency_ms: link.latency_s * 1e3, mbit_per_s, one_way: true }
        };
        Self {
            name: name.to_owned(),
            device: cluster.compnodes.iter().map(device).collect(),
            link: pairs.map(link).collect(),
        }
    }

    /// The cluster that the file describes.
    ///
    /// # Errors
    /// [`PlanError::ClusterFile`] for a name that is taken or that no device or site has, for a number out of range,
    /// for too many devices, and for a pair without a rule; otherwise as [`Cluster::validate`].
    pub fn resolve(&self) -> Result<Cluster, PlanError> {
        let fail = |reason: String| Err(PlanError::ClusterFile { reason });
        self.check_devices()?;
        let mut compnodes = Vec::new();
        let mut sites = Vec::new();
        let mut names = BTreeSet::new();
        for entry in &self.device {
            let measured = entry.measured.clone().map(Arc::new);
            for index in 0..entry.count {
                let name = if entry.count == 1 { entry.name.clone() } else { format!("{}-{index}", entry.name) };
                if !names.insert(name.clone()) {
                    return fail(format!("two devices are named `{name}`"));
                }
                compnodes.push(CompNodeProfile {
                    name,
                    flop_per_s: entry.flop_per_s,
                    efficiency: entry.efficiency,
                    memory_bytes_per_s: entry.memory_gb_per_s.map_or(f64::INFINITY, |gb| gb * GIGABYTE),
                    memory_bytes: entry.memory_gb.map_or(u64::MAX, |gb| (gb * GIGABYTE) as u64),
                    kernels: entry.kernels(),
                    recompute: false,
                    org: entry.org.clone(),
                    host: entry.host.clone(),
                    measured: measured.clone(),
                });
                sites.push((entry.site.as_str(), entry.name.as_str()));
            }
        }
        for end in self.link.iter().flat_map(|rule| [&rule.from, &rule.to]) {
            let is_group = sites.iter().any(|(site, group)| site == end || group == end);
            if end != "*" && !is_group && !names.contains(end) {
                return fail(format!("a link names `{end}`, which is neither a device nor a site"));
            }
        }
        if compnodes.is_empty() {
            return fail("it has no devices, expected at least one [[device]] with `name` and `flop_per_s`".to_owned());
        }
        let fits =
            |end: &str, i: usize| end == "*" || end == sites[i].0 || end == sites[i].1 || end == compnodes[i].name;
        let mut links = vec![vec![LinkProfile::FREE; compnodes.len()]; compnodes.len()];
        for (a, row) in links.iter_mut().enumerate() {
            for (b, link) in row.iter_mut().enumerate().filter(|(b, _)| *b != a) {
                let rule = self.link.iter().rev().find(|rule| {
                    let there = fits(&rule.from, a) && fits(&rule.to, b);
                    there || (!rule.one_way && fits(&rule.from, b) && fits(&rule.to, a))
                });
                let Some(rule) = rule else {
                    let (a, b) = (&compnodes[a].name, &compnodes[b].name);
                    return fail(format!("no link rule fits `{a}` to `{b}`; one from `*` to `*` fits all"));
                };
                *link = LinkProfile { latency_s: rule.latency_ms / 1e3, bytes_per_s: rule.mbit_per_s * 1e6 / 8.0 };
            }
        }
        let cluster = Cluster { compnodes, links };
        cluster.validate()?;
        self.check_links()?;
        Ok(cluster)
    }

    /// Holds the numbers of all link rules against their ranges, also of those that fit no pair, and looks for rules that are
    /// there twice.
    fn check_links(&self) -> Result<(), PlanError> {
        let mut rules = BTreeSet::new();
        for LinkEntry { from, to, latency_ms, mbit_per_s, one_way } in &self.link {
            if !rules.insert((from, to, one_way)) {
                let reason = format!("two link rules are from `{from}` to `{to}`, and only the last would count");
                return Err(PlanError::ClusterFile { reason });
            }
            let is_above = mbit_per_s.is_finite() && *mbit_per_s > 0.0;
            let (key, value, expected) = match latency_ms.is_finite() && *latency_ms >= 0.0 {
                true if is_above => continue,
                true => ("mbit_per_s", mbit_per_s, "a number above 0"),
                false => ("latency_ms", latency_ms, "a number of at least 0"),
            };
            let reason = format!("link `{from}` to `{to}`: {key} is {value}, expected {expected}");
            return Err(PlanError::ClusterFile { reason });
        }
        Ok(())
    }

    /// Holds names, number and memory of the devices against their ranges, in the file's own words.
    fn check_devices(&self) -> Result<(), PlanError> {
        let fail = |reason: String| Err(PlanError::ClusterFile { reason });
        for DeviceEntry { name, site, org, memory_gb, memory_gb_per_s, .. } in &self.device {
            if name == "*" || site == "*" {
                return fail("a device or a site is named `*`, which means all of them in link rules".to_owned());
            }
            if name.trim().is_empty() || name.chars().any(char::is_control) {
                return fail(format!("a device's name is {name:?}, expected visible characters"));
            }
            if let Some(org) = org.as_ref().filter(|org| org.trim().is_empty() || org.chars().any(char::is_control)) {
                return fail(format!("device `{name}`: org is {org:?}, expected the name of an organisation"));
            }
            for (key, value) in [("memory_gb", memory_gb), ("memory_gb_per_s", memory_gb_per_s)] {
                if let Some(value) = value
                    && !(value.is_finite() && *value > 0.0)
                {
                    return fail(format!("device `{name}`: {key} is {value}, expected a number above 0"));
                }
            }
        }
        let count = self.device.iter().fold(0usize, |sum, entry| sum.saturating_add(entry.count));
        if count > MAX_COMPNODES {
            return fail(format!("it has {count} devices, expected at most {MAX_COMPNODES}"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, count: usize, site: &str) -> DeviceEntry {
        DeviceEntry {
            name: name.to_owned(),
            count,
            site: site.to_owned(),
            flop_per_s: 1e12,
            efficiency: 0.5,
            memory_gb_per_s: None,
            memory_gb: Some(11.0),
            kernels: None,
            org: None,
            host: None,
            measured: None,
        }
    }

    fn rule(from: &str, to: &str, mbit_per_s: f64) -> LinkEntry {
        LinkEntry { from: from.to_owned(), to: to.to_owned(), latency_ms: 10.0, mbit_per_s, one_way: false }
    }

    fn file() -> ClusterFile {
        ClusterFile {
            name: String::new(),
            device: vec![device("gpu", 2, "berlin"), device("old", 1, "tokyo")],
            link: vec![rule("*", "*", 8.0), rule("berlin", "berlin", 1000.0), rule("gpu-1", "tokyo", 80.0)],
        }
    }

    #[test]
    fn the_last_rule_that_fits_counts() {
        let cluster = file().resolve().unwrap();
        let names: Vec<&str> = cluster.compnodes.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["gpu-0", "gpu-1", "old"]);
        assert_eq!(cluster.compnodes[0].memory_bytes, 11_000_000_000);
        let mbit = |a, b| cluster.link(a, b).bytes_per_s * 8.0 / 1e6;
        assert_eq!((mbit(0, 1), mbit(0, 2), mbit(1, 2), mbit(2, 1)), (1000.0, 8.0, 80.0, 80.0));
        assert_eq!(cluster.link(1, 1), LinkProfile::FREE);
    }

    #[test]
    fn a_rule_that_is_there_twice_and_a_name_that_means_all_are_refused() {
        let error = |change: fn(&mut ClusterFile)| {
            let mut file = file();
            change(&mut file);
            file.resolve().unwrap_err().to_string()
        };
        let twice = error(|file| file.link.push(rule("*", "*", 9.0)));
        assert!(twice.contains("two link rules are from `*` to `*`"), "{twice}");
        for named in
            [error(|file| file.device[0].name = "*".to_owned()), error(|file| file.device[0].site = "*".to_owned())]
        {
            assert!(named.contains("named `*`, which means all of them"), "{named}");
        }
        let mut file = file();
        file.link.push(LinkEntry { one_way: true, ..rule("*", "*", 2.0) });
        file.resolve().unwrap();
    }

    #[test]
    fn a_one_way_rule_leaves_the_way_back() {
        let mut file = file();
        file.link.push(LinkEntry { one_way: true, ..rule("old", "gpu-0", 2.0) });
        let cluster = file.resolve().unwrap();
        assert_eq!((cluster.link(2, 0).bytes_per_s, cluster.link(0, 2).bytes_per_s), (0.25e6, 1e6));
    }

    #[test]
    fn a_cluster_written_to_a_file_reads_back_as_it_was() {
        let mut cluster = file().resolve().unwrap();
        cluster.compnodes[0].host = Some(Host { name: "office".to_owned(), lanes: 1.5, threads: 4 });
        let ops = [("add 1 1 > 1".to_owned(), super::super::FpBp { fp_s: 1e-3, bp_s: 2e-3 })];
        let measured = Measured { ops: ops.into(), update_s_per_byte: 1e-9, copy_s_per_byte: 2e-9 };
        cluster.compnodes[0].measured = Some(Arc::new(measured));
        cluster.links[2][0].bytes_per_s = 3e5;
        let text = toml::to_string(&ClusterFile::of(&cluster, "x")).unwrap();
        assert_eq!(toml::from_str::<ClusterFile>(&text).unwrap().resolve().unwrap(), cluster, "{text}");
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let error = |change: fn(&mut ClusterFile)| {
            let mut file = file();
            change(&mut file);
            file.resolve().unwrap_err().to_string()
        };
        assert!(error(|f| f.link[2].to = "paris".to_owned()).contains("`paris`, which is neither a device nor a site"));
        assert!(error(|f| f.link.truncate(0)).contains("no link rule fits `gpu-0` to `gpu-1`"));
        assert!(error(|f| f.device.push(device("gpu-1", 1, ""))).contains("two devices are named `gpu-1`"));
        assert!(error(|f| f.device[0].efficiency = 1.5).contains("`gpu-0` has efficiency 1.5"));
        assert!(error(|f| f.link[0].mbit_per_s = 0.0).contains("link `gpu-0` to `old`"));
        assert!(error(|f| f.device.clear()).contains("neither a device"));
        assert!(error(|f| *f = ClusterFile::default()).contains("at least one [[device]]"));
        assert!(error(|f| f.device[0].count = usize::MAX).contains("devices, expected at most 2048"));
        for gb in [f64::NAN, f64::INFINITY, 0.0, -3.0] {
            let mut file = file();
            file.device[0].memory_gb = Some(gb);
            let error = file.resolve().unwrap_err().to_string();
            assert_eq!(error, format!("device `gpu`: memory_gb is {gb}, expected a number above 0"));
        }
        assert!(error(|f| f.device[0].memory_gb_per_s = Some(0.0)).contains("`gpu`: memory_gb_per_s is 0"));
        assert!(error(|f| f.device[0].name = " ".to_owned()).contains("visible characters"));
    }
}
