//! Snapshots from others.

use std::sync::atomic::AtomicU64;

use fusionllm_protocol::{LoanFrame, PeerFrame, Snapshot, decode, encode};
use fusionllm_transport::{Session, SessionError};

use crate::checkpoint::{ShardFile, StreamError, receive_content};

/// Largest frame of an answer, before the content.
const ANSWER_BYTES: u64 = 64 << 10;

/// Why a snapshot did not come.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    /// The other end does not give it, and would not the next time either.
    #[error("{0}")]
    NotLent(String),
    /// The other end does not give it yet.
    #[error("{0}")]
    Early(String),
    /// It broke off.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

impl FetchError {
    /// Whether it may come the next time.
    pub(crate) fn is_worth_another_try(&self) -> bool {
        matches!(self, Self::Early(_) | Self::Stream(StreamError::Lost(_) | StreamError::Length { .. }))
    }
}

impl From<SessionError> for FetchError {
    fn from(error: SessionError) -> Self {
        Self::Stream(error.into())
    }
}

/// Fetches a snapshot into `shard`, or of it these parameters with what belongs to them. `arrived` is told the bytes that
/// are here.
pub(crate) async fn fetch(
    session: &Session,
    snapshot: Snapshot,
    params: Option<Vec<String>>,
    shard: ShardFile,
    arrived: &AtomicU64,
) -> Result<ShardFile, FetchError> {
    let not_lent = |reason: String| FetchError::NotLent(reason);
    let is_part = params.is_some();
    let request = PeerFrame::Loan(LoanFrame::Fetch { snapshot, params });
    let request = encode(&request).map_err(|e| not_lent(e.to_string()))?;
    let (mut sink, mut source) = session.open_bi().await?;
    sink.send(&request).await?;
    let lost = || SessionError::Lost { reason: "it ended the stream".to_owned() };
    let answer = source.recv_limited(ANSWER_BYTES).await?.ok_or_else(lost)?;
    let bytes = match decode(&answer) {
        Ok(LoanFrame::Lent { bytes }) => bytes,
        Ok(LoanFrame::NotLent { reason, is_early }) => {
            let reason = fusionllm_protocol::clean(&reason).into_owned();
            return Err(if is_early { FetchError::Early(reason) } else { not_lent(reason) });
        }
        Ok(LoanFrame::Fetch { .. }) => return Err(not_lent("it answered by another request".to_owned())),
        Err(error) => return Err(not_lent(error.to_string())),
    };
    if bytes > snapshot.bytes || !is_part && bytes != snapshot.bytes {
        return Err(not_lent(format!("it announced {bytes} bytes of a snapshot of {}", snapshot.bytes)));
    }
    Ok(receive_content(&mut source, bytes, shard, arrived).await?)
}
