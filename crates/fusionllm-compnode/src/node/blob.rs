//! Weights from the broker, and shards to it.

use std::collections::VecDeque;
use std::time::Duration;

use fusionllm_protocol::{BlobHeader, BlobKind, decode, encode};
use fusionllm_transport::{FrameSource, Session, SessionError};
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::NodeEvent;
use super::assignment::JobKey;
use crate::CompNodeError;
use crate::checkpoint::read_shard;
use crate::executor::NamedTensor;

/// Content frames of a blob: small beside memory, large beside a packet.
const CHUNK_BYTES: usize = 1 << 20;

/// A stream that does not say whose weights it has for this long is dropped.
const HEADER_LIMIT: Duration = Duration::from_secs(30);
/// Weights that wait for their assignments. One is right; more are left of assignments that were taken back.
const MOST_UNCLAIMED: usize = 4;

/// Weights that the broker begins to send.
pub(crate) struct Incoming {
    header: BlobHeader,
    stream: FrameSource,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming").field("header", &self.header).finish_non_exhaustive()
    }
}

/// Reads whose weights a stream has, and tells the loop.
pub(super) fn announce(mut stream: FrameSource, events: mpsc::Sender<NodeEvent>) {
    tokio::spawn(async move {
        let first = timeout(HEADER_LIMIT, stream.recv_limited(CHUNK_BYTES as u64)).await;
        let Ok(Ok(Some(frame))) = first else { return };
        match decode::<BlobHeader>(&frame) {
            Ok(header) if header.kind == BlobKind::Weights => {
                // If the loop is gone nobody needs them.
                let _ = events.send(NodeEvent::Weights(Box::new(Incoming { header, stream }))).await;
            }
            Ok(header) => tracing::warn!(?header, "dropped a stream of the broker that is no weights"),
            Err(error) => tracing::warn!(%error, "dropped a stream of the broker"),
        }
    });
}

/// Weights of assignments that are not here. Their assignments may be about to come, or were taken back.
#[derive(Debug, Default)]
pub(super) struct Unclaimed(VecDeque<Incoming>);

impl Unclaimed {
    pub(super) fn keep(&mut self, weights: Incoming) {
        self.0.push_back(weights);
        if self.0.len() > MOST_UNCLAIMED {
            self.0.pop_front();
        }
    }

    /// Those of this job. All others are of placements before it, and dropped.
    pub(super) fn take(&mut self, key: JobKey) -> Option<Incoming> {
        std::mem::take(&mut self.0).into_iter().find(|weights| weights.key() == key)
    }
}

impl Incoming {
    /// Whose weights these are.
    pub(crate) fn key(&self) -> JobKey {
        JobKey { job: self.header.job, generation: self.header.generation }
    }

    /// All of them; nothing if the connection was lost on the way.
    async fn receive(self) -> Result<Option<Vec<NamedTensor>>, CompNodeError> {
        let Self { header, mut stream } = self;
        let fail = |reason: String| CompNodeError::Broker { reason: format!("weights: {reason}") };
        let mut bytes = Vec::new();
        loop {
            match stream.recv_limited(CHUNK_BYTES as u64).await {
                Ok(Some(chunk)) => bytes.extend_from_slice(&chunk),
                Ok(None) => break,
                Err(error @ SessionError::TooLarge { .. }) => return Err(fail(error.to_string())),
                Err(error) => {
                    tracing::warn!(%error, "weights broke off and are waited for again");
                    return Ok(None);
                }
            }
            if bytes.len() as u64 > header.bytes {
                return Err(fail(format!("more than the {} bytes announced", header.bytes)));
            }
        }
        if (bytes.len() as u64) < header.bytes {
            return Err(fail(format!("{} of {} bytes came", bytes.len(), header.bytes)));
        }
        Ok(Some(spawn_blocking(move || read_shard(&bytes)).await??))
    }
}

/// The first weights that come whole. The broker sends them again after a connection that was lost.
pub(super) async fn receive_first_whole(
    mut streams: mpsc::Receiver<Incoming>,
) -> Result<Vec<NamedTensor>, CompNodeError> {
    while let Some(incoming) = streams.recv().await {
        if let Some(tensors) = incoming.receive().await? {
            return Ok(tensors);
        }
    }
    Err(CompNodeError::Broker { reason: "the weights did not come".to_owned() })
}

/// Sends one blob over whatever connection to the broker there is, again after one that was lost.
pub(super) async fn send_over(
    broker: &mut watch::Receiver<Option<Session>>,
    header: &BlobHeader,
    bytes: &[u8],
) -> Result<(), CompNodeError> {
    let gone = |_| CompNodeError::Broker { reason: "the CompNode leaves".to_owned() };
    let mut is_repeated = false;
    loop {
        let session = broker.wait_for(Option::is_some).await.map_err(gone)?.clone();
        let Some(session) = session else { continue };
        match send(&session, header, bytes).await {
            Ok(()) => return Ok(()),
            // It had come, only the word of it was lost.
            Err(SessionError::StreamEnded { .. }) if is_repeated => return Ok(()),
            Err(error @ (SessionError::StreamEnded { .. } | SessionError::TooLarge { .. })) => {
                return Err(CompNodeError::Broker { reason: format!("checkpoint shard: {error}") });
            }
            Err(error) => tracing::warn!(%error, "a checkpoint shard is sent again once the broker is back"),
        }
        is_repeated = true;
        let is_other = |now: &Option<Session>| now.as_ref().is_none_or(|now| !now.is_same(&session));
        broker.wait_for(is_other).await.map_err(gone)?;
    }
}

/// Sends one blob and waits until the broker has it.
async fn send(broker: &Session, header: &BlobHeader, bytes: &[u8]) -> Result<(), SessionError> {
    let mut sink = broker.open_uni().await?;
    // Bulk gives way to heartbeats and OP-Data.
    sink.set_priority(-10);
    let header = encode(header).map_err(|e| SessionError::Lost { reason: e.to_string() })?;
    sink.send(&header).await?;
    for chunk in bytes.chunks(CHUNK_BYTES) {
        sink.send(chunk).await?;
    }
    sink.finish().await
}
