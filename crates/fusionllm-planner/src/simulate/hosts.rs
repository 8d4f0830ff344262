//! Machines whose cores several CompNodes share, with each other and with what handles messages: who computes how
//! fast, and what ends next.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};

use crate::Cluster;

/// A task with less of its seconds left than this has ended: what is left is rounding.
const ROUNDING: f64 = 1e-9;

/// What happens at a time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Turn {
    /// A CompNode begins its next task.
    Begin(usize),
    /// The next task on a host may have ended; it has, if the host's version is still this one.
    Host(usize, u64),
    /// Handling a message begins to take this share of a host's lanes, for so many seconds at full speed.
    Handle { host: usize, lanes: f64, seconds: f64 },
}

/// What is to come, the earliest first; of equal times what was added first.
#[derive(Debug, Default)]
pub(super) struct Agenda {
    heap: BinaryHeap<Entry>,
    count: u64,
}

#[derive(Debug)]
struct Entry {
    at_s: f64,
    number: u64,
    turn: Turn,
}

impl Agenda {
    pub(super) fn add(&mut self, at_s: f64, turn: Turn) {
        self.heap.push(Entry { at_s, number: self.count, turn });
        self.count += 1;
    }

    pub(super) fn next(&mut self) -> Option<(f64, Turn)> {
        self.heap.pop().map(|e| (e.at_s, e.turn))
    }
}

impl Ord for Entry {
    /// The heap gives the greatest first, so an earlier one is greater.
    fn cmp(&self, other: &Self) -> Ordering {
        other.at_s.total_cmp(&self.at_s).then(other.number.cmp(&self.number))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Entry {}

/// All machines. A CompNode with a device of its own is one by itself.
#[derive(Debug)]
pub(super) struct Hosts {
    of_node: Vec<usize>,
    hosts: Vec<Host>,
}

#[derive(Debug)]
struct Host {
    lanes: f64,
    /// What handling a message takes of a lane; nothing where a device computes that does not handle messages.
    share: Option<f64>,
    members: usize,
    running: Vec<Running>,
    /// Until when `running` is worked off.
    at_s: f64,
    version: u64,
}

#[derive(Debug)]
struct Running {
    /// Who computes; nothing: a message is handled.
    node: Option<usize>,
    /// Lanes that it would fill.
    lanes: f64,
    /// Seconds at full speed.
    left_s: f64,
}

impl Hosts {
    pub(super) fn new(cluster: &Cluster) -> Self {
        let mut by_name: BTreeMap<&str, usize> = BTreeMap::new();
        let mut hosts: Vec<Host> = Vec::new();
        let mut of_node = Vec::with_capacity(cluster.compnodes.len());
        for node in &cluster.compnodes {
            let known = node.host.as_ref().and_then(|host| by_name.get(host.name.as_str()).copied());
            let index = known.unwrap_or(hosts.len());
            if known.is_none() {
                let lanes = node.host.as_ref().map_or(1.0, |h| h.lanes);
                let share = node.host.as_ref().filter(|h| h.threads > 0).map(|h| 1.0 / f64::from(h.threads));
                hosts.push(Host { lanes, share, members: 0, running: Vec::new(), at_s: 0.0, version: 0 });
                by_name.extend(node.host.as_ref().map(|h| (h.name.as_str(), index)));
            }
            hosts[index].members += 1;
            of_node.push(index);
        }
        Self { of_node, hosts }
    }

    /// How many times slower a CompNode computes when all that share its machine do.
    pub(super) fn slowdown(&self, node: usize) -> f64 {
        let host = &self.hosts[self.of_node[node]];
        (host.members as f64 / host.lanes).max(1.0)
    }

    /// A CompNode begins `seconds` of work.
    pub(super) fn begin(&mut self, node: usize, seconds: f64, now_s: f64, agenda: &mut Agenda) {
        let running = Running { node: Some(node), lanes: 1.0, left_s: seconds };
        self.add(self.of_node[node], running, now_s, agenda);
    }

    /// From `at_s` on a message of a CompNode takes `seconds` of a core, if that is one that computes.
    pub(super) fn call_handler(&self, node: usize, seconds: f64, at_s: f64, agenda: &mut Agenda) {
        let host = self.of_node[node];
        if let Some(lanes) = self.hosts[host].share {
            agenda.add(at_s, Turn::Handle { host, lanes, seconds });
        }
    }

    /// Handling a message begins.
    pub(super) fn handle(&mut self, host: usize, lanes: f64, seconds: f64, now_s: f64, agenda: &mut Agenda) {
        self.add(host, Running { node: None, lanes, left_s: seconds }, now_s, agenda);
    }

    fn add(&mut self, index: usize, running: Running, now_s: f64, agenda: &mut Agenda) {
        let host = &mut self.hosts[index];
        host.work_off(now_s);
        host.running.push(running);
        host.look_ahead(index, agenda);
    }

    /// The CompNodes whose work has ended; none if something has changed since this turn was put down.
    pub(super) fn ended(&mut self, index: usize, version: u64, now_s: f64, agenda: &mut Agenda) -> Vec<usize> {
        let host = &mut self.hosts[index];
        if host.version != version {
            return Vec::new();
        }
        host.work_off(now_s);
        let least = host.running.iter().map(|r| r.left_s).fold(f64::INFINITY, f64::min);
        let ended = host.running.extract_if(.., |r| r.left_s <= least.max(0.0) + ROUNDING * now_s);
        let ended = ended.filter_map(|r| r.node).collect();
        host.look_ahead(index, agenda);
        ended
    }
}

impl Host {
    fn rate(&self) -> f64 {
        let wanted: f64 = self.running.iter().map(|r| r.lanes).sum();
        if wanted > self.lanes { self.lanes / wanted } else { 1.0 }
    }

    fn work_off(&mut self, now_s: f64) {
        let done = (now_s - self.at_s) * self.rate();
        self.running.iter_mut().for_each(|r| r.left_s -= done);
        self.at_s = now_s;
    }

    fn look_ahead(&mut self, index: usize, agenda: &mut Agenda) {
        self.version += 1;
        if let Some(least) = self.running.iter().map(|r| r.left_s.max(0.0)).reduce(f64::min) {
            agenda.add(self.at_s + least / self.rate(), Turn::Host(index, self.version));
        }
    }
}
