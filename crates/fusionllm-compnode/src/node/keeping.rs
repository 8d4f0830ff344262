//! The snapshots that a job takes, guards for others, and begins with.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fusionllm_protocol::{FromCompNode, Snapshot, SnapshotId, SnapshotSource};
use fusionllm_transport::{ConnectError, Endpoint, PeerAddr, Purpose, Session};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};

use super::NodeEvent;
use crate::CompNodeError;
use crate::checkpoint::ShardFile;
use crate::links::{JobLinks, peer_addr};
use crate::snapshots::{FetchError, NewSnapshot, SnapshotStore, fetch};

/// Who lends a snapshot and of which nothing new has come for this long is given up.
const PATIENCE: Duration = Duration::from_secs(45);
/// Pause before a lender is asked again.
const PAUSE: Duration = Duration::from_millis(300);

/// Fetches from one lender.
struct Lender {
    endpoint: Endpoint,
    addr: PeerAddr,
    /// The wires of the job, whose connection to the lender is used if there is one: what trains goes first there.
    links: Option<Arc<JobLinks>>,
}

impl Lender {
    /// The connection to fetch over, and whether it was opened for that.
    async fn connect(&self) -> Result<(Session, bool), ConnectError> {
        if let Some(session) = self.links.as_ref().and_then(|links| links.session_with(self.addr.id)) {
            return Ok((session, false));
        }
        let session = self.endpoint.connect_for(&self.addr, Purpose::State).await;
        session.map(|session| (session, true))
    }

    /// A snapshot, or these parameters of it, in a file that `begin` makes. After a break it is fetched again, as long as
    /// each time brings more than the ones before.
    async fn fetch(
        &self,
        snapshot: Snapshot,
        params: Option<&Vec<String>>,
        begin: impl Fn() -> Result<ShardFile, CompNodeError>,
        arrived: &AtomicU64,
    ) -> Result<ShardFile, CompNodeError> {
        let (mut most, mut progress) = (0, Instant::now());
        loop {
            let reason = match self.connect().await {
                Ok((session, is_ours)) => {
                    let fetching = fetch(&session, snapshot, params.cloned(), begin()?, arrived);
                    let fetched = while_it_comes(fetching, arrived).await;
                    if is_ours {
                        session.close(0, "fetched");
                    }
                    match fetched {
                        Ok(shard) => return Ok(shard),
                        Err(error) if error.is_worth_another_try() => error.to_string(),
                        Err(FetchError::Stream(crate::checkpoint::StreamError::File(error))) => {
                            return Err(error.into());
                        }
                        Err(error) => return Err(lost(&snapshot, &error.to_string())),
                    }
                }
                Err(error) => error.to_string(),
            };
            let come = arrived.load(Ordering::Relaxed);
            if come > most {
                (most, progress) = (come, Instant::now());
            }
            if progress.elapsed() > PATIENCE {
                return Err(lost(&snapshot, &reason));
            }
            tracing::debug!(reason, step = snapshot.id.step, "a snapshot broke off and is fetched again");
            sleep(PAUSE).await;
        }
    }
}

/// What is fetched, unless nothing more of it comes for [`PATIENCE`].
async fn while_it_comes<T>(
    fetching: impl Future<Output = Result<T, FetchError>>,
    arrived: &AtomicU64,
) -> Result<T, FetchError> {
    tokio::pin!(fetching);
    let mut before = None;
    loop {
        tokio::select! {
            biased;
            fetched = &mut fetching => return fetched,
            () = sleep(PATIENCE) => {
                let come = Some(arrived.load(Ordering::Relaxed));
                if std::mem::replace(&mut before, come) == come {
                    return Err(FetchError::NotLent(format!("nothing came for {} s", PATIENCE.as_secs())));
                }
            }
        }
    }
}

fn lost(snapshot: &Snapshot, reason: &str) -> CompNodeError {
    CompNodeError::Snapshot { step: snapshot.id.step, reason: reason.to_owned() }
}

/// All that an assignment begins with: files of its own, and what others lend.
pub(super) async fn gather(
    sources: Vec<SnapshotSource>,
    store: Arc<SnapshotStore>,
    endpoint: Endpoint,
    arrived: Arc<AtomicU64>,
    events: mpsc::Sender<NodeEvent>,
) -> Result<Vec<ShardFile>, CompNodeError> {
    let mut files = Vec::with_capacity(sources.len());
    for source in sources {
        let id = source.snapshot.id;
        match found(source, &store, &endpoint, &arrived).await {
            Ok(file) => files.push(file),
            Err(error) => {
                // Before it says that it failed: where this one lay, it is not looked for again.
                let _ = events.send(NodeEvent::Tell(Box::new(failed(id, &error)))).await;
                return Err(error);
            }
        }
    }
    Ok(files)
}

/// The file of one source.
async fn found(
    SnapshotSource { snapshot, from, params }: SnapshotSource,
    store: &Arc<SnapshotStore>,
    endpoint: &Endpoint,
    arrived: &AtomicU64,
) -> Result<ShardFile, CompNodeError> {
    match from {
        None => {
            let store = Arc::clone(store);
            let own = spawn_blocking(move || store.open_file(&snapshot)).await??;
            own.ok_or_else(|| lost(&snapshot, "it is not here any more"))
        }
        Some(peer) => {
            let lender = Lender { endpoint: endpoint.clone(), addr: peer_addr(&peer), links: None };
            lender.fetch(snapshot, Some(&params), || Ok(store.part(snapshot.bytes)?), arrived).await
        }
    }
}

/// Becomes the guardian of a snapshot of somebody else on the same job. Gives what the broker is told.
pub(super) async fn guard(
    snapshot: Snapshot,
    addr: PeerAddr,
    links: Arc<JobLinks>,
    store: Arc<SnapshotStore>,
    endpoint: Endpoint,
) -> FromCompNode {
    let began = Instant::now();
    let lender = Lender { endpoint, addr, links: Some(links) };
    let guarded = async {
        let new = store.begin(snapshot.bytes)?;
        lender.fetch(snapshot, None, || Ok(new.file()?), &AtomicU64::new(0)).await?;
        let store = Arc::clone(&store);
        Ok(spawn_blocking(move || store.keep_fetched(snapshot, new)).await??)
    };
    match guarded.await {
        Ok(()) => FromCompNode::Holds { snapshot, cost_s: began.elapsed().as_secs_f64() },
        Err(error) => failed(snapshot.id, &error),
    }
}

/// Gives a snapshot that was written its name, and tells the broker.
pub(super) async fn settle(
    id: SnapshotId,
    new: NewSnapshot,
    cost: Duration,
    store: Arc<SnapshotStore>,
    events: mpsc::Sender<NodeEvent>,
) {
    let kept = spawn_blocking(move || store.keep(id, new)).await;
    let message = match kept.map_err(CompNodeError::from).and_then(|kept| Ok(kept?)) {
        Ok(snapshot) => FromCompNode::Holds { snapshot, cost_s: cost.as_secs_f64() },
        Err(error) => failed(id, &error),
    };
    // If the loop is gone nobody needs to know.
    let _ = events.send(NodeEvent::Tell(Box::new(message))).await;
}

/// The message that there is no such snapshot.
pub(super) fn failed(id: SnapshotId, error: &CompNodeError) -> FromCompNode {
    FromCompNode::SnapshotFailed { id, is_late: false, reason: error.to_string() }
}
