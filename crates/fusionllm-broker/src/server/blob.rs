//! Checkpoint shards from CompNodes, and weights to them.

use std::io::Seek;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fusionllm_planner::NodeIndex;
use fusionllm_protocol::{BlobHeader, BlobKind, ProtocolError, RunKey, decode, encode};
use fusionllm_transport::{
    FileMode, FrameSource, Session, SessionError, Stands, temporary_for, without_temporary_name,
};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::command::{Command, NoPlace};
use super::handle::{Handle, blocking};
use crate::BrokerError;
use crate::checkpoint::{ShardHash, ShardPlace, StoredShard, TensorSet, make_partial, shard_name};
use crate::core::{Breach, ConnectionId, CoreEvent};
use crate::files::io_error;

/// Content frames: small beside memory, large beside a packet.
const CHUNK_BYTES: usize = 1 << 20;
/// How often the core hears that a shard is coming in.
const TELL_EVERY: Duration = Duration::from_secs(5);
/// Bulk gives way to heartbeats and control messages.
const BULK_PRIORITY: i32 = -10;

/// Receives every shard that a CompNode sends, one after the other, until its connection ends.
pub(super) async fn receive_all(connection: ConnectionId, session: &Session, handle: &Handle) {
    let mut last = None;
    while let Ok(stream) = session.accept_uni().await {
        match receive(connection, stream, handle).await {
            Ok(()) => last = None,
            Err(refusal) => {
                let reason = refusal.to_string();
                // On a full disk this goes on for every checkpoint, of which the job's notices tell.
                if last.as_ref() == Some(&reason) {
                    tracing::debug!(?connection, reason, "dropped a shard");
                } else {
                    tracing::warn!(?connection, reason, "dropped a checkpoint shard");
                    last = Some(reason);
                }
            }
        }
    }
}

