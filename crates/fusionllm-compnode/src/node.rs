//! The CompNode process: joins a broker, takes assignments, runs them.
//!
//! One loop over one enum [`NodeEvent`]; compute, data and files live on threads of their own.

mod assignment;
mod blob;
mod running;
mod survey;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fusionllm_protocol::{DeviceProfile, FromBroker, FromCompNode, Hello, Role, decode, encode};
use fusionllm_transport::{Endpoint, EndpointConfig, FrameSink, FrameSource, Identity, Members, Session, Ticket};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::CompNodeError;
use crate::device::{DeviceChoice, open_device};
use crate::knock::{Admitted, knock};
use crate::links::peer_record;
use crate::step_log::ClockOffset;
use running::RunningJob;
use survey::{AwaitedProbes, Surveyor, start_probe};

/// The broker takes a CompNode for lost after several of these.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// Largest control message: an assignment holds the graph and the task orders.
pub(crate) const CONTROL_MESSAGE_BYTES: u64 = 64 << 20;
/// First and largest pause between attempts to get back to the broker.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// Events that may wait for the loop; compute waits beyond that.
const EVENT_QUEUE: usize = 64;

/// How to join.
#[derive(Debug)]
pub struct JoinConfig {
    /// The broker's ticket.
    pub ticket: Ticket,
    /// Name shown to people; the broker makes it unique.
    pub name: String,
    /// What to compute with.
    pub device: DeviceChoice,
    /// This CompNode's key.
    pub identity: Identity,
    /// Where other CompNodes connect; port 0 is any.
    pub bind: SocketAddr,
    /// Addresses to announce besides those found, such as a forwarded port.
    pub advertise: Vec<SocketAddr>,
    /// Threads of the CPU device; all cores if not given.
    pub threads: Option<usize>,
    /// Bytes of memory that jobs may fill; what is free if not given.
    pub memory_bytes: Option<u64>,
    /// Where the device's measured profile is kept; nothing: nowhere, and it is measured anew.
    pub profile_dir: Option<PathBuf>,
}

/// Everything that the loop reacts to.
#[derive(Debug)]
pub(crate) enum NodeEvent {
    /// A message from the broker; nothing when the connection is lost.
    Broker(Option<FromBroker>),
    /// Something to tell the broker.
    Tell(Box<FromCompNode>),
    /// The assignment is built, or why it could not be.
    Prepared(Box<Result<assignment::Prepared, (assignment::JobKey, CompNodeError)>>),
    /// The task loop has ended and everything it sent has arrived.
    Ended(assignment::JobKey, Result<(), CompNodeError>),
}

/// Why a session with the broker ended.
enum SessionEnd {
    /// Asked to go, by a signal or by the broker.
    Leave,
    /// The connection broke.
    Lost,
}

