//! Checkpoint shards from CompNodes, and weights to them.

use std::sync::Arc;

use fusionllm_planner::NodeIndex;
use fusionllm_protocol::{BlobHeader, BlobKind, decode, encode};
use fusionllm_transport::{FrameSource, Session};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use super::actor::Command;
use super::{Handle, blocking};
use crate::BrokerError;
use crate::checkpoint::{ShardHash, ShardPlace, StoredShard, TensorSet, make_partial, shard_name};
use crate::core::{ConnectionId, CoreEvent, RunKey};
use crate::run_dir::io_error;

/// Content frames: small beside memory, large beside a packet.
const CHUNK_BYTES: usize = 1 << 20;
/// Bulk gives way to heartbeats and control messages.
const BULK_PRIORITY: i32 = -10;

/// Receives every shard that a CompNode sends, until its connection ends.
pub(super) async fn receive_all(connection: ConnectionId, session: &Session, handle: &Handle, tasks: &mut JoinSet<()>) {
    while let Ok(stream) = session.accept_uni().await {
        while tasks.try_join_next().is_some() {}
        let handle = handle.clone();
        tasks.spawn(async move {
            if let Err(reason) = receive(connection, stream, &handle).await {
                tracing::warn!(?connection, reason, "dropped a checkpoint shard");
            }
        });
    }
}

/// Receives one shard. If it cannot be kept there is no checkpoint of its step; what nobody asked for is dropped.
async fn receive(connection: ConnectionId, mut stream: FrameSource, handle: &Handle) -> Result<(), String> {
    let first = stream.recv_limited(CHUNK_BYTES as u64).await.map_err(|e| e.to_string())?;
    let header: BlobHeader = decode(&first.ok_or("it is empty")?).map_err(|e| e.to_string())?;
    let BlobKind::Shard { step, node } = header.kind else { return Err("it is no shard".to_owned()) };
    let asked = header.clone();
    let wanted = handle.ask(|reply| Command::WantsShard { connection, header: asked, reply }).await;
    if !wanted.unwrap_or(false) {
        return Err("nobody waits for it".to_owned());
    }
    let key = RunKey { job: header.job, generation: header.generation };
    // Only once the run is open is it settled where its checkpoints lie, and what earlier ones left is gone.
    let place = handle.open_runs.place(key).await.ok_or("its run is not open")?;
    let event = match store(stream, &header, &place, step, node).await {
        Ok(shard) => CoreEvent::ShardStored { key, step, node, shard },
        // After a break it is sent again.
        Err(Dropped::Lost(reason)) => return Err(reason),
        Err(Dropped::Unusable(reason)) => CoreEvent::CheckpointFailed { key, step, reason },
    };
    // If the actor is gone it needs no word.
    let _ = handle.commands.send(Command::Event(event)).await;
    Ok(())
}

/// Why a shard was not kept.
enum Dropped {
    /// Its connection broke.
    Lost(String),
    /// It is not what was announced, or cannot be written.
    Unusable(String),
}

async fn store(
    mut stream: FrameSource,
    header: &BlobHeader,
    place: &ShardPlace,
    step: u64,
    node: NodeIndex,
) -> Result<StoredShard, Dropped> {
    let folder = place.partial(step, header.generation);
    let path = folder.join(shard_name(node));
    let run = place.run.clone();
    blocking(move || make_partial(&folder, &run)).await.map_err(|e| Dropped::Unusable(e.to_string()))?;
    let io = |e: std::io::Error| Dropped::Unusable(io_error(&path, e).to_string());
    let mut file = File::create(&path).await.map_err(io)?;
    let mut hash = ShardHash::default();
    let mut got = 0;
    while let Some(chunk) = stream.recv_limited(CHUNK_BYTES as u64).await.map_err(|e| Dropped::Lost(e.to_string()))? {
        got += chunk.len() as u64;
        if got > header.bytes {
            return Err(Dropped::Unusable(format!("more than the {} bytes announced", header.bytes)));
        }
        hash.update(&chunk);
        file.write_all(&chunk).await.map_err(io)?;
    }
    if got < header.bytes {
        return Err(Dropped::Unusable(format!("{got} of {} bytes came", header.bytes)));
    }
    // Syncing alone forgets what became of the write that is still under way.
    file.flush().await.map_err(io)?;
    file.sync_all().await.map_err(io)?;
    let (blake3, not_finite) = hash.finish();
    Ok(StoredShard { bytes: got, blake3, not_finite })
}

/// Sends a CompNode its parameters, and their optimizer state if there is one.
pub(super) async fn send_weights(
    session: &Session,
    key: RunKey,
    params: Vec<String>,
    from: Arc<TensorSet>,
    handle: &Handle,
) -> Result<(), String> {
    let state_dir = Arc::clone(&handle.state_dir);
    let gathered = blocking(move || {
        let file = tempfile::NamedTempFile::new_in(&state_dir).map_err(|e| io_error(&state_dir, e))?;
        let bytes = from.write_part(&params, file.path()).map_err(BrokerError::from)?;
        Ok((file, bytes))
    });
    let (file, bytes) = gathered.await.map_err(|e| e.to_string())?;
    let io = |e: std::io::Error| io_error(file.path(), e).to_string();
    let mut content = File::open(file.path()).await.map_err(io)?;
    let mut sink = session.open_uni().await.map_err(|e| e.to_string())?;
    sink.set_priority(BULK_PRIORITY);
    let header = BlobHeader { job: key.job, generation: key.generation, kind: BlobKind::Weights, bytes };
    sink.send(&encode(&header).map_err(|e| e.to_string())?).await.map_err(|e| e.to_string())?;
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let count = content.read(&mut chunk).await.map_err(io)?;
        if count == 0 {
            return sink.finish().await.map_err(|e| e.to_string());
        }
        sink.send(chunk.get(..count).unwrap_or_default()).await.map_err(|e| e.to_string())?;
    }
}
