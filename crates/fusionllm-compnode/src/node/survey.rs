//! What the broker asks this CompNode to measure: its device, the ops of a job, the links to others.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fusionllm_graph::OpDag;
use fusionllm_planner::{LinkProfile, Measured};
use fusionllm_protocol::{CpuShare, DeviceProfile, FromCompNode, JobView, PairProfile, PeerRecord};
use fusionllm_transport::{DirectionSpeed, Endpoint, PairSpeed, PeerId, Purpose, Session, answer_probe, probe};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet, spawn_blocking};
use tokio::time::timeout;

use super::NodeEvent;
use crate::CompNodeError;
use crate::backend::{Backend, MeasureSpec, check_ops};
use crate::links::{peer_addr, unreached};
use crate::optimizer::OptimizerSpec;
use crate::profile::{ProfileCache, check_room, host_free, host_name, work_of};
use crate::stop::StopFlag;

/// What this CompNode measures with.
#[derive(Clone, Debug)]
pub(super) struct Surveyor {
    pub(super) backend: Arc<dyn Backend>,
    /// Where results are kept; nothing: nowhere.
    pub(super) folder: Option<PathBuf>,
    /// Memory that a job may fill, if that was said.
    pub(super) memory_bytes: Option<u64>,
    /// Measurements of ops that have not ended, by request.
    pub(super) measuring: Arc<Mutex<BTreeMap<u64, StopFlag>>>,
}

/// How long a measurement waits for the job or the measurement before it: each ends with the op at hand.
const RELEASE_LIMIT: Duration = Duration::from_secs(60);

impl Surveyor {
    /// The device's profile, out of the file if it is there. For a blocking thread.
    ///
    /// # Errors
    /// [`CompNodeError`] if the device fails.
    pub(super) fn device(&self) -> Result<DeviceProfile, CompNodeError> {
        let mut cache = ProfileCache::open(self.folder.as_deref(), self.backend.name());
        let speed = match cache.speed() {
            Some(speed) => speed,
            None => {
                let speed = self.backend.measure_speed()?;
                cache.set_speed(speed);
                speed
            }
        };
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = rayon::current_num_threads();
        let share = CpuShare { lanes: cores as f64 / threads as f64, threads: threads as u32 };
        Ok(DeviceProfile {
            flop_per_s: speed.flop_per_s,
            memory_bytes_per_s: speed.memory_bytes_per_s,
            memory_bytes: self.memory_bytes.or_else(|| self.backend.free_bytes()),
            host: host_name(),
            cpu: self.backend.is_cpu().then_some(share),
            kernels: self.backend.kernels(),
        })
    }

    /// Bytes that a job may fill now, if that is known.
    pub(super) fn room(&self) -> Option<u64> {
        match (self.memory_bytes, self.backend.free_bytes()) {
            (Some(allowed), Some(free)) => Some(allowed.min(free)),
            (allowed, free) => allowed.or(free),
        }
    }

    /// Tells the broker what a job may fill now. Asking may take a moment: some devices have a tool for it.
    pub(super) fn tell_room(&self, events: mpsc::Sender<NodeEvent>) {
        let surveyor = self.clone();
        spawn_blocking(move || {
            if let Some(bytes) = surveyor.room() {
                // If the loop is gone, or has too much to do, the next time will do.
                let _ = events.try_send(NodeEvent::Tell(Box::new(FromCompNode::Room { bytes })));
            }
        });
    }

    /// Bytes of the machine's memory that are free, where the device has memory of its own.
    pub(super) fn host_room(&self) -> Option<u64> {
        (!self.backend.is_cpu()).then(host_free)
    }

    /// What the ops of a job take, out of the file if it is there. For a blocking thread.
    fn ops(&self, job: &JobView, graph: &str, stop: &StopFlag) -> Result<Measured, CompNodeError> {
        let dag = Arc::new(OpDag::from_json(graph)?);
        check_ops(self.backend.as_ref(), &dag)?;
        let batch = job.train.micro_batch_size() as usize;
        let mut cache = ProfileCache::open(self.folder.as_deref(), self.backend.name());
        let work = format!("{}: {}", job.train.measuring(), work_of(&dag, batch));
        if let Some(measured) = cache.job(&work) {
            return Ok(measured);
        }
        let room = self.room();
        if let Some(room) = room {
            check_room(&dag, batch, room)?;
        }
        let optimizer = OptimizerSpec::of(&job.train);
        let spec = MeasureSpec { batch, optimizer, free_bytes: room, precision: job.train.precision };
        let measured = self.backend.measure_ops(&dag, &spec, stop)?;
        cache.set_job(&work, measured.clone());
        Ok(measured)
    }