/// Joins the broker and works for it until `shutdown` resolves or the broker says so. A lost broker is redialled.
///
/// # Errors
/// [`CompNodeError`] if the device does not open, the first connection fails, or the broker refuses.
pub async fn join(config: JoinConfig, shutdown: impl Future<Output = ()> + Send) -> Result<(), CompNodeError> {
    if let Some(threads) = config.threads {
        // A process computes with one pool; if it has one already, that one stays.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
    let (device, device_name) = open_device(config.device)?;
    let surveyor = Surveyor {
        device,
        device_name,
        choice: config.device,
        folder: config.profile_dir,
        memory_bytes: config.memory_bytes,
    };
    let measuring = surveyor.clone();
    let profile = tokio::task::spawn_blocking(move || measuring.device()).await??;
    let members = Arc::new(Members::default());
    let mut endpoint_config = EndpointConfig::new(config.identity, config.bind);
    endpoint_config.advertise = config.advertise;
    let broker_error = |reason: String| CompNodeError::Broker { reason };
    let endpoint = Endpoint::bind(endpoint_config, members.clone()).await.map_err(|e| broker_error(e.to_string()))?;
    let mut node = Node {
        endpoint: endpoint.clone(),
        members,
        ticket: config.ticket,
        name: config.name,
        surveyor,
        profile,
        probes: AwaitedProbes::default(),
        clock: Arc::default(),
        heartbeat_at: None,
        job: None,
        unclaimed: None,
    };
    tokio::pin!(shutdown);
    let mut pause = BACK_OFF.0;
    let mut joined_before = false;
    let result = loop {
        let outcome = tokio::select! {
            outcome = node.session(&mut joined_before, &mut pause) => outcome,
            () = &mut shutdown => Ok(SessionEnd::Leave),
        };
        node.drop_job("the CompNode lost its broker");
        match outcome {
            Ok(SessionEnd::Leave) => break Ok(()),
            Ok(SessionEnd::Lost) => tracing::warn!("lost the broker, trying again in {:.1} s", pause.as_secs_f64()),
            // It would be refused again, however often it asks.
            Err(error @ (CompNodeError::Refused { .. } | CompNodeError::Protocol(_))) => break Err(error),
            Err(error) if joined_before => tracing::warn!(%error, "cannot get back to the broker"),
            Err(error) => break Err(error),
        }
        tokio::select! {
            () = sleep(pause) => {}
            () = &mut shutdown => break Ok(()),
        }
        pause = (pause * 2).min(BACK_OFF.1);
    };
    endpoint.close().await;
    result
}

struct Node {
    endpoint: Endpoint,
    members: Arc<Members>,
    ticket: Ticket,
    name: String,
    surveyor: Surveyor,
    profile: DeviceProfile,
    probes: AwaitedProbes,
    clock: Arc<ClockOffset>,
    /// When the heartbeat that is not answered yet was sent.
    heartbeat_at: Option<Instant>,
    job: Option<RunningJob>,
    /// A blob stream that came before the assignment it belongs to.
    unclaimed: Option<FrameSource>,
}

impl Node {
    /// One connection to the broker, from hello to its end.
    async fn session(&mut self, joined: &mut bool, pause: &mut Duration) -> Result<SessionEnd, CompNodeError> {
        let broker_error = |reason: String| CompNodeError::Broker { reason };
        let session = self.endpoint.connect(&self.ticket.broker).await.map_err(|e| broker_error(e.to_string()))?;
        let Admitted { name, mut sink, source } = knock(&session, &self.hello()).await?;
        tracing::info!(%name, device = %self.surveyor.device_name, "joined the broker");
        *joined = true;
        *pause = BACK_OFF.0;

        let (events, mut inbox) = mpsc::channel(EVENT_QUEUE);
        let reader = tokio::spawn(read_broker(source, events.clone()));
        let mut heartbeat = interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = loop {
            tokio::select! {
                _ = heartbeat.tick() => {
                    self.heartbeat_at = Some(Instant::now());
                    if tell(&mut sink, &FromCompNode::Heartbeat).await.is_err() {
                        break SessionEnd::Lost;
                    }
                }
                Some(peer) = self.endpoint.accept() => self.accept_peer(peer),
                Ok(stream) = session.accept_uni() => self.accept_blob(stream),
                Some(event) = inbox.recv() => {
                    match self.handle(event, &session, &events) {
                        Next::Tell(messages) => {
                            let mut lost = false;
                            for message in messages {
                                lost |= tell(&mut sink, &message).await.is_err();
                            }
                            if lost {
                                break SessionEnd::Lost;
                            }
                        }
                        Next::End(end) => break end,
                    }
                }
            }
        };
        reader.abort();
        session.close(0, "leaving");
        Ok(end)
    }

    fn hello(&self) -> Hello {
        let role = Role::CompNode {
            name: self.name.clone(),
            device: self.surveyor.device_name.clone(),
            addr: peer_record(&self.endpoint.addr()),
            profile: self.profile.clone(),
        };
        Hello { secret: *self.ticket.secret.as_bytes(), role }
    }

    fn accept_peer(&mut self, peer: Session) {
        let Some(peer) = self.probes.answer(peer) else { return };
        match &self.job {
            Some(job) => job.links.accept(peer),
            None => peer.close(404, "no job here"),
        }
    }

    /// A stream from the broker can only be the weights of the job at hand.
    fn accept_blob(&mut self, stream: FrameSource) {
        match self.job.as_mut().and_then(|job| job.weights.take().map(|w| (job.key, w))) {
            Some((key, weights)) => {
                tokio::spawn(async move {
                    // The receiver is gone only if the job is.
                    let _ = weights.send(blob::receive_weights(stream, key).await);
                });
            }
            None => self.unclaimed = Some(stream),
        }
    }

    fn drop_job(&mut self, reason: &str) {
        if let Some(job) = self.job.take() {
            job.links.abort(reason);
            self.members.replace([]);
        }
    }

    fn handle(&mut self, event: NodeEvent, broker: &Session, events: &mpsc::Sender<NodeEvent>) -> Next {
        match event {
            NodeEvent::Broker(None) => Next::End(SessionEnd::Lost),
            NodeEvent::Broker(Some(FromBroker::Shutdown)) => Next::End(SessionEnd::Leave),
            NodeEvent::Broker(Some(FromBroker::HeartbeatAck { now_s })) => {
                if let Some(sent) = self.heartbeat_at.take() {
                    self.clock.learn(sent, now_s);
                }
                Next::nothing()
            }
            NodeEvent::Broker(Some(FromBroker::Assign(assignment))) => {
                self.drop_job("replaced by another assignment");
                let key = assignment::JobKey::of(&assignment);
                self.probes.clear();
                let device = self.surveyor.device.clone();
                match RunningJob::prepare(*assignment, self.endpoint.clone(), device, events.clone()) {
                    Ok(job) => {
                        self.members.replace(job.peers().to_vec());
                        self.job = Some(job);
                        if let Some(stream) = self.unclaimed.take() {
                            self.accept_blob(stream);
                        }
                        Next::nothing()
                    }
                    Err(error) => Next::Tell(vec![key.failed(&error)]),
                }
            }
            NodeEvent::Broker(Some(FromBroker::Start { job, generation })) => {
                let key = assignment::JobKey { job, generation };
                match self.job.as_mut().filter(|j| j.key == key) {
                    Some(job) => Next::Tell(
                        job.start(broker.clone(), events.clone(), Arc::clone(&self.clock)).into_iter().collect(),
                    ),
                    None => Next::nothing(),
                }
            }
            NodeEvent::Broker(Some(FromBroker::SetCodec { job, generation, edge, gradient, codec })) => {
                let key = assignment::JobKey { job, generation };
                if let Some(job) = self.job.as_ref().filter(|j| j.key == key) {
                    job.set_codec(edge, gradient, codec);
                }
                Next::nothing()
            }
            NodeEvent::Broker(Some(FromBroker::Abort { job, generation, reason })) => {
                if self.job.as_ref().is_some_and(|j| j.key == assignment::JobKey { job, generation }) {
                    tracing::info!(%job, %reason, "job aborted");
                    self.drop_job(&reason);
                }
                Next::nothing()
            }
            NodeEvent::Broker(Some(FromBroker::MeasureOps { request, spec, graph })) => {
                self.surveyor.start_ops(request, *spec, graph, events.clone());
                Next::nothing()
            }
            NodeEvent::Broker(Some(FromBroker::AwaitProbe { probe, peer })) => {
                self.probes.expect(&peer);
                let of_job = self.job.iter().flat_map(|job| job.peers().to_vec());
                self.members.replace(of_job.chain(self.probes.peers()));
                Next::Tell(vec![FromCompNode::ProbeAwaited { probe }])
            }
            NodeEvent::Broker(Some(FromBroker::Probe { probe, peer })) => {
                start_probe(probe, &peer, self.endpoint.clone(), events.clone());
                Next::nothing()
            }
            NodeEvent::Tell(message) => Next::Tell(vec![*message]),
            NodeEvent::Prepared(result) => self.prepared(*result),
            NodeEvent::Ended(key, result) => self.ended(key, result),
        }
    }

    fn prepared(&mut self, result: Result<assignment::Prepared, (assignment::JobKey, CompNodeError)>) -> Next {
        match result {
            Ok(prepared) => match self.job.as_mut().filter(|j| j.key == prepared.key) {
                Some(job) => Next::Tell(vec![job.ready(prepared)]),
                None => Next::nothing(),
            },
            Err((key, error)) => self.ended(key, Err(error)),
        }
    }

    fn ended(&mut self, key: assignment::JobKey, result: Result<(), CompNodeError>) -> Next {
        if self.job.as_ref().is_none_or(|j| j.key != key) {
            return Next::nothing();
        }
        match result {
            // The wires stay up until the next assignment: peers may still wait for confirmations.
            Ok(()) => Next::Tell(vec![FromCompNode::Finished { job: key.job, generation: key.generation }]),
            Err(error) => {
                let failed = key.failed(&error);
                self.drop_job("failed on this CompNode");
                Next::Tell(vec![failed])
            }
        }
    }
}

/// What follows from an event.
enum Next {
    Tell(Vec<FromCompNode>),
    End(SessionEnd),
}

impl Next {
    fn nothing() -> Self {
        Self::Tell(Vec::new())
    }
}

async fn tell(sink: &mut FrameSink, message: &FromCompNode) -> Result<(), CompNodeError> {
    let sent = sink.send(&encode(message)?).await;
    sent.map_err(|e| CompNodeError::Broker { reason: e.to_string() })
}

/// Reads the broker's messages apart from the loop, since reading a frame must not be cut short.
async fn read_broker(mut source: FrameSource, events: mpsc::Sender<NodeEvent>) {
    while let Ok(Some(frame)) = source.recv_limited(CONTROL_MESSAGE_BYTES).await {
        match decode(&frame) {
            Ok(message) => {
                if events.send(NodeEvent::Broker(Some(message))).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::error!(%error, "unreadable message from the broker");
                break;
            }
        }
    }
    // If the loop is gone it needs no end.
    let _ = events.send(NodeEvent::Broker(None)).await;
}

impl From<tokio::task::JoinError> for CompNodeError {
    fn from(error: tokio::task::JoinError) -> Self {
        Self::ComputeThread { reason: error.to_string() }
    }
}