/// Why a shard is not taken.
#[derive(Debug, thiserror::Error)]
enum ShardRefused {
    #[error("it is empty")]
    Empty,
    #[error("it is no shard")]
    NoShard,
    #[error("its run is not open")]
    NotOpen,
    #[error("nobody waits for it")]
    Unwanted,
    #[error(transparent)]
    Breach(#[from] Breach),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error(transparent)]
    Lost(#[from] SessionError),
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// Receives one shard and tells the CompNode that it need not keep it, but for one that broke off, which it sends again.
async fn receive(connection: ConnectionId, mut stream: FrameSource, handle: &Handle) -> Result<(), ShardRefused> {
    let first = stream.recv_limited(CHUNK_BYTES as u64).await?;
    let header: BlobHeader = decode(&first.ok_or(ShardRefused::Empty)?)?;
    let BlobKind::Shard { step, node } = header.kind else { return Err(ShardRefused::NoShard) };
    let asked = header.clone();
    let key = header.key;
    let comes = handle.ask(|reply| Command::WantsShard { connection, header: asked, reply }).await;
    let (event, result) = match comes? {
        Ok(true) => {
            // Only once the run is open is it settled where its checkpoints lie, and what earlier ones left is gone.
            let place = handle.open_runs.place(key).await.ok_or(ShardRefused::NotOpen)?;
            let stored = match in_its_place(place, key, step, handle).await {
                Ok(place) => store(stream, &header, &place, step, node, handle).await,
                Err(error) => Err(Dropped::Unwritten(error.to_string())),
            };
            let failed = |reason, may_pass| CoreEvent::CheckpointFailed { key, step, reason, may_pass };
            match stored {
                Ok(shard) => (Some(CoreEvent::ShardStored { key, step, node, shard }), Ok(())),
                Err(Dropped::Lost(error)) => return Err(error.into()),
                Err(Dropped::Unusable(reason)) => (Some(failed(reason, false)), Ok(())),
                Err(Dropped::Unwritten(reason)) => (Some(failed(reason, true)), Ok(())),
            }
        }
        Ok(false) => (None, Err(ShardRefused::Unwanted)),
        Err(breach) => {
            let reason = breach.to_string();
            (Some(CoreEvent::CheckpointFailed { key, step, reason, may_pass: false }), Err(breach.into()))
        }
    };
    // If the actor is gone it needs no word.
    if let Some(event) = event {
        let _ = handle.commands.send(Command::Event(event)).await;
    }
    let _ = handle.commands.send(Command::ShardSettled { connection, key, step }).await;
    result
}

/// Where shards go, if others have renamed, removed or replaced that folder since: nothing is written into what stands there.
async fn in_its_place(place: ShardPlace, key: RunKey, step: u64, handle: &Handle) -> Result<ShardPlace, NoPlace> {
    let looking = blocking(move || Ok((place.known().stands() == Stands::Itself).then_some(place)));
    match looking.await? {
        Some(place) => Ok(place),
        None => handle.ask(|reply| Command::PlaceShards { key, step, reply }).await?,
    }
}

/// Why a shard was not kept.
enum Dropped {
    /// Its connection broke.
    Lost(SessionError),
    /// It is not what was announced.
    Unusable(String),
    /// It cannot be written now.
    Unwritten(String),
}

async fn store(
    mut stream: FrameSource,
    header: &BlobHeader,
    place: &ShardPlace,
    step: u64,
    node: NodeIndex,
    handle: &Handle,
) -> Result<StoredShard, Dropped> {
    let folder = place.partial(step, header.key.generation);
    let path = folder.join(shard_name(node));
    let run = place.run.clone();
    blocking(move || make_partial(&folder, &run)).await.map_err(|e| Dropped::Unwritten(e.to_string()))?;
    let io = |e: std::io::Error| Dropped::Unwritten(io_error(&path, e).to_string());
    // A name of its own: a writer whose connection broke must not write into the shard that is sent again.
    let temporary = temporary_for(&path, FileMode::Shared).map_err(io)?;
    let (std_file, temporary) = temporary.into_parts();
    let mut file = File::from_std(std_file);
    let mut hash = ShardHash::default();
    let mut got = 0;
    let mut told = Instant::now();
    while let Some(chunk) = stream.recv_limited(CHUNK_BYTES as u64).await.map_err(Dropped::Lost)? {
        got += chunk.len() as u64;
        if got > header.bytes {
            return Err(Dropped::Unusable(format!("more than the {} bytes announced", header.bytes)));
        }
        hash.update(&chunk);
        file.write_all(&chunk).await.map_err(io)?;
        if told.elapsed() > TELL_EVERY {
            told = Instant::now();
            let key = header.key;
            // If the actor is gone it needs no word.
            let _ = handle.commands.send(Command::Event(CoreEvent::ShardComing { key })).await;
        }
    }
    if got < header.bytes {
        return Err(Dropped::Unusable(format!("{got} of {} bytes came", header.bytes)));
    }
    // Syncing alone forgets what became of the write that is still under way.
    file.flush().await.map_err(io)?;
    file.sync_all().await.map_err(io)?;
    temporary.persist(&path).map_err(|e| io(e.error))?;
    let (blake3, not_finite) = hash.finish();
    Ok(StoredShard { bytes: got, blake3, not_finite })
}

/// Why weights did not go out.
#[derive(Debug, thiserror::Error)]
pub(super) enum WeightsUnsent {
    #[error(transparent)]
    Broker(#[from] BrokerError),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error(transparent)]
    Lost(#[from] SessionError),
}

/// Sends a CompNode its parameters, and their optimizer state if there is one.
pub(super) async fn send_weights(
    session: &Session,
    key: RunKey,
    params: Vec<String>,
    from: Arc<TensorSet>,
    handle: &Handle,
) -> Result<(), WeightsUnsent> {
    let scratch = Arc::clone(&handle.scratch);
    let gathered = blocking(move || {
        // Without a name it is gone however this process ends.
        let mut file =
            tempfile::tempfile_in(&scratch).map_err(without_temporary_name).map_err(|e| io_error(&scratch, e))?;
        let bytes = from.write_part(&params, &mut file, &scratch).map_err(BrokerError::from)?;
        file.rewind().map_err(|e| io_error(&scratch, e))?;
        Ok((file, bytes))
    });
    let (file, bytes) = gathered.await?;
    let mut content = File::from_std(file);
    let mut sink = session.open_uni().await?;
    sink.set_priority(BULK_PRIORITY);
    let header = BlobHeader { key, kind: BlobKind::Weights, bytes };
    sink.send(&encode(&header)?).await?;
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let count = content.read(&mut chunk).await.map_err(|e| io_error(&handle.scratch, e))?;
        if count == 0 {
            return Ok(sink.finish().await?);
        }
        sink.send(chunk.get(..count).unwrap_or_default()).await?;
    }
}
