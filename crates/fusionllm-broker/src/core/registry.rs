//! Who has joined, and who works on what.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use fusionllm_planner::Cluster;
use fusionllm_protocol::{CompNodeSummary, DeviceProfile, MachineReport, PeerRecord, RunKey};

use super::detector::Rhythm;
use super::{ConnectionId, Joining};

/// A CompNode that is connected.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) name: String,
    pub(super) run: Option<RunKey>,
    /// The name that it asked for.
    wanted: String,
    id: String,
    device: String,
    org: Option<String>,
    addr: PeerRecord,
    profile: DeviceProfile,
    rhythm: Rhythm,
    key: [u8; 32],
    /// Why its connection broke, until it has another.
    away: Option<String>,
    joined: Duration,
    /// Since when it is about to leave, if it is.
    leaving: Option<Duration>,
}

impl Member {
    /// Whether both are processes of one machine: by the machine's own word, which changes when it is started again, or
    /// by its addresses.
    fn is_beside(&self, other: &Self) -> bool {
        let ips = |member: &Self| -> BTreeSet<IpAddr> {
            let ips = member.addr.addrs.iter().map(|addr| addr.ip().to_canonical());
            ips.filter(|ip| !ip.is_loopback() && !ip.is_unspecified()).collect()
        };
        let own = ips(self);
        self.profile.host == other.profile.host || (!own.is_empty() && own == ips(other))
    }
}

/// All of them, by connection and thus in the order in which they joined.
#[derive(Debug, Default)]
pub(super) struct Registry(BTreeMap<ConnectionId, Member>);

impl Registry {
    /// Adds a CompNode under its name, or if that is taken, under one with a number.
    pub(super) fn join(&mut self, connection: ConnectionId, joining: Joining, now: Duration) {
        let Joining { name: wanted, id, key, device, org, addr, profile, standing: _ } = joining;
        let is_free = |name: &String| self.0.values().all(|m| m.name != *name);
        let numbered = (2..).map(|n| format!("{wanted}-{n}"));
        let name = std::iter::once(wanted.clone()).chain(numbered).find(is_free).unwrap_or_else(|| wanted.clone());
        let run = None;
        let member = Member {
            name,
            run,
            wanted,
            id,
            device,
            org,
            addr,
            profile,
            rhythm: Rhythm::new(now),
            key,
            away: None,
            joined: now,
            leaving: None,
        };
        self.0.insert(connection, member);
    }

    /// Takes a CompNode out. Whoever waits for its name on the same machine, as its own process that was started again, has
    /// it from now on. Another machine that asked for the same name does not: it may have other data under the same paths.
    pub(super) fn remove(&mut self, connection: ConnectionId) -> Option<Member> {
        let gone = self.0.remove(&connection)?;
        let waits =
            |m: &&mut Member| m.run.is_none() && m.wanted == gone.name && m.name != gone.name && m.is_beside(&gone);
        if let Some(heir) = self.0.values_mut().find(waits) {
            heir.name.clone_from(&gone.name);
        }
        Some(gone)
    }

    /// Whether a process like it has joined on the same machine since its last sign of life: it was started again.
    pub(super) fn is_replaced(&self, connection: ConnectionId, now: Duration) -> bool {
        let Some(member) = self.0.get(&connection) else { return false };
        let last = now.saturating_sub(member.rhythm.silence(now));
        let others = self.0.iter().filter(|(other, _)| **other != connection).map(|(_, other)| other);
        others
            .filter(|other| other.wanted == member.wanted && other.joined >= last)
            .any(|other| other.is_beside(member))
    }

    /// A sign of life. Whether the CompNode is known.
    pub(super) fn seen(&mut self, connection: ConnectionId, at: Duration) -> bool {
        self.0.get_mut(&connection).map(|m| m.rhythm.seen(at)).is_some()
    }

    /// A heartbeat.
    pub(super) fn beat(&mut self, connection: ConnectionId, at: Duration) {
        if let Some(member) = self.0.get_mut(&connection) {
            member.rhythm.beat(at);
        }
    }

