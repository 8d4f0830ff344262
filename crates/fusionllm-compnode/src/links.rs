//! The wires of one job: one connection per CompNode pair, a stream per channel.
//!
//! The CompNode with the lower index dials. A lost connection is redialled, and each stream goes on where the
//! receiver says it stopped ([`fusionllm_protocol::SendWindow`]). Encoding and decoding run on blocking threads,
//! never on the compute thread and never on an async worker.

mod attempts;
mod bounds;
mod breach;
mod dialling;
mod hearing;
mod incoming;
mod meter;
mod outgoing;
mod tasks;
mod workers;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use fusionllm_codec::HostTensor;
use fusionllm_planner::{NodeIndex, Placement, Route, SHARED_WINDOW};
use fusionllm_protocol::{
    Assignment, Channel, LinkBytes, LinkSpeed, PeerFrame, PeerRecord, RunKey, StepRules, encoded_len,
};
use fusionllm_transport::{ConnectError, Endpoint, PeerAddr, PeerId, RelayState, Session};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};

use crate::ExchangeError;
use crate::channel_codec::{ChannelEncoder, ChannelOptions, Found};
use crate::exchange::{Exchange, LinkTally, Message};
use crate::mailbox::{Arrived, Mailbox, Slot};
use crate::snapshots::SnapshotStore;
pub(crate) use bounds::EdgeTensors;
use hearing::Heard;
use incoming::{Incoming, Line};
use meter::Meter;
use outgoing::Outgoing;
use tasks::{OpenChannel, Tasks};
use workers::Workers;

/// A peer that cannot be reached for this long is lost: longer than a home router's restart of its uplink.
const REDIAL_LIMIT: Duration = Duration::from_secs(45);
/// First and largest pause between two dials.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(1));
/// Two frame lengths on the wire, for header and payload.
const FRAME_LENGTH_BYTES: u64 = 16;
/// Largest control frame between CompNodes; a header is far below.
const CONTROL_FRAME_BYTES: u64 = 64 << 10;

/// Priority of streams that carry a few bytes for which a CompNode waits.
const URGENT: i32 = 1;

/// Everything that two tasks of a job's wires share.
///
/// No task holds two of its locks at once. `incoming` and `found`, as the locks within an `Incoming`, are held for a few
/// lines and never over an await. Only `dialling[peer]` is: until that peer is connected or given up, so that one task waits
/// for it and the others find what comes of that.
#[derive(Debug)]
pub struct JobLinks {
    pub(crate) key: RunKey,
    pub(crate) node: NodeIndex,
    pub(crate) placement: Arc<Placement>,
    pub(crate) mailbox: Arc<Mailbox>,
    endpoint: Endpoint,
    /// Where each is, which may change.
    peers: Vec<watch::Sender<PeerAddr>>,
    sessions: Vec<watch::Sender<Option<Session>>>,
    dialling: Vec<tokio::sync::Mutex<()>>,
    incoming: Mutex<BTreeMap<Channel, Arc<Incoming>>>,
    tasks: Tasks,
    workers: Workers,
    /// Outgoing channels that still hold messages.
    open_channels: Arc<watch::Sender<usize>>,
    /// What the encoders found, until the next step report.
    found: Mutex<Vec<(NodeIndex, Found)>>,
    /// By peer, what is coming in.
    meters: Vec<Meter>,
    /// By peer, when something last came.
    heard: Vec<Heard>,
    options: ChannelOptions,
    rules: StepRules,
    /// What flows over edges, once the OP-DAG has been read.
    tensors: OnceLock<EdgeTensors>,
    /// What others may fetch of this job.
    snapshots: Option<Arc<SnapshotStore>>,
}

impl JobLinks {
    /// The wires of an assigned job, from `endpoint`; nothing is dialled yet.
    pub fn new(endpoint: Endpoint, assignment: &Assignment) -> Arc<Self> {
        Self::with_workers(endpoint, assignment, Workers::default(), None)
    }

    /// The same, over which the job's CompNodes may fetch the snapshots that are here, too.
    pub(crate) fn lending(endpoint: Endpoint, assignment: &Assignment, snapshots: Arc<SnapshotStore>) -> Arc<Self> {
        Self::with_workers(endpoint, assignment, Workers::default(), Some(snapshots))
    }

