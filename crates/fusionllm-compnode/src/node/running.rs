//! A job on this CompNode, from assignment to end.

use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Weak};
use std::time::Duration;

use fusionllm_codec::Codec;
use fusionllm_planner::{EdgeId, NodeIndex, Way};
use fusionllm_protocol::{
    Assignment, BlobHeader, BlobKind, FromCompNode, PeerRecord, RunKey, Snapshot, Standing, WeightSource,
    placement_hash,
};
use fusionllm_transport::{Endpoint, PeerId, Session};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use super::assignment::{BuildSite, Prepared, WeightsReceiver, failed, prepare};
use super::kept::Kept;
use super::sink::{BrokerAbsence, NodeSink, SnapshotOrder};
use super::survey::Surveyor;
use super::{NodeEvent, blob, keeping};
use crate::CompNodeError;
use crate::checkpoint::ShardFile;
use crate::codec_table::CodecTable;
use crate::data::{ReadableData, Reading};
use crate::links::{EdgeTensors, JobLinks, NetworkExchange, peer_addr};
use crate::snapshots::SnapshotStore;
use crate::step_log::ClockOffset;
use crate::task_loop::TaskLoop;

/// How long a job waits for the memory of the one before: its compute thread ends with the op at hand.
const RELEASE_LIMIT: Duration = Duration::from_secs(60);

/// How often the broker hears that data is still being read: several times in what it waits for that.
const TELL_READING: Duration = Duration::from_secs(20);

/// What a job is built with.
pub(super) struct Site {
    pub(super) endpoint: Endpoint,
    pub(super) surveyor: Surveyor,
    /// Who holds its one permit may fill the memory.
    pub(super) memory: Arc<Semaphore>,
    /// What the job may read here.
    pub(super) readable: Arc<ReadableData>,
    /// Where weights and shards lie while they come and go.
    pub(super) scratch: Arc<Path>,
    /// Where the seeds lie that only this CompNode has.
    pub(super) seeds: Arc<Path>,
    pub(super) snapshots: Arc<SnapshotStore>,
    pub(super) events: mpsc::Sender<NodeEvent>,
}

/// The job at hand.
pub(super) struct RunningJob {
    pub(super) key: RunKey,
    pub(super) links: Arc<JobLinks>,
    /// Where weights from the broker go, while they are waited for.
    weights: Option<mpsc::Sender<blob::Incoming>>,
    peers: Vec<PeerId>,
    records: Vec<PeerRecord>,
    endpoint: Endpoint,
    snapshots: Arc<SnapshotStore>,
    snapshot_due: Arc<SnapshotOrder>,
    codecs: Arc<CodecTable>,
    scratch: Arc<Path>,
    /// The step whose shard the broker has last settled.
    settled: watch::Sender<u64>,
    /// The step whose shard the broker wants once more, and how often it has said so of any.
    again: watch::Sender<blob::Again>,
    prepared: Option<Prepared>,
    /// The [`placement_hash`] of its placement; nothing if that has none.
    placement: Option<String>,
    /// The connection to the broker, while there is one that has this job.
    broker: watch::Sender<Option<Session>>,
    /// Whether that broker is there: something was heard of it lately.
    is_there: watch::Sender<bool>,
    /// What the broker may not have written yet.
    pub(super) kept: Kept,
    has_started: bool,
}

impl RunningJob {
    /// The CompNodes that may connect.
    pub(super) fn peers(&self) -> &[PeerId] {
        &self.peers
    }

    /// What goes this way along an edge is encoded by another codec from now on.
    pub(super) fn set_codec(&self, edge: EdgeId, way: Way, codec: Codec) {
        self.codecs.set(edge, way, codec);
    }