    /// Measures the ops of a job on a thread of its own and tells the broker, unless it is cancelled.
    pub(super) fn start_ops(
        &self,
        request: u64,
        job: JobView,
        graph: String,
        memory: Arc<Semaphore>,
        events: mpsc::Sender<NodeEvent>,
    ) {
        let (surveyor, stop) = (self.clone(), StopFlag::default());
        self.lock().insert(request, stop.clone());
        tokio::spawn(async move {
            let measuring = surveyor.clone();
            let result = match timeout(RELEASE_LIMIT, memory.acquire_owned()).await {
                Ok(Ok(permit)) => {
                    let measured = spawn_blocking(move || {
                        let measured = measuring.ops(&job, &graph, &stop);
                        drop(permit);
                        measured
                    });
                    measured.await.unwrap_or_else(|e| Err(e.into()))
                }
                Ok(Err(_)) | Err(_) => Err(CompNodeError::MemoryHeld { limit_s: RELEASE_LIMIT.as_secs() }),
            };
            if surveyor.lock().remove(&request).is_none() {
                tracing::info!(request, "measuring the ops of a job was cancelled");
                return;
            }
            let result = result.map_err(|e| e.to_string());
            // If the loop is gone nobody needs the result.
            let _ = events.send(NodeEvent::Tell(Box::new(FromCompNode::Measured { request, result }))).await;
        });
    }

    /// Ends a measurement of ops. It answers nothing.
    pub(super) fn cancel(&self, request: u64) {
        if let Some(stop) = self.lock().remove(&request) {
            stop.set();
        }
    }

    /// Ends all measurements of ops: a job needs the device.
    pub(super) fn cancel_all(&self) {
        std::mem::take(&mut *self.lock()).into_values().for_each(|stop| stop.set());
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, StopFlag>> {
        self.measuring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Probes of links with others: who may dial in order to make one, and those that are under way.
#[derive(Debug, Default)]
pub(super) struct Probes {
    awaited: BTreeSet<PeerId>,
    answering: JoinSet<()>,
    /// By the broker's number.
    leading: Vec<(u64, AbortHandle)>,
}

impl Probes {
    pub(super) fn expect(&mut self, peer: &PeerRecord) {
        self.awaited.insert(PeerId::from_bytes(peer.id));
    }

    pub(super) fn peers(&self) -> impl Iterator<Item = PeerId> + '_ {
        self.awaited.iter().copied()
    }

    /// Answers a connection that is a probe, if the peer was expected to make one.
    pub(super) fn answer(&mut self, session: Session) {
        if !self.awaited.remove(&session.peer()) {
            return session.close(404, "no probe is expected");
        }
        while self.answering.try_join_next().is_some() {}
        self.answering.spawn(async move {
            if let Err(error) = answer_probe(&session).await {
                tracing::debug!(peer = %session.peer(), %error, "a probe broke off");
            }
            session.close(0, "probe done");
        });
    }

    /// Dials a peer, measures both directions, and tells the broker.
    pub(super) fn lead(&mut self, number: u64, peer: &PeerRecord, endpoint: Endpoint, events: mpsc::Sender<NodeEvent>) {
        let addr = peer_addr(peer);
        let probing = tokio::spawn(async move {
            let measured = async {
                let session = endpoint.connect_for(&addr, Purpose::Probe).await.map_err(|e| unreached(&e))?;
                let speeds = probe(&session).await.map_err(|e| e.to_string());
                session.close(0, "probe done");
                speeds
            };
            let profile = |pair: PairSpeed| PairProfile {
                there: link(pair.there),
                back: link(pair.back),
                relayed: pair.is_relayed,
            };
            let result = measured.await.map(profile);
            // If the loop is gone nobody needs the result.
            let _ = events.send(NodeEvent::Tell(Box::new(FromCompNode::Probed { probe: number, result }))).await;
        });
        self.leading.retain(|(_, probing)| !probing.is_finished());
        self.leading.push((number, probing.abort_handle()));
    }

    /// Ends all, since a job needs the links. What the broker is told of those that it waits for.
    pub(super) fn end(&mut self) -> Vec<FromCompNode> {
        self.awaited.clear();
        self.answering.abort_all();
        let leading = std::mem::take(&mut self.leading).into_iter().filter(|(_, probing)| !probing.is_finished());
        let ended = leading.map(|(probe, probing)| {
            probing.abort();
            FromCompNode::Probed { probe, result: Err("a job needs the link".to_owned()) }
        });
        ended.collect()
    }
}

fn link(speed: DirectionSpeed) -> LinkProfile {
    LinkProfile { latency_s: speed.latency.as_secs_f64(), bytes_per_s: speed.bytes_per_s.max(1.0) }
}