    fn with_workers(
        endpoint: Endpoint,
        assignment: &Assignment,
        workers: Workers,
        snapshots: Option<Arc<SnapshotStore>>,
    ) -> Arc<Self> {
        let peers = &assignment.peers;
        let mailbox = Arc::new(Mailbox::default());
        Arc::new(Self {
            key: assignment.key,
            node: assignment.node,
            placement: Arc::new(assignment.placement.clone()),
            tasks: Tasks::new(Arc::clone(&mailbox)),
            workers,
            mailbox,
            endpoint,
            peers: peers.iter().map(|peer| watch::Sender::new(peer_addr(peer))).collect(),
            sessions: peers.iter().map(|_| watch::Sender::new(None)).collect(),
            dialling: peers.iter().map(|_| tokio::sync::Mutex::new(())).collect(),
            incoming: Mutex::new(BTreeMap::new()),
            open_channels: Arc::new(watch::Sender::new(0)),
            found: Mutex::default(),
            meters: peers.iter().map(|_| Meter::default()).collect(),
            heard: peers.iter().map(|_| Heard::default()).collect(),
            options: ChannelOptions::of(&assignment.job.compression),
            rules: StepRules::of(&assignment.job, assignment.start_step),
            tensors: OnceLock::new(),
            snapshots,
        })
    }

    /// From now on messages must have the shapes and types that the OP-DAG gives them.
    pub(crate) fn expect(&self, tensors: EdgeTensors) {
        // A job has one OP-DAG, so a second call says the same.
        let _ = self.tensors.set(tensors);
    }

    /// Ends everything: waiting takes give `reason`, tasks stop, connections close, and nothing begins any more.
    pub fn abort(&self, reason: &str) {
        self.mailbox.close(ExchangeError::Aborted { reason: reason.to_owned() });
        self.tasks.close();
        for slot in &self.sessions {
            if let Some(session) = slot.send_replace(None) {
                session.close(0, reason);
            }
        }
    }

    /// A connection that a peer has opened. Connections of strangers are dropped.
    pub fn accept(self: &Arc<Self>, session: Session) {
        match self.peers.iter().position(|p| p.borrow().id == session.peer()) {
            Some(peer) => self.install(peer, session),
            None => session.close(403, "not of this job"),
        }
    }

    /// A peer is elsewhere from now on: the next dial goes there.
    pub(crate) fn moved(&self, peer: NodeIndex, record: &PeerRecord) {
        let moved = peer_addr(record);
        if let Some(addr) = self.peers.get(peer.index()) {
            // Its key is what it is known by, and stays.
            addr.send_if_modified(|addr| addr.id == moved.id && std::mem::replace(addr, moved) != *addr);
        }
    }

    /// Waits until every message was taken by its receiver, or nothing is sent any more.
    pub async fn drained(&self) {
        let mut open = self.open_channels.subscribe();
        // The sender lives as long as self, so this cannot end early.
        let _ = open.wait_for(|&n| n == 0).await;
    }

    pub(crate) fn name_of(&self, node: usize) -> String {
        self.placement.compnodes.get(node).cloned().unwrap_or_else(|| format!("CompNode {node}"))
    }

    /// How long ago a packet last came from a peer; nothing if none ever came, and it may still be on its way here.
    pub(crate) fn heard(&self, peer: NodeIndex) -> Option<Duration> {
        self.heard.get(peer.index())?.ago()
    }

    /// The connection to a peer, if there is one now.
    pub(crate) fn session_with(&self, peer: PeerId) -> Option<Session> {
        let at = self.peers.iter().position(|addr| addr.borrow().id == peer)?;
        self.sessions.get(at)?.borrow().clone()
    }

