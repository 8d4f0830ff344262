//! Weights from the broker, and shards to it.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use fusionllm_protocol::{BlobHeader, BlobKind, RunKey, decode, encode};
use fusionllm_transport::{FrameSource, Session, SessionError};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::NodeEvent;
use crate::CompNodeError;
use crate::checkpoint::{CHUNK_BYTES, ShardFile, StreamError, receive_content, send_content};

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
    pub(super) fn take(&mut self, key: RunKey) -> Option<Incoming> {
        std::mem::take(&mut self.0).into_iter().find(|weights| weights.key() == key)
    }
}

impl Incoming {
    /// Whose weights these are.
    pub(crate) fn key(&self) -> RunKey {
        self.header.key
    }

    /// All of them, in a file in `folder`; nothing if the connection was lost on the way.
    /// `arrived` is told how many bytes of them lie there.
    async fn receive(self, folder: &Path, arrived: &AtomicU64) -> Result<Option<ShardFile>, CompNodeError> {
        let Self { header, mut stream } = self;
        let shard = ShardFile::empty(folder)?;
        match receive_content(&mut stream, header.bytes, shard, arrived).await {
            Ok(shard) => Ok(Some(shard)),
            Err(StreamError::File(error)) => Err(error.into()),
            Err(error @ (StreamError::Length { .. } | StreamError::Lost(SessionError::TooLarge { .. }))) => {
                Err(CompNodeError::Broker { reason: format!("weights: {error}") })
            }
            Err(StreamError::Lost(error)) => {
                tracing::warn!(%error, "weights broke off and are waited for again");
                Ok(None)
            }
        }
    }
}

/// The first weights that come whole. The broker sends them again after a connection that was lost.
pub(super) async fn receive_first_whole(
    mut streams: mpsc::Receiver<Incoming>,
    folder: &Path,
    arrived: &AtomicU64,
) -> Result<ShardFile, CompNodeError> {
    while let Some(incoming) = streams.recv().await {
        if let Some(weights) = incoming.receive(folder, arrived).await? {
            return Ok(weights);
        }
    }
    Err(CompNodeError::Broker { reason: "the weights did not come".to_owned() })
}

/// The step whose shard the broker wants once more, and how often it has said so of any.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Again {
    pub(super) step: u64,
    pub(super) times: u64,
}

impl Again {
    /// Whether it was said of this step since there were so many.
    pub(super) fn is_newer(self, step: u64, times: u64) -> bool {
        self.step == step && self.times > times
    }
}

/// The line to the broker, over whatever connection there is.
#[derive(Debug)]
pub(super) struct BrokerLine {
    pub(super) broker: watch::Receiver<Option<Session>>,
    /// The step whose shard the broker has last settled.
    pub(super) settled: watch::Receiver<u64>,
    pub(super) again: watch::Receiver<Again>,
}

impl BrokerLine {
    /// Sends the shard of a step, again after a connection that was lost or when the broker asks for it, until the broker says
    /// that it has it or does not want it.
    ///
    /// # Errors
    /// [`CompNodeError`] if the file cannot be read, or the CompNode leaves.
    pub(super) async fn send_over(
        &mut self,
        header: &BlobHeader,
        step: u64,
        shard: &Arc<ShardFile>,
    ) -> Result<(), CompNodeError> {
        let gone = |_| CompNodeError::Broker { reason: "the CompNode leaves".to_owned() };
        loop {
            let session = self.broker.wait_for(Option::is_some).await.map_err(gone)?.clone();
            let Some(session) = session else { continue };
            let Again { times, .. } = *self.again.borrow();
            let sending = async {
                match send(&session, header, shard).await? {
                    // A stream that the broker ends is one that it does not want; it says so, too.
                    Ok(()) | Err(SessionError::StreamEnded { .. }) => Ok(()),
                    Err(error) => {
                        tracing::warn!(%error, "a checkpoint shard is sent again once the broker is back");
                        Ok::<_, CompNodeError>(())
                    }
                }
            };
            let is_other = |now: &Option<Session>| now.as_ref().is_none_or(|now| !now.is_same(&session));
            tokio::select! {
                biased;
                settled = self.settled.wait_for(|settled| *settled == step) => return settled.map(drop).map_err(gone),
                lost = self.broker.wait_for(is_other) => drop(lost.map_err(gone)?),
                again = self.again.wait_for(|again| again.is_newer(step, times)) => drop(again.map_err(gone)?),
                // What was sent is not yet what the broker has.
                Err(error) = sending => return Err(error),
            }
        }
    }
}

/// Sends one shard and waits until it has come. The outer error is the file's, the inner one the connection's.
async fn send(
    broker: &Session,
    header: &BlobHeader,
    shard: &Arc<ShardFile>,
) -> Result<Result<(), SessionError>, CompNodeError> {
    let header = encode(header)?;
    let mut sink = match broker.open_uni().await {
        Ok(sink) => sink,
        Err(error) => return Ok(Err(error)),
    };
    // Bulk gives way to heartbeats and OP-Data.
    sink.set_priority(-10);
    let sent = match sink.send(&header).await {
        Ok(()) => send_content(&mut sink, shard).await,
        Err(error) => Err(error.into()),
    };
    match sent {
        Ok(()) => Ok(sink.finish().await),
        Err(StreamError::Lost(error)) => Ok(Err(error)),
        Err(StreamError::File(error)) => Err(error.into()),
        Err(error @ StreamError::Length { .. }) => Err(CompNodeError::Broker { reason: error.to_string() }),
    }
}
