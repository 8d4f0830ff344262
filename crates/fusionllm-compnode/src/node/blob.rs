//! Weights from the broker, and shards to it.

use fusionllm_protocol::{BlobHeader, BlobKind, decode, encode};
use fusionllm_transport::{FrameSource, Session};

use super::assignment::JobKey;
use crate::CompNodeError;
use crate::checkpoint::read_shard;
use crate::executor::NamedTensor;

/// Content frames of a blob: small beside memory, large beside a packet.
const CHUNK_BYTES: usize = 1 << 20;

/// Receives the weights of job `key`.
pub(super) async fn receive_weights(mut stream: FrameSource, key: JobKey) -> Result<Vec<NamedTensor>, CompNodeError> {
    let fail = |reason: String| CompNodeError::Broker { reason: format!("weights: {reason}") };
    let first = stream.recv_limited(CHUNK_BYTES as u64).await.map_err(|e| fail(e.to_string()))?;
    let header: BlobHeader = decode(&first.ok_or_else(|| fail("empty stream".to_owned()))?)?;
    if (header.job, header.generation) != (key.job, key.generation) || header.kind != BlobKind::Weights {
        return Err(fail("of another job".to_owned()));
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.recv_limited(CHUNK_BYTES as u64).await.map_err(|e| fail(e.to_string()))? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() as u64 > header.bytes {
            return Err(fail(format!("more than the {} bytes announced", header.bytes)));
        }
    }
    if (bytes.len() as u64) < header.bytes {
        return Err(fail(format!("{} of {} bytes came", bytes.len(), header.bytes)));
    }
    Ok(tokio::task::spawn_blocking(move || read_shard(&bytes)).await??)
}

/// Sends one blob and waits until the broker has it.
pub(super) async fn send(broker: &Session, header: BlobHeader, bytes: &[u8]) -> Result<(), CompNodeError> {
    let fail =
        |e: fusionllm_transport::SessionError| CompNodeError::Broker { reason: format!("checkpoint shard: {e}") };
    let mut sink = broker.open_uni().await.map_err(fail)?;
    // Bulk gives way to heartbeats and OP-Data.
    sink.set_priority(-10);
    sink.send(&encode(&header)?).await.map_err(fail)?;
    for chunk in bytes.chunks(CHUNK_BYTES) {
        sink.send(chunk).await.map_err(fail)?;
    }
    sink.finish().await.map_err(fail)
}
