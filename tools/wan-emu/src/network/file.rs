//! The form of a network file. It uses the words of the planner's cluster files and reads those too.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{MOST_NODES, Network, Node, pairs};
use crate::error::Error;
use crate::fabric::Access;
use crate::link::{Link, LinkRule};
use crate::preset;

/// A network file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkFile {
    /// What it describes.
    #[serde(default)]
    pub name: String,
    /// Settles all chance: loss and jitter.
    #[serde(default)]
    pub seed: u64,
    /// Largest IP packet.
    #[serde(default = "ethernet")]
    pub mtu: u16,
    /// The nodes; a cluster file calls them devices.
    #[serde(alias = "device")]
    pub node: Vec<NodeEntry>,
    /// Rules for links; of those that fit a pair the last one counts.
    #[serde(default)]
    pub link: Vec<LinkRule>,
    /// What happens while the network is up.
    #[serde(default)]
    pub step: Vec<Step>,
    /// When `wan-emu run` ends by itself, in seconds.
    #[serde(default)]
    pub duration_s: Option<f64>,
}

/// One or several nodes of one kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeEntry {
    /// Name; with `count`, numbers are appended: `gpu-0`, `gpu-1`, ...
    pub name: String,
    /// How many nodes of this kind.
    #[serde(default = "one")]
    pub count: usize,
    /// Where they stand, for link rules.
    #[serde(default)]
    pub site: String,
    /// A preset whose rates bound the node's own access, on top of the links.
    #[serde(default)]
    pub access: Option<String>,
    /// Rate of the node's own uplink, shared by all it sends.
    #[serde(default)]
    pub up_mbit_per_s: Option<f64>,
    /// Rate of the node's own downlink.
    #[serde(default)]
    pub down_mbit_per_s: Option<f64>,
    /// Queue before uplink and downlink, in milliseconds.
    #[serde(default = "hundred")]
    pub access_queue_ms: f64,
    /// What `wan-emu run` starts on it, by `sh -c`.
    #[serde(default)]
    pub run: Option<String>,
    /// For the planner, like the others below; of no use here.
    #[serde(default)]
    pub flop_per_s: Option<f64>,
    /// λ: the share of the peak that matrix products reach.
    #[serde(default)]
    pub efficiency: Option<f64>,
    /// Speed of the device's memory in GB/s.
    #[serde(default)]
    pub memory_gb_per_s: Option<f64>,
    /// Memory in GB.
    #[serde(default)]
    pub memory_gb: Option<f64>,
}

/// What happens at a time: any of a change to links, a command, a kill.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Seconds after the network came up.
    pub at_s: f64,
    /// A change to links.
    #[serde(default)]
    pub link: Option<LinkRule>,
    /// A node whose commands are killed.
    #[serde(default)]
    pub kill: Option<Kill>,
    /// A command to start.
    #[serde(default)]
    pub run: Option<Command>,
}

/// Ends the commands of a node that `run` started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kill {
    /// Name of the node whose commands end.
    pub node: String,
    /// By SIGTERM, which they may catch, instead of SIGKILL.
    #[serde(default)]
    pub gently: bool,
}

/// A command on a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// Name of the node on which it runs.
    pub node: String,
    /// What, by `sh -c`.
    pub command: String,
}

fn ethernet() -> u16 {
    1500
}

fn one() -> usize {
    1
}

fn hundred() -> f64 {
    100.0
}

impl NetworkFile {
    /// The network that the file describes, under the name `name`.
    ///
    /// # Errors
    /// [`Error::Input`].
    pub fn resolve(&self, name: &str) -> Result<Network, Error> {
        let fail = |reason: String| Err(Error::input(reason));
        if name.is_empty() {
            return fail("the network needs a name of letters, digits, `-` or `_`".to_owned());
        }
        if !(576..=9000).contains(&self.mtu) {
            return fail(format!("mtu is {}, expected 576 to 9000", self.mtu));
        }
        if self.duration_s.is_some_and(|seconds| !(0.0..=1e6).contains(&seconds)) {
            return fail("duration_s must be 0 to 1000000".to_owned());
        }
        let mut network = Network {
            name: name.to_owned(),
            seed: self.seed,
            mtu: self.mtu,
            nodes: self.nodes()?,
            links: Vec::new(),
            steps: self.step.clone(),
            duration: self.duration_s.map(Duration::from_secs_f64),
        };
        network.links = self.links(&network)?;
        network.steps.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
        check_steps(&network)?;
        Ok(network)
    }

