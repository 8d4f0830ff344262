//! Snapshots to others.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use fusionllm_planner::NodeIndex;
use fusionllm_protocol::{LoanFrame, PeerFrame, Snapshot, StateKind, TensorName, decode, encode};
use fusionllm_transport::{FrameSink, Session};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::timeout;

use super::SnapshotStore;
use crate::ShardError;
use crate::checkpoint::{ShardFile, StreamError, send_content};

/// Largest frame with which a snapshot is asked for: it may name all parameters of a large model.
const REQUEST_BYTES: u64 = 1 << 20;
/// A stream that does not say what it wants for this long is dropped.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// Streams of one connection that are served at once.
const AT_ONCE: usize = 4;

/// Serves a connection that was opened to fetch snapshots, until it ends.
pub(crate) async fn serve(store: Arc<SnapshotStore>, session: Session) {
    let mut serving = JoinSet::new();
    while let Ok((sink, mut source)) = session.accept_bi().await {
        while serving.try_join_next().is_some() {}
        if serving.len() >= AT_ONCE {
            continue;
        }
        let (store, peer) = (Arc::clone(&store), session.peer());
        serving.spawn(async move {
            let first = timeout(REQUEST_LIMIT, source.recv_limited(REQUEST_BYTES)).await;
            let Ok(Ok(Some(frame))) = first else { return };
            let Ok(PeerFrame::Loan(LoanFrame::Fetch { snapshot, params })) = decode(&frame) else { return };
            let may = store.is_lent(snapshot.id.key.job, peer);
            if let Err(error) = lend(&store, may, snapshot, params, sink).await {
                tracing::debug!(%peer, %error, "a snapshot that was lent broke off");
            }
        });
    }
}

/// Answers one request by the snapshot, or by why it does not come.
///
/// # Errors
/// [`StreamError`] if the stream is lost or the file does not read.
pub(crate) async fn lend(
    store: &Arc<SnapshotStore>,
    may: bool,
    snapshot: Snapshot,
    params: Option<Vec<String>>,
    mut sink: FrameSink,
) -> Result<(), StreamError> {
    // Each reads and perhaps writes a file as large as a part.
    let _one_of_few = store.loan().await;
    // Bulk gives way to OP-Data.
    sink.set_priority(-10);
    let found = match may {
        true => {
            let store = Arc::clone(store);
            let found = spawn_blocking(move || wanted(&store, &snapshot, params)).await;
            found.map_err(crate::panics::join_message).and_then(|found| found.map_err(|e| e.to_string()))
        }
        false => Err("its snapshots are not lent to you".to_owned()),
    };
    let (answer, shard) = match found {
        Ok(Some(shard)) => (LoanFrame::Lent { bytes: shard.bytes() }, Some(shard)),
        Ok(None) => (LoanFrame::NotLent { reason: "it is not here".to_owned(), is_early: false }, None),
        Err(reason) => (LoanFrame::NotLent { reason, is_early: !may }, None),
    };
    let Ok(frame) = encode(&answer) else { return Ok(()) };
    sink.send(&frame).await?;
    if let Some(shard) = shard {
        send_content(&mut sink, &Arc::new(shard)).await?;
    }
    Ok(sink.finish().await?)
}

/// A snapshot, or the part of it that is wanted; nothing if it is not here.
fn wanted(
    store: &SnapshotStore,
    snapshot: &Snapshot,
    params: Option<Vec<String>>,
) -> Result<Option<ShardFile>, ShardError> {
    // Of others' parts, which the owner guards, it has nothing to keep.
    let is_owners = snapshot.id.node == NodeIndex::DATA_OWNER;
    let kept_back = store.kept_back(snapshot.id.key.job).filter(|_| is_owners);
    let asks_for_it = |kept: &BTreeSet<String>| params.iter().flatten().any(|param| kept.contains(param));
    if kept_back.as_ref().is_some_and(|kept| params.is_none() || asks_for_it(kept)) {
        return Err(ShardError::Format { reason: "what is asked for stays with the owner of private data".to_owned() });
    }
    let Some(whole) = store.open_file(snapshot)? else { return Ok(None) };
    let Some(params) = params else { return Ok(Some(whole)) };
    let names = params.iter().flat_map(|param| {
        let states = StateKind::ALL.into_iter().map(|kind| TensorName::State { kind, param }.to_string());
        states.chain([param.clone()])
    });
    let names: BTreeSet<String> = names.collect();
    // What was held back of the owner's messages tells more of them than they did.
    let lends_residuals = kept_back.is_none();
    let is_wanted = |name: &str| names.contains(name) || lends_residuals && TensorName::is_residual(name);
    whole.part(store.part(snapshot.bytes)?, is_wanted).map(Some)
}

#[cfg(test)]
mod tests {
    use fusionllm_protocol::{Generation, JobId, RunKey, SnapshotId};
    use fusionllm_transport::PeerId;

    use super::*;
    use crate::checkpoint::write_shard;
    use crate::executor::{NamedTensor, TensorSource};

    #[test]
    fn what_stays_with_the_owner_of_private_data_is_not_lent() {
        let base = tempfile::tempdir().unwrap();
        let store = SnapshotStore::open(base.path(), PeerId::from_bytes([7; 32]), "n").unwrap();
        let put = |node: u32| {
            let tensor = |name: &str| NamedTensor { name: name.to_owned(), shape: vec![1], values: vec![1.0] };
            let residual = "residual.gradient.x>y".to_owned();
            let key = RunKey { job: JobId(1), generation: Generation(1) };
            let new = store.begin(100).unwrap();
            new.file().unwrap().append(&write_shard(&["a", "b", residual.as_str()].map(tensor)).unwrap()).unwrap();
            (store.keep(SnapshotId { key, step: 1, node: NodeIndex(node) }, new).unwrap(), residual)
        };
        let ((owners, residual), (others, _)) = (put(0), put(1));
        let ask = |snapshot, params: Option<&[&str]>| {
            let params = params.map(|params| params.iter().map(|&param| param.to_owned()).collect());
            let mut part =
                wanted(&store, snapshot, params).map_err(|e| e.to_string())?.unwrap().into_tensors().unwrap();
            let has = |name: &&str| part.take(name).unwrap().is_some();
            Ok::<Vec<&str>, String>(["a", "b", residual.as_str()].into_iter().filter(has).collect())
        };
        assert_eq!(ask(&owners, Some(["a"].as_slice())), Ok(vec!["a", residual.as_str()]));
        store.keep_back(JobId(1), BTreeSet::from(["a".to_owned()])).unwrap();
        for params in [None, Some(["a"].as_slice()), Some(["b", "a"].as_slice())] {
            assert!(ask(&owners, params).unwrap_err().contains("stays with the owner"), "{params:?}");
        }
        assert_eq!(ask(&owners, Some(["b"].as_slice())), Ok(vec!["b"]), "and not what was held back");
        assert_eq!(ask(&others, None).unwrap().len(), 3, "what it guards");
    }
}