    /// How unlike a CompNode its present silence is, see [`Rhythm::phi`]; 0 for one that is not here.
    pub(super) fn phi(&self, connection: ConnectionId, now: Duration) -> f64 {
        self.0.get(&connection).map_or(0.0, |m| m.rhythm.phi(now))
    }

    /// For how long a CompNode has given no sign of life.
    pub(super) fn silence(&self, connection: ConnectionId, now: Duration) -> Duration {
        self.0.get(&connection).map_or(Duration::ZERO, |m| m.rhythm.silence(now))
    }

    /// Who has given no sign of life for longer than that, and why, if that is known.
    pub(super) fn silent_for(&self, limit: Duration, now: Duration) -> Vec<(ConnectionId, Option<String>)> {
        self.0.iter().filter(|(_, m)| m.rhythm.silence(now) > limit).map(|(&c, m)| (c, m.away.clone())).collect()
    }

    /// Nobody could give a sign of life for so long.
    pub(super) fn forgive(&mut self, pause: Duration) {
        for member in self.0.values_mut() {
            member.rhythm.forgive(pause);
        }
    }

    /// So much memory is free there now: the next job is planned with it. Whether that is more than before.
    pub(super) fn has_room(&mut self, connection: ConnectionId, bytes: u64) -> bool {
        let Some(member) = self.0.get_mut(&connection) else { return false };
        member.profile.memory_bytes.replace(bytes).is_some_and(|before| bytes > before)
    }

    /// Its connection broke. Whether it is one that may come back to what it was doing.
    pub(super) fn broke(&mut self, connection: ConnectionId, reason: String) -> bool {
        let member = self.0.get_mut(&connection).filter(|m| m.run.is_some());
        member.map(|m| m.away = Some(reason)).is_some()
    }

    /// It has a connection again.
    pub(super) fn is_back(&mut self, connection: ConnectionId, addr: PeerRecord, now: Duration) -> Option<String> {
        let member = self.0.get_mut(&connection)?;
        (member.away, member.addr) = (None, addr);
        member.rhythm.resume(now);
        Some(member.name.clone())
    }

    /// Whether it is connected.
    pub(super) fn is_here(&self, connection: ConnectionId) -> bool {
        self.0.get(&connection).is_some_and(|m| m.away.is_none())
    }

    /// It gets no work any more. The run that it works for.
    pub(super) fn leave(&mut self, connection: ConnectionId, now: Duration) -> Option<RunKey> {
        let member = self.0.get_mut(&connection)?;
        member.leaving.get_or_insert(now);
        member.run
    }

    pub(super) fn is_leaving(&self, connection: ConnectionId) -> bool {
        self.0.get(&connection).is_some_and(|m| m.leaving.is_some())
    }

    /// Whether it is here, and not about to leave.
    pub(super) fn stays(&self, connection: ConnectionId) -> bool {
        self.is_here(connection) && !self.is_leaving(connection)
    }

    /// Those that are about to leave and have no work left, and since when.
    pub(super) fn ready_to_leave(&self) -> Vec<(ConnectionId, Duration)> {
        let is_ready = |m: &Member| m.run.is_none() && m.away.is_none();
        self.0.iter().filter(|(_, m)| is_ready(m)).filter_map(|(&c, m)| Some((c, m.leaving?))).collect()
    }

    pub(super) fn is_away(&self, connection: ConnectionId) -> bool {
        self.0.get(&connection).is_some_and(|m| m.away.is_some())
    }

    /// The CompNode with this key, if it is here or may come back.
    pub(super) fn of_key(&self, key: &[u8; 32]) -> Option<ConnectionId> {
        self.0.iter().rev().find(|(_, m)| m.key == *key).map(|(&c, _)| c)
    }

    pub(super) fn idle(&self) -> Vec<ConnectionId> {
        self.0.iter().filter(|(_, m)| m.run.is_none() && m.leaving.is_none()).map(|(&c, _)| c).collect()
    }

    /// Those that are idle, and joined that long ago.
    pub(super) fn idle_since(&self, ago: Duration, now: Duration) -> Vec<ConnectionId> {
        let is_settled = |c: &ConnectionId| self.0.get(c).is_some_and(|m| now.saturating_sub(m.joined) >= ago);
        self.idle().into_iter().filter(is_settled).collect()
    }

