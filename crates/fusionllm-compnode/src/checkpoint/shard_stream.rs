//! A shard's content over a stream, in frames of [`CHUNK_BYTES`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fusionllm_transport::{FrameSink, FrameSource, SessionError};
use tokio::task::spawn_blocking;

use super::{CHUNK_BYTES, ShardFile};
use crate::ShardError;

/// Why a shard did not get over a stream.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    /// The stream is lost: another one may do.
    #[error(transparent)]
    Lost(#[from] SessionError),
    /// The file does not read or write.
    #[error(transparent)]
    File(#[from] ShardError),
    /// It is not as long as was announced.
    #[error("{came} bytes came where {announced} were announced")]
    Length {
        /// Bytes that were announced.
        announced: u64,
        /// Bytes that came before that was noticed.
        came: u64,
    },
}

/// Works on a file where that holds up nothing else.
async fn with_file<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ShardError> + Send + 'static,
) -> Result<T, ShardError> {
    let ended = |e| ShardError::Device(crate::ExecutorError::Internal { what: crate::panics::join_message(e) });
    spawn_blocking(work).await.map_err(ended)?
}

/// Sends all of a shard.
///
/// # Errors
/// [`StreamError`] if the stream is lost or the file cannot be read; the stream must not be ended as if it were whole then.
pub(crate) async fn send_content(sink: &mut FrameSink, shard: &Arc<ShardFile>) -> Result<(), StreamError> {
    // The one buffer goes back and forth: one thread takes it and another would free it, which the allocator notices late.
    let (mut start, mut chunk) = (0, Vec::with_capacity(CHUNK_BYTES));
    while start < shard.bytes() {
        let file = Arc::clone(shard);
        chunk = with_file(move || file.chunk(start, chunk)).await?;
        if chunk.is_empty() {
            return Err(StreamError::Length { announced: shard.bytes(), came: start });
        }
        start += chunk.len() as u64;
        sink.send(&chunk).await?;
    }
    Ok(())
}

/// Receives a shard of so many bytes into an empty file. `arrived` is told how many of them lie there.
///
/// # Errors
/// [`StreamError`] if the stream is lost, has another length, or the file cannot be written.
pub(crate) async fn receive_content(
    source: &mut FrameSource,
    announced: u64,
    mut shard: ShardFile,
    arrived: &AtomicU64,
) -> Result<ShardFile, StreamError> {
    arrived.store(0, Ordering::Relaxed);
    while let Some(chunk) = source.recv_limited(CHUNK_BYTES as u64).await? {
        shard = with_file(move || shard.append(&chunk).map(|()| shard)).await?;
        arrived.store(shard.bytes(), Ordering::Relaxed);
        if shard.bytes() > announced {
            break;
        }
    }
    match shard.bytes() {
        came if came == announced => Ok(shard),
        came => Err(StreamError::Length { announced, came }),
    }
}
