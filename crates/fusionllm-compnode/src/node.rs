//! The CompNode process: joins a broker, takes assignments, runs them.
//!
//! One loop over one enum [`NodeEvent`]; compute, data and files live on threads of their own.

mod assignment;
mod blob;
mod broker_wire;
mod commands;
mod config;
mod keeping;
mod kept;
mod patience;
mod running;
mod scratch;
mod sink;
mod survey;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fusionllm_protocol::{DeviceProfile, FromCompNode, RunKey};
use fusionllm_transport::{Endpoint, EndpointConfig, Members, Purpose, Relay, Session, Ticket};
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};

use crate::backend::Backend;
use crate::open_device::open_device;
use crate::snapshots::{self, SnapshotStore};
use crate::step_log::{ClockOffset, Heartbeats};
use crate::{CompNodeError, ReadableData};
use broker_wire::{Connected, Outbox, dial};
pub use config::JoinConfig;
use patience::{Hearing, Patience};
use running::RunningJob;
pub use scratch::check_run_room;
use survey::{Probes, Surveyor};

/// The broker takes a CompNode for lost after several of these.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// After so many that are not answered checkpoints do not wait for the broker.
const SILENT: u32 = 4;
/// After so many of them the broker is told again how much memory is free.
const ROOM_EVERY: u32 = 30;
/// Largest control message: an assignment holds the graph and the task orders.
pub(crate) const CONTROL_MESSAGE_BYTES: u64 = 64 << 20;
/// First and largest pause between attempts to get back to the broker.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));
/// How long a CompNode that is to leave waits until its work has moved.
const LEAVE_LIMIT: Duration = Duration::from_secs(60);
/// Largest pause while a job is at work.
const WITH_A_JOB: Duration = Duration::from_secs(3);
/// Events that may wait for the loop; compute waits beyond that.
const EVENT_QUEUE: usize = 64;

/// Everything that the loop reacts to.
#[derive(Debug)]
pub(crate) enum NodeEvent {
    /// Something to tell the broker.
    Tell(Box<FromCompNode>),
    /// Whoever runs this CompNode wants it to leave.
    Leave,
    /// What an earlier process kept is known.
    Looked,
    /// Something to tell the broker of a job, unless it is not the job at hand any more.
    Report(RunKey, Box<FromCompNode>),
    /// The broker begins to send weights.
    Weights(Box<blob::Incoming>),
    /// The assignment is built, or why it could not be.
    Prepared(Box<Result<assignment::Prepared, (RunKey, CompNodeError)>>),
    /// The task loop has ended and everything it sent has arrived.
    Ended(RunKey, Result<(), CompNodeError>),
}

/// Joins the broker and works for it until it is to leave. A lost broker is redialled.
///
/// Once `leave` resolves its work is moved to others, for a minute at the most; once `shutdown` does it leaves at once.
///
/// # Errors
/// [`CompNodeError`] if the device does not open, the first connection fails, or the broker refuses.
pub async fn join(
    config: JoinConfig,
    leave: impl Future<Output = ()> + Send,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), CompNodeError> {
    let backend = open_device(config.device)?;
    join_with(config, backend, Patience::default(), leave, shutdown).await
}