    fn nodes(&self) -> Result<Vec<Node>, Error> {
        let mut nodes: Vec<Node> = Vec::new();
        let mut names = BTreeSet::new();
        for entry in &self.node {
            for index in 0..entry.count.min(MOST_NODES + 1) {
                let name = if entry.count == 1 { entry.name.clone() } else { format!("{}-{index}", entry.name) };
                check_name(&name)?;
                if !names.insert(name.clone()) {
                    return Err(Error::input(format!("two nodes are named `{name}`")));
                }
                nodes.push(Node {
                    name,
                    group: entry.name.clone(),
                    site: entry.site.clone(),
                    address: Ipv4Addr::new(10, 77, 0, nodes.len() as u8 + 1),
                    access: entry.access()?,
                    run: entry.run.clone(),
                });
            }
        }
        if !(2..=MOST_NODES).contains(&nodes.len()) {
            return Err(Error::input(format!("{} nodes, expected 2 to {MOST_NODES}", nodes.len())));
        }
        Ok(nodes)
    }

    fn links(&self, network: &Network) -> Result<Vec<Link>, Error> {
        for rule in &self.link {
            network.check_ends(rule)?;
            // Also a rule that another one hides has to be sound.
            rule.link(false)?;
        }
        let nodes = &network.nodes;
        let mut links = vec![Link::default(); nodes.len() * nodes.len()];
        for (from, to) in pairs(nodes.len()) {
            let rule = self.link.iter().rev().find_map(|rule| Some((rule, network.fits(rule, from, to)?)));
            let Some((rule, back)) = rule else {
                let (a, b) = (&nodes[from].name, &nodes[to].name);
                return Err(Error::input(format!("no link rule fits `{a}` to `{b}`; one from `*` to `*` fits all")));
            };
            links[from * nodes.len() + to] = rule.link(back)?;
        }
        Ok(links)
    }
}

impl NodeEntry {
    fn access(&self) -> Result<Access, Error> {
        let preset = self.access.as_deref().map(preset::find).transpose()?;
        let rate = |what: &str, asked: Option<f64>, preset: Option<f64>| match asked.or(preset) {
            Some(mbit) if !(0.001..=100_000.0).contains(&mbit) => {
                Err(Error::input(format!("node `{}` has {what} = {mbit}, expected 0.001 to 100000", self.name)))
            }
            rate => Ok(rate.map(|mbit| mbit * 1e6)),
        };
        if !(0.0..=10_000.0).contains(&self.access_queue_ms) {
            let got = self.access_queue_ms;
            return Err(Error::input(format!("node `{}` has access_queue_ms = {got}, expected 0 to 10000", self.name)));
        }
        Ok(Access {
            up: rate("up_mbit_per_s", self.up_mbit_per_s, preset.map(|preset| preset.mbit_per_s))?,
            down: rate("down_mbit_per_s", self.down_mbit_per_s, preset.map(|preset| preset.back_mbit_per_s))?,
            queue: Duration::from_secs_f64(self.access_queue_ms / 1e3),
        })
    }
}

fn check_name(name: &str) -> Result<(), Error> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > 40 || !name.chars().all(good) {
        return Err(Error::input(format!("node name `{name}` must be 1 to 40 letters, digits, `-`, `_` or `.`")));
    }
    Ok(())
}

/// Plays the steps' changes on a copy, so that a scenario does not fail half way.
fn check_steps(network: &Network) -> Result<(), Error> {
    let mut copy = network.clone();
    for step in &network.steps {
        let at = step.at_s;
        let fail = |error: Error| Error::input(format!("step at_s = {at}: {error}"));
        if !(0.0..=1e6).contains(&at) {
            return Err(Error::input(format!("a step has at_s = {at}, expected 0 to 1000000")));
        }
        if step.link.is_none() && step.kill.is_none() && step.run.is_none() {
            return Err(fail(Error::input("needs `link`, `kill` or `run`")));
        }
        if let Some(rule) = &step.link {
            copy.change(rule).map_err(fail)?;
        }
        let nodes = step.kill.iter().map(|kill| &kill.node).chain(step.run.iter().map(|run| &run.node));
        for node in nodes {
            copy.node(node).map_err(fail)?;
        }
    }
    Ok(())
}