    pub(super) fn is_idle(&self, connection: ConnectionId) -> bool {
        self.0.get(&connection).is_some_and(|m| m.run.is_none() && m.leaving.is_none())
    }

    pub(super) fn take(&mut self, connection: ConnectionId, run: RunKey) {
        if let Some(member) = self.0.get_mut(&connection) {
            member.run = Some(run);
        }
    }

    /// Makes a CompNode idle; one that is away has nothing left to come back to. Whether it is still here.
    pub(super) fn release(&mut self, connection: ConnectionId) -> bool {
        if self.is_away(connection) {
            self.remove(connection);
        }
        self.0.get_mut(&connection).map(|m| m.run = None).is_some()
    }

    pub(super) fn name(&self, connection: ConnectionId) -> String {
        self.0.get(&connection).map_or_else(|| "unknown".to_owned(), |m| m.name.clone())
    }

    /// Gives a CompNode this name; another that has it gets this one's.
    pub(super) fn rename(&mut self, connection: ConnectionId, name: &str) {
        let before = self.name(connection);
        let other = self.0.iter().find(|(_, m)| m.name == *name).map(|(&other, _)| other);
        for (who, name) in [(other, before.as_str()), (Some(connection), name)] {
            if let Some(member) = who.and_then(|who| self.0.get_mut(&who)) {
                name.clone_into(&mut member.name);
            }
        }
    }

    /// Its public key.
    pub(super) fn key(&self, connection: ConnectionId) -> [u8; 32] {
        self.0.get(&connection).map_or([0; 32], |m| m.key)
    }

    /// What it is at work on.
    pub(super) fn run_of(&self, connection: ConnectionId) -> Option<RunKey> {
        self.0.get(&connection)?.run
    }

    /// The machine that a CompNode runs on.
    pub(super) fn host(&self, connection: ConnectionId) -> &str {
        self.0.get(&connection).map_or("", |m| &m.profile.host)
    }

    /// Bytes that jobs may fill on the largest of all devices; nothing if there is none, or if one has no bound.
    pub(super) fn largest_memory(&self) -> Option<u64> {
        let memory: Option<Vec<u64>> = self.0.values().map(|m| m.profile.memory_bytes).collect();
        memory?.into_iter().max()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = ConnectionId> + '_ {
        self.0.keys().copied()
    }

    /// A CompNode in an inventory, without what belongs to a job.
    pub(super) fn report(&self, connection: ConnectionId) -> Option<MachineReport> {
        self.0.get(&connection).map(|m| MachineReport {
            name: m.name.clone(),
            id: m.id.clone(),
            device: m.device.clone(),
            job: m.run.map(|key| key.job),
            org: m.org.clone(),
            profile: m.profile.clone(),
            measured: None,
            efficiency: None,
        })
    }

    /// The cluster of a file, whose devices the CompNodes stand for in their order.
    pub(super) fn as_if(&self, cluster: &Cluster, members: &[ConnectionId]) -> Cluster {
        let first: Vec<usize> = (0..members.len()).collect();
        let mut cluster = cluster.select(&first);
        for (profile, &member) in cluster.compnodes.iter_mut().zip(members) {
            profile.name = self.name(member);
            // What a machine says of itself goes before the file.
            let own = self.0.get(&member).and_then(|m| m.org.clone());
            profile.org = own.or(profile.org.take());
        }
        cluster
    }

    pub(super) fn addr(&self, connection: ConnectionId) -> PeerRecord {
        let unknown = || PeerRecord { id: [0; 32], addrs: Vec::new() };
        self.0.get(&connection).map_or_else(unknown, |m| m.addr.clone())
    }

    pub(super) fn summaries(&self) -> Vec<CompNodeSummary> {
        let summary = |m: &Member| CompNodeSummary {
            name: m.name.clone(),
            id: m.id.clone(),
            device: m.device.clone(),
            org: m.org.clone(),
            job: m.run.map(|key| key.job),
            is_leaving: m.leaving.is_some(),
        };
        self.0.values().map(summary).collect()
    }
}