/// Joins with a device that is open.
async fn join_with(
    config: JoinConfig,
    backend: Arc<dyn Backend>,
    patience: Patience,
    leave: impl Future<Output = ()> + Send,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), CompNodeError> {
    if let Some(threads) = config.threads {
        // A process computes with one pool; if it has one already, that one stays.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
    scratch::check_usable(&config.scratch_dir)?;
    let (base, broker, name) = (config.snapshot_dir, config.ticket.broker.id, config.name.clone());
    let snapshots = tokio::task::spawn_blocking(move || SnapshotStore::open(&base, broker, &name)).await??;
    let snapshots = Arc::new(snapshots);
    let surveyor =
        Surveyor { backend, folder: config.profile_dir, memory_bytes: config.memory_bytes, measuring: Arc::default() };
    let measuring = surveyor.clone();
    let profile = tokio::task::spawn_blocking(move || measuring.device()).await??;
    let members = Arc::new(Members::default());
    let mut endpoint_config = EndpointConfig::new(config.identity, config.bind);
    endpoint_config.advertise = config.advertise;
    endpoint_config.relay = Relay::by(&config.ticket);
    let endpoint = Endpoint::bind(endpoint_config, members.clone()).await?;
    let (events, mut inbox) = mpsc::channel(EVENT_QUEUE);
    let mut node = Node {
        endpoint: endpoint.clone(),
        members,
        ticket: config.ticket,
        name: config.name,
        org: config.org,
        surveyor,
        profile,
        probes: Probes::default(),
        clock: Arc::default(),
        heartbeats: Heartbeats::default(),
        events,
        broker: watch::Sender::new(None),
        outbox: Outbox::default(),
        patience,
        alone_since: Instant::now(),
        has_joined: false,
        readable: Arc::new(config.readable),
        scratch: config.scratch_dir.into(),
        seeds: config.seed_dir.into(),
        snapshots,
        memory: Arc::new(Semaphore::new(1)),
        idle: 0,
        job: None,
        weights: blob::Unclaimed::default(),
        dismissal: Arc::default(),
        is_leaving: false,
    };
    let (events, dismissal) = (node.events.clone(), Arc::clone(&node.dismissal));
    let leaving = async move {
        leave.await;
        // A loop that does not take it in has no more time than one that does.
        let _ = timeout(LEAVE_LIMIT / 2, events.send(NodeEvent::Leave)).await;
        sleep(LEAVE_LIMIT).await;
        tracing::warn!("the work did not move away in {} s", LEAVE_LIMIT.as_secs());
    };
    node.look();
    let result = tokio::select! {
        error = node.run(&mut inbox) => Err(error),
        () = dismissal.told.notified() => Ok(()),
        () = leaving => Ok(()),
        () = shutdown => Ok(()),
    };
    node.lose_broker(0);
    node.drop_job("the CompNode leaves");
    let store = Arc::clone(&node.snapshots);
    // Nobody needs what a CompNode has kept that the broker lets go.
    let stay = config.snapshots_stay && !dismissal.keeps_nothing.load(Ordering::Relaxed);
    tokio::task::spawn_blocking(move || store.close(stay)).await?;
    endpoint.close().await;
    result
}

/// Whether a CompNode may leave.
#[derive(Debug, Default)]
struct Dismissal {
    told: Notify,
    keeps_nothing: AtomicBool,
}

struct Node {
    endpoint: Endpoint,
    members: Arc<Members>,
    ticket: Ticket,
    name: String,
    org: Option<String>,
    surveyor: Surveyor,
    profile: DeviceProfile,
    probes: Probes,
    clock: Arc<ClockOffset>,
    heartbeats: Heartbeats,
    events: mpsc::Sender<NodeEvent>,
    /// The connection to the broker, while there is one.
    broker: watch::Sender<Option<Session>>,
    /// What the broker is told, until it has it.
    outbox: Outbox,
    patience: Patience,
    /// When the broker was lost, while it is.
    alone_since: Instant,
    has_joined: bool,
    readable: Arc<ReadableData>,
    scratch: Arc<Path>,
    seeds: Arc<Path>,
    snapshots: Arc<SnapshotStore>,
    /// One permit: whoever fills the device's memory, a job or a measurement, holds it.
    memory: Arc<Semaphore>,
    /// Heartbeats since somebody last filled it.
    idle: u32,
    job: Option<RunningJob>,
    /// Weights that came before the assignment they belong to.
    weights: blob::Unclaimed,
    dismissal: Arc<Dismissal>,
    /// Whether it was told to leave.
    is_leaving: bool,
}

impl Node {
    /// Joins the broker, and again whenever it is lost. Gives why that is not possible any more.
    async fn run(&mut self, inbox: &mut mpsc::Receiver<NodeEvent>) -> CompNodeError {
        let mut pause = BACK_OFF.0;
        let mut joined_before = false;
        loop {
            let standing = self.standing();
            let said = standing.as_ref().map(|standing| standing.key);
            let dialling = dial(self.endpoint.clone(), self.ticket.broker.clone(), self.hello(standing));
            match self.meanwhile(inbox, dialling).await {
                Ok(connected) => {
                    (joined_before, pause) = (true, BACK_OFF.0);
                    tracing::info!(name = %connected.name, device = self.surveyor.backend.name(), "joined the broker");
                    let reason = self.session(connected, said, inbox).await;
                    tracing::warn!(reason, "lost the broker, dialling until it is back");
                }
                // It would be refused again, however often it asks.
                Err(error @ (CompNodeError::Refused { .. } | CompNodeError::Protocol(_))) => return error,
                Err(error) if joined_before => {
                    tracing::warn!(%error, "cannot get back to the broker, trying again in {:.1} s", pause.as_secs_f64());
                }
                Err(error) => return error,
            }
            self.meanwhile(inbox, sleep(pause)).await;
            // A job at work has only as long as its lease.
            pause = (pause * 2).min(if self.job.is_some() { WITH_A_JOB } else { BACK_OFF.1 });
        }
    }

    /// Whether more may be reported: jobs wait for a broker that takes nothing in.
    fn has_room(&self) -> bool {
        self.outbox.has_room() && self.job.as_ref().is_none_or(|job| job.kept.has_room())
    }

    /// Waits for something without a broker; the job goes on meanwhile, as long as what it reports finds room.
    async fn meanwhile<T>(&mut self, inbox: &mut mpsc::Receiver<NodeEvent>, awaited: impl Future<Output = T>) -> T {
        tokio::pin!(awaited);
        let given_up = self.alone_since + self.patience.alone;
        loop {
            tokio::select! {
                biased;
                result = &mut awaited => return result,
                () = sleep_until(given_up), if self.job.is_some() => self.give_job_up(),
                Some(peer) = self.endpoint.accept() => self.accept_peer(peer),
                Some(event) = inbox.recv(), if self.has_room() => {
                    let messages = self.handle(event);
                    self.tell(messages);
                }
            }
        }
    }

    /// One connection to the broker, to its end. `said` is the job that it was told of. Gives why it ended.
    async fn session(
        &mut self,
        connected: Connected,
        said: Option<RunKey>,
        inbox: &mut mpsc::Receiver<NodeEvent>,
    ) -> String {
        let Connected { session, mut wire, resumed, .. } = connected;
        match resumed.map(|received| self.outbox.resume(received)) {
            Some(Ok(())) => {}
            Some(Err(error)) => {
                // It goes on with numbers that are not ours: messages numbered anew it would take for old ones.
                self.forget("the broker has other numbers");
                session.close(1, "its numbers are not ours");
                return error.to_string();
            }
            None => {
                self.begin_anew(said);
                self.tell_held();
                self.tell(self.is_leaving.then_some(FromCompNode::Leaving));
            }
        }
        self.has_joined = true;
        self.broker.send_replace(Some(session.clone()));
        if let Some(job) = &self.job {
            job.has_broker(Some(&session));
        }
        let mut hearing = Hearing::new();
        let mut heartbeat = interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = loop {
            if let Err(error) = wire.flush(&mut self.outbox) {
                break error.to_string();
            }
            let room = wire.room();
            tokio::select! {
                // Who is heard of rarely goes before who speaks often, and the broker before the job: a job that reports
                // without a pause must not keep heartbeats from going out, or a broker's stop from being read.
                biased;
                _ = heartbeat.tick() => {
                    let unanswered = hearing.heartbeat(wire.heard());
                    if unanswered >= self.patience.heartbeats {
                        break format!("it says nothing to {unanswered} heartbeats");
                    }
                    if let Some(job) = &self.job {
                        job.hears_of_broker(unanswered < SILENT);
                    }
                    let number = self.heartbeats.send();
                    self.tell_room();
                    self.tell(Some(FromCompNode::Heartbeat { number }));
                }
                message = wire.receive() => match message {
                    Ok(frame) => match self.outbox.receive(frame) {
                        Ok(message) => {
                            let answer = message.and_then(|message| self.obey(message));
                            self.tell(answer);
                        }
                        Err(error) => break error.to_string(),
                    },
                    Err(reason) => break reason,
                },
                Some(peer) = self.endpoint.accept() => self.accept_peer(peer),
                Ok(stream) = session.accept_uni() => blob::announce(stream, self.events.clone()),
                () = room => {}
                Some(event) = inbox.recv(), if self.has_room() => {
                    let messages = self.handle(event);
                    self.tell(messages);
                }
            }
        };
        // Code 0 would say that it will not come back.
        self.lose_broker(1);
        self.alone_since = Instant::now();
        if self.outbox.check().is_err() {
            // What is missing would be missed later.
            self.forget("the broker confirms nothing");
        }
        end
    }

    /// All that was begun with the broker is over: it is joined as if for the first time.
    fn forget(&mut self, reason: &str) {
        self.drop_job(reason);
        self.forget_talk();
    }

    /// A broker process that knows nothing of this CompNode but what it said when it came: a job that is at work goes on until
    /// that process has decided whether it takes it back.
    fn begin_anew(&mut self, said: Option<RunKey>) {
        match &mut self.job {
            Some(job) if said == Some(job.key) => job.kept.wait(),
            _ => self.drop_job("the broker was lost"),
        }
        self.forget_talk();
        // It waits for what is gone by now.
        let lost = said.filter(|_| self.job.is_none());
        let reason = "it was dropped while the broker was away".to_owned();
        self.tell(lost.map(|key| FromCompNode::Failed { key, reason, bad_input: false }));
    }

    /// What was said to a broker process, and by it, is nothing to another one.
    fn forget_talk(&mut self) {
        // It has another clock.
        self.clock.forget();
        // Nobody waits for what comes of them, and another broker might take it for its own.
        self.surveyor.cancel_all();
        self.probes.end();
        (self.outbox, self.has_joined) = (Outbox::default(), false);
    }

    /// Now and then, while nobody fills the memory, asks how much of it is free, and tells the broker.
    fn tell_room(&mut self) {
        self.idle = if self.memory.available_permits() > 0 { self.idle + 1 } else { 0 };
        // What has just been freed comes back a little later.
        if self.idle % ROOM_EVERY == 2 {
            self.surveyor.tell_room(self.events.clone());
        }
    }

    /// The broker stays away.
    fn give_job_up(&mut self) {
        let Some(key) = self.job.as_ref().map(|job| job.key) else { return };
        let reason = format!("it is away for {} s", self.patience.alone.as_secs());
        tracing::warn!(job = %key.job, reason, "dropping the job, nobody is there to take what comes of it");
        self.drop_job("the broker stays away");
        self.tell(Some(assignment::failed(key, &CompNodeError::Broker { reason })));
    }

    fn lose_broker(&mut self, code: u32) {
        if let Some(job) = &self.job {
            job.has_broker(None);
        }
        if let Some(session) = self.broker.send_replace(None) {
            session.close(code, "leaving");
        }
    }

    /// Looks through what a process before this one has kept, while this one joins.
    fn look(&self) {
        let (events, store) = (self.events.clone(), Arc::clone(&self.snapshots));
        tokio::spawn(async move {
            // Should that fail, there is nothing to tell.
            if tokio::task::spawn_blocking(move || store.look()).await.is_ok() {
                let _ = events.send(NodeEvent::Looked).await;
            }
        });
    }

    /// Tells the broker which snapshots are here.
    pub(super) fn tell_held(&mut self) {
        let held = self.snapshots.all();
        self.tell(held.into_iter().map(|snapshot| FromCompNode::Holds { snapshot, cost_s: 0.0 }));
    }

    /// Queues messages for the broker.
    fn tell(&mut self, messages: impl IntoIterator<Item = FromCompNode>) {
        for message in messages {
            self.outbox.push(message);
        }
    }

    fn accept_peer(&mut self, peer: Session) {
        match (peer.purpose(), &self.job) {
            (Purpose::Probe, _) => self.probes.answer(peer),
            (Purpose::State, _) => {
                tokio::spawn(snapshots::serve(Arc::clone(&self.snapshots), peer));
            }
            (Purpose::Work, Some(job)) => job.links.accept(peer),
            (Purpose::Work, None) => peer.close(404, "no job here"),
        }
    }

    fn drop_job(&mut self, reason: &str) {
        if let Some(job) = self.job.take() {
            job.links.abort(reason);
            self.let_in();
        }
    }
}

#[cfg(test)]
mod tests;