    /// Opens the job's wires and begins to build its part once the memory is free; [`NodeEvent::Prepared`] tells when
    /// that is done.
    pub(super) fn prepare(assignment: Assignment, place: Site) -> Self {
        let key = assignment.key;
        let links = JobLinks::lending(place.endpoint.clone(), &assignment, Arc::clone(&place.snapshots));
        let arrived = Arc::new(AtomicU64::new(0));
        let (weights, receiver) = first_weights(&assignment.weights, &links, &place, &arrived);
        let Site { endpoint, surveyor, memory, readable, scratch, seeds, snapshots, events } = place;
        let peers: Vec<PeerId> = assignment.peers.iter().map(|p| PeerId::from_bytes(p.id)).collect();
        let records = assignment.peers.clone();
        let (placement, reports) = (placement_hash(&assignment.placement).ok(), Kept::new(assignment.start_step));
        // Those who train together keep each other's snapshots.
        snapshots.lend_to(key.job, peers.iter().copied());
        let mailbox = Arc::clone(&links.mailbox);
        let (folder, kept) = (Arc::clone(&scratch), Arc::clone(&snapshots));
        let reading = Arc::new(Reading::new(mailbox.stop_flag()));
        links.spawn(tell_reading(Arc::downgrade(&reading), TELL_READING, key, events.clone()));
        tokio::spawn(async move {
            let result = match timeout(RELEASE_LIMIT, memory.acquire_owned()).await {
                Ok(Ok(permit)) => {
                    let built = spawn_blocking(move || {
                        let (free_bytes, host_bytes) = (surveyor.room(), surveyor.host_room());
                        let backend = surveyor.backend;
                        let site = BuildSite {
                            backend,
                            free_bytes,
                            host_bytes,
                            readable,
                            reading,
                            scratch: folder,
                            seeds,
                            snapshots: kept,
                            arrived,
                            permit,
                            mailbox,
                        };
                        prepare(&assignment, site, receiver)
                    });
                    let built = built.await;
                    built.unwrap_or_else(|e| Err(e.into()))
                }
                Ok(Err(_)) | Err(_) => Err(CompNodeError::MemoryHeld { limit_s: RELEASE_LIMIT.as_secs() }),
            };
            // If the loop is gone nobody needs the result.
            let _ = events.send(NodeEvent::Prepared(Box::new(result.map_err(|e| (key, e))))).await;
        });
        Self {
            key,
            links,
            weights,
            peers,
            records,
            endpoint,
            snapshots,
            snapshot_due: Arc::default(),
            codecs: Arc::default(),
            scratch,
            settled: watch::Sender::new(0),
            again: watch::Sender::default(),
            prepared: None,
            placement,
            broker: watch::Sender::new(None),
            is_there: watch::Sender::new(true),
            kept: reports,
            has_started: false,
        }
    }

    /// How it stands, once it has started.
    pub(super) fn standing(&self) -> Option<Standing> {
        let placement = self.placement.clone().filter(|_| self.has_started)?;
        Some(Standing {
            key: self.key,
            placement,
            kept_from: self.kept.first(),
            done: self.kept.done(),
            settled: *self.settled.borrow(),
            halts: self.snapshot_due.halts(),
        })
    }

    /// There is a connection to the broker, or there is none. One that has not taken the job back gets no shard: it would
    /// not want it.
    pub(super) fn has_broker(&self, session: Option<&Session>) {
        let session = session.filter(|_| !self.kept.is_awaited());
        self.hears_of_broker(session.is_some());
        self.broker.send_replace(session.cloned());
    }

    /// Something is heard of the broker, or nothing is.
    pub(super) fn hears_of_broker(&self, something: bool) {
        let is_there = something && !self.kept.is_awaited();
        self.is_there.send_if_modified(|was| std::mem::replace(was, is_there) != is_there);
    }

    /// What is held after this step, which is still to come, becomes a snapshot; if `halt` says so training ends with it.
    pub(super) fn take_snapshot(&self, step: u64, halt: bool) {
        self.snapshot_due.set(step, halt);
    }

    /// Becomes the guardian of another CompNode's snapshot, while training goes on.
    pub(super) fn guard(&self, snapshot: Snapshot, events: mpsc::Sender<NodeEvent>) {
        let Some(owner) = self.records.get(snapshot.id.node.index()) else { return };
        let (links, store) = (Arc::clone(&self.links), Arc::clone(&self.snapshots));
        let guarding = keeping::guard(snapshot, peer_addr(owner), links, store, self.endpoint.clone());
        self.links.spawn(async move {
            let message = guarding.await;
            // If the loop is gone nobody needs to know.
            let _ = events.send(NodeEvent::Tell(Box::new(message))).await;
        });
    }