    /// Runs a task that ends with the job.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task);
    }

    fn fail(&self, peer: usize, reason: &str) {
        let peer = self.name_of(peer);
        self.mailbox.close(ExchangeError::Peer { peer, reason: reason.to_owned() });
    }

    fn install(self: &Arc<Self>, peer: usize, session: Session) {
        let Some(slot) = self.sessions.get(peer) else { return };
        if let Some(replaced) = slot.send_replace(Some(session.clone())) {
            // Who dials again has lost it.
            replaced.close(0, "replaced by a newer connection");
        }
        if self.tasks.is_closed() {
            session.close(0, "the job has ended");
        }
        session.allow_streams(self.streams_from(peer));
        let links = Arc::clone(self);
        let line = Line::new(session.clone());
        self.spawn(async move {
            while let Ok((sink, source)) = line.session.accept_bi().await {
                let (stream, line) = (Arc::clone(&links), line.clone());
                links.spawn(async move { incoming::serve(&stream, peer, &line, sink, source).await });
            }
        });
        let links = Arc::clone(self);
        self.spawn(async move {
            let (Some(slot), Some(heard)) = (links.sessions.get(peer), links.heard.get(peer)) else { return };
            let reason = heard.watch(&session).await;
            tracing::debug!(peer = links.name_of(peer), reason = %reason.reason, "connection closed");
            // Only if no newer one took its place.
            slot.send_if_modified(|current| {
                let same = current.as_ref().is_some_and(|c| c.is_same(&session));
                if same {
                    *current = None;
                }
                same
            });
        });
    }

    fn incoming(&self, channel: Channel) -> Arc<Incoming> {
        let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Incoming::new(self.options, channel));
        Arc::clone(incoming.entry(channel).or_insert_with(new))
    }

    /// Messages of a channel that are encoded and not yet taken by the receiver's task loop, at the most.
    fn window(&self, channel: Channel) -> usize {
        match channel {
            Channel::Shared { .. } => SHARED_WINDOW as usize,
            _ => self.placement.window() as usize,
        }
    }

    /// Messages of a channel that wait to be encoded, at the most.
    fn queued(&self, channel: Channel) -> usize {
        match channel {
            Channel::Shared { .. } => 1,
            _ => self.placement.window() as usize,
        }
    }

    fn found(&self, to: usize, found: Found) {
        let to = NodeIndex(u32::try_from(to).unwrap_or(u32::MAX));
        self.found.lock().unwrap_or_else(PoisonError::into_inner).push((to, found));
    }

    /// Streams that a peer may have open: one for each of its channels, and one more for each that it opens again before
    /// the lost one is known to have ended.
    fn streams_from(&self, peer: usize) -> u32 {
        let from = NodeIndex(u32::try_from(peer).unwrap_or(u32::MAX));
        let is_ours = |(_, route): &(Channel, Route)| *route == Route { from, to: self.node };
        let channels = Channel::all(&self.placement, self.rules.clip.is_some()).filter(is_ours);
        // And one for a snapshot.
        u32::try_from(2 * (channels.count() + 1)).unwrap_or(u32::MAX)
    }

    /// Who sends over a channel that ends here; nothing if it does not end here.
    fn sender_of(&self, channel: Channel) -> Option<NodeIndex> {
        let mut all = Channel::all(&self.placement, self.rules.clip.is_some());
        all.find(|(known, route)| *known == channel && route.to == self.node).map(|(_, route)| route.from)
    }
}

/// Where a peer is, from its record.
pub(crate) fn peer_addr(record: &PeerRecord) -> PeerAddr {
    PeerAddr { id: PeerId::from_bytes(record.id), addrs: record.addrs.clone() }
}

/// Why a peer is not reached, and what would help.
pub(crate) fn unreached(error: &ConnectError) -> String {
    match error {
        ConnectError::Unreachable { relay: RelayState::None, addrs, .. }
            if !addrs.iter().all(|a| a.ip().is_loopback()) =>
        {
            format!("{error}; where a router is between the two, a relay lets them meet: `fusionllm broker --relay`")
        }
        error => error.to_string(),
    }
}

/// A peer's record for the broker.
pub(crate) fn peer_record(addr: &PeerAddr) -> PeerRecord {
    let addrs: Vec<SocketAddr> = addr.addrs.clone();
    PeerRecord { id: *addr.id.as_bytes(), addrs }
}

/// The task loop's end of a job's wires.
#[derive(Debug)]
pub struct NetworkExchange {
    links: Arc<JobLinks>,
    runtime: Handle,
    /// By receiver, too: several may get what one channel carries.
    queues: BTreeMap<(NodeIndex, Channel), mpsc::Sender<Outgoing>>,
    tally: LinkTally,
    /// Of a checkpoint, until their channels are opened.
    residuals: BTreeMap<Channel, HostTensor>,
}

impl NetworkExchange {
    /// The exchange of the CompNode whose wires these are. Its streams live on `runtime`.
    pub fn new(links: Arc<JobLinks>, runtime: Handle) -> Self {
        let tally = LinkTally::new(links.placement.compnodes.clone(), links.node);
        Self { links, runtime, queues: BTreeMap::new(), tally, residuals: BTreeMap::new() }
    }