    /// The broker has the shard of this step, or does not want it.
    pub(super) fn shard_settled(&self, step: u64) {
        self.settled.send_replace(step);
    }

    /// The broker wants the shard of this step once more.
    pub(super) fn send_again(&self, step: u64) {
        self.again.send_modify(|again| *again = blob::Again { step, times: again.times + 1 });
    }

    /// Receives the job's weights; nothing if they were not asked for, or have come.
    pub(super) fn receive(&self, incoming: blob::Incoming) {
        if let Some(streams) = self.weights.clone() {
            self.links.spawn(async move {
                // What comes again is not needed.
                let _ = streams.send(incoming).await;
            });
        }
    }

    /// The part is built: tell the broker.
    pub(super) fn ready(&mut self, mut prepared: Prepared) -> FromCompNode {
        let data = prepared.data.take();
        let Prepared { plan, batch, .. } = &prepared;
        self.links.expect(EdgeTensors::of(&plan.dag, &plan.placement, *batch as usize));
        self.prepared = Some(prepared);
        FromCompNode::Ready { key: self.key, data }
    }

    /// Starts the compute thread. Gives a message if that is not possible.
    pub(super) fn start(&mut self, events: mpsc::Sender<NodeEvent>, clock: Arc<ClockOffset>) -> Option<FromCompNode> {
        let prepared = self.prepared.take()?;
        self.has_started = true;
        let (key, links, runtime) = (self.key, Arc::clone(&self.links), Handle::current());
        links.dial_all();
        let (shards, shard_queue) = mpsc::channel(1);
        let (uploaded, all_uploaded) = oneshot::channel();
        let line = blob::BrokerLine {
            broker: self.broker.subscribe(),
            settled: self.settled.subscribe(),
            again: self.again.subscribe(),
        };
        let uploads = upload_shards(line, key, prepared.plan.node, shard_queue);
        links.spawn(async move {
            // If nobody waits for it the job has ended.
            let _ = uploaded.send(uploads.await);
        });
        let (done, ended) = oneshot::channel();
        let exchange_links = Arc::clone(&links);
        let mailbox = Arc::clone(&links.mailbox);
        let (reports, codecs, folder) = (events.clone(), Arc::clone(&self.codecs), Arc::clone(&self.scratch));
        let (snapshots, snapshot_due) = (Arc::clone(&self.snapshots), Arc::clone(&self.snapshot_due));
        let (broker, again) = (BrokerAbsence::of(self.is_there.subscribe()), self.again.subscribe());
        let compute = move || {
            let exchange = NetworkExchange::new(exchange_links, runtime.clone());
            let Prepared { mut plan, shard_bytes, executor, batches, permit, .. } = prepared;
            plan.codecs = codecs;
            let mut sink = NodeSink {
                key,
                node: plan.node,
                shard_bytes,
                steps: plan.rules.steps.end,
                events: reports,
                shards,
                again,
                broker,
                mailbox,
                clock,
                folder,
                snapshots,
                snapshot_due,
                runtime,
                halts: false,
            };
            let mut task_loop = TaskLoop::new(plan, executor, Box::new(exchange), batches);
            let run = std::panic::AssertUnwindSafe(|| task_loop.run(&mut sink));
            let result = std::panic::catch_unwind(run).unwrap_or_else(|panic| {
                Err(CompNodeError::ComputeThread { reason: crate::panic_message(panic.as_ref()) })
            });
            // The next job may have the memory once this one's is free.
            drop((task_loop, permit));
            // If the loop is gone nobody needs the result.
            let _ = done.send(result);
        };
        if let Err(error) = std::thread::Builder::new().name("compute".to_owned()).spawn(compute) {
            return Some(failed(key, &CompNodeError::ComputeThread { reason: error.to_string() }));
        }
        tokio::spawn(async move {
            let gone = |_| CompNodeError::ComputeThread { reason: "it is gone".to_owned() };
            let mut result = ended.await.map_err(gone).and_then(|r| r);
            if result.is_ok() {
                result = all_uploaded.await.unwrap_or(Ok(()));
                links.drained().await;
            }
            // If the loop is gone nobody needs the result.
            let _ = events.send(NodeEvent::Ended(key, result)).await;
        });
        None
    }
}