    /// Why nothing can be sent any more.
    fn closed(&self) -> ExchangeError {
        let stopped = || ExchangeError::Aborted { reason: "the job's wires are closed".to_owned() };
        self.links.mailbox.closed().unwrap_or_else(stopped)
    }

    /// Counts a message, and gives the queue that it goes into.
    fn queue_for(&mut self, message: &Message) -> Result<&mpsc::Sender<Outgoing>, ExchangeError> {
        let header = PeerFrame::Message { number: 0, header: outgoing::header_of(message) };
        let header_bytes = encoded_len(&header).unwrap_or_default() + FRAME_LENGTH_BYTES;
        self.tally.add(message, header_bytes)?;
        Ok(self.queue(message.to, message.slot.channel))
    }

    /// The queue of a channel to a receiver; the first message opens it.
    fn queue(&mut self, to: NodeIndex, channel: Channel) -> &mpsc::Sender<Outgoing> {
        self.queues.entry((to, channel)).or_insert_with(|| {
            let mut encoder = ChannelEncoder::new(self.links.options, channel);
            if let Some(residual) = self.residuals.remove(&channel) {
                encoder.restore(residual);
            }
            let (sender, queue) = mpsc::channel(self.links.queued(channel));
            let links = Arc::clone(&self.links);
            let _context = self.runtime.enter();
            let open = OpenChannel::new(&links.open_channels);
            self.links.spawn(async move {
                let _open = open;
                let peer = to.index();
                if let Err(error) = outgoing::run(&links, peer, channel, queue, encoder).await {
                    links.mailbox.close(error);
                }
            });
            sender
        })
    }
}

impl Exchange for NetworkExchange {
    fn send(&mut self, message: Message) -> Result<(), ExchangeError> {
        let sent = self.queue_for(&message)?.blocking_send(Outgoing::Message(message));
        sent.map_err(|_| self.closed())
    }

    fn receive(&mut self, slot: Slot) -> Result<Arrived, ExchangeError> {
        let arrived = self.links.mailbox.take(slot)?;
        self.links.incoming(slot.channel).confirm_one();
        Ok(arrived)
    }

    fn receive_now(&mut self, slot: Slot) -> Result<Option<Arrived>, ExchangeError> {
        let arrived = self.links.mailbox.take_now(slot)?;
        if arrived.is_some() {
            self.links.incoming(slot.channel).confirm_one();
        }
        Ok(arrived)
    }

    fn check(&self) -> Result<(), ExchangeError> {
        self.links.mailbox.closed().map_or(Ok(()), Err)
    }

    fn drain_link_bytes(&mut self) -> Vec<LinkBytes> {
        let found = std::mem::take(&mut *self.links.found.lock().unwrap_or_else(PoisonError::into_inner));
        for (to, found) in found {
            self.tally.encoded(to, found);
        }
        self.tally.drain()
    }

    fn drain_link_speeds(&mut self) -> Vec<LinkSpeed> {
        let to = self.links.name_of(self.links.node.index());
        let speed = |(peer, meter): (usize, &Meter)| {
            let (bytes, busy) = meter.drain();
            let (from, to, busy_s) = (self.links.name_of(peer), to.clone(), busy.as_secs_f64());
            let session = self.links.sessions.get(peer).and_then(|session| session.borrow().clone());
            let relayed = session.is_some_and(|session| session.stats().is_relayed);
            (bytes > 0).then_some(LinkSpeed { from, to, bytes, busy_s, relayed })
        };
        self.links.meters.iter().enumerate().filter_map(speed).collect()
    }

    fn residuals(&mut self) -> Result<Vec<(Channel, HostTensor)>, ExchangeError> {
        let mut residuals = Vec::new();
        for (&(_, channel), queue) in &self.queues {
            let (reply, answer) = oneshot::channel();
            queue.blocking_send(Outgoing::Residual(reply)).map_err(|_| self.closed())?;
            let residual = answer.blocking_recv().map_err(|_| self.closed())?;
            residuals.extend(residual.map(|residual| (channel, residual)));
        }
        Ok(residuals)
    }

    fn restore_residual(&mut self, channel: Channel, residual: HostTensor) {
        self.residuals.insert(channel, residual);
    }
}

#[cfg(test)]
mod tests;