/// Where weights from the broker go, if they come from there; and the files with what a part begins with, if there are any.
type FirstWeights = (Option<mpsc::Sender<blob::Incoming>>, Option<WeightsReceiver>);

/// Has what a part begins with brought here.
fn first_weights(weights: &WeightSource, links: &JobLinks, place: &Site, arrived: &Arc<AtomicU64>) -> FirstWeights {
    let (received, receiver) = oneshot::channel();
    match weights {
        WeightSource::Seed => (None, None),
        WeightSource::Snapshots(sources) => {
            let Site { snapshots, endpoint, events, .. } = place;
            let (store, arrived) = (Arc::clone(snapshots), Arc::clone(arrived));
            let gathering = keeping::gather(sources.clone(), store, endpoint.clone(), arrived, events.clone());
            links.spawn(async move {
                // The receiver is gone only if the job is.
                let _ = received.send(gathering.await);
            });
            (None, Some(receiver))
        }
        WeightSource::Broker => {
            let (streams, incoming) = mpsc::channel(1);
            let (folder, arrived) = (Arc::clone(&place.scratch), Arc::clone(arrived));
            links.spawn(async move {
                let first = blob::receive_first_whole(incoming, &folder, &arrived).await;
                // The receiver is gone only if the job is.
                let _ = received.send(first.map(|file| vec![file]));
            });
            (Some(streams), Some(receiver))
        }
    }
}

/// Tells the broker that data is being read, after each `every` in which that went on, until it is over.
async fn tell_reading(reading: Weak<Reading>, every: Duration, key: RunKey, events: mpsc::Sender<NodeEvent>) {
    let mut before = 0;
    loop {
        sleep(every).await;
        let seen = reading.upgrade().map(|reading| (reading.progress(), reading.bytes()));
        let Some((progress, (done, total))) = seen else { return };
        if progress != before {
            before = progress;
            let message = FromCompNode::Reading { key, done, total };
            // If the loop is gone nobody needs to know.
            let _ = events.send(NodeEvent::Report(key, Box::new(message))).await;
        }
    }
}

/// Sends shards while training goes on; a second one waits for the first.
async fn upload_shards(
    mut line: blob::BrokerLine,
    key: RunKey,
    node: NodeIndex,
    mut queue: mpsc::Receiver<(u64, ShardFile)>,
) -> Result<(), CompNodeError> {
    while let Some((step, shard)) = queue.recv().await {
        let kind = BlobKind::Shard { step, node };
        let header = BlobHeader { key, kind, bytes: shard.bytes() };
        line.send_over(&header, step, &Arc::new(shard)).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use fusionllm_protocol::{Generation, JobId};

    use super::*;

    #[tokio::test]
    async fn the_broker_hears_of_reading_while_it_goes_on_and_only_then() {
        let key = RunKey { job: JobId(3), generation: Generation(2) };
        let every = Duration::from_millis(1);
        let (events, mut inbox) = mpsc::channel(64);
        let reading = Arc::new(Reading::default());
        let telling = tokio::spawn(tell_reading(Arc::downgrade(&reading), every, key, events));
        for _ in 0..3 {
            reading.moved(1).unwrap();
            let Some(NodeEvent::Report(of, message)) = inbox.recv().await else { panic!("nothing is told") };
            assert_eq!(of, key);
            let key = RunKey { job: JobId(3), generation: Generation(2) };
            assert_eq!(*message, FromCompNode::Reading { key, done: 0, total: 0 });
        }
        // It stands still, and ends.
        sleep(20 * every).await;
        drop(reading);
        telling.await.unwrap();
        assert!(inbox.recv().await.is_none());
    }
}
