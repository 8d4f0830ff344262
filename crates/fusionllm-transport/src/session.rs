//! One connection to one peer.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::stream::{FrameSink, FrameSource};
use crate::wire::{SessionStats, SharedConnection};
use crate::{PeerId, Purpose, SessionError};

/// How often it is looked which path is in use.
const LOOK: Duration = Duration::from_millis(20);

/// An open connection. Clones are the same one; it closes when the last one goes.
#[derive(Clone, Debug)]
pub struct Session(SharedConnection);

/// Why a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloseReason {
    /// The peer's code, if it closed the connection.
    pub code: Option<u64>,
    /// What happened, in words.
    pub reason: String,
}

impl Session {
    pub(crate) fn new(connection: SharedConnection) -> Self {
        Self(connection)
    }

    /// Gives the peer the room of a member: some streams, and 64 MiB that are not read yet. Before that, one that was accepted
    /// [`OnTrial`](crate::Admit::OnTrial) has one two-way stream and 64 KiB.
    pub fn admitted(&self) {
        self.0.admit();
    }

    /// Lets the peer have so many two-way streams open at once, if that is more than any member has.
    pub fn allow_streams(&self, streams: u32) {
        self.0.allow_streams(streams);
    }

    /// Who is at the other end.
    pub fn peer(&self) -> PeerId {
        self.0.peer()
    }

    /// What whoever dialled has opened it for.
    pub fn purpose(&self) -> Purpose {
        self.0.purpose()
    }

    /// Whether both are the same connection.
    pub fn is_same(&self, other: &Self) -> bool {
        self.peer() == other.peer() && self.0.number() == other.0.number()
    }

    /// Opens a stream to the peer, who sees it once something is sent.
    ///
    /// # Errors
    /// [`SessionError`] if the connection is gone.
    pub async fn open_uni(&self) -> Result<FrameSink, SessionError> {
        Ok(FrameSink::new(self.0.open_uni().await?))
    }

    /// The next one-way stream that the peer has opened. May be dropped before it is done without losing a stream.
    ///
    /// # Errors
    /// [`SessionError`] if the connection is gone.
    pub async fn accept_uni(&self) -> Result<FrameSource, SessionError> {
        Ok(FrameSource::new(self.0.accept_uni().await?))
    }

    /// Opens a two-way stream to the peer, who sees it once something is sent.
    ///
    /// # Errors
    /// [`SessionError`] if the connection is gone.
    pub async fn open_bi(&self) -> Result<(FrameSink, FrameSource), SessionError> {
        let (send, receive) = self.0.open_bi().await?;
        Ok((FrameSink::new(send), FrameSource::new(receive)))
    }

    /// The next two-way stream that the peer has opened. May be dropped before it is done without losing a stream.
    ///
    /// # Errors
    /// [`SessionError`] if the connection is gone.
    pub async fn accept_bi(&self) -> Result<(FrameSink, FrameSource), SessionError> {
        let (send, receive) = self.0.accept_bi().await?;
        Ok((FrameSink::new(send), FrameSource::new(receive)))
    }

    /// Closes the connection at once; what is still on its way may be lost. Call [`FrameSink::finish`] before to be
    /// sure that it came.
    pub fn close(&self, code: u32, reason: &str) {
        self.0.close(code, reason);
    }

    /// Waits for the connection's end.
    pub async fn closed(&self) -> CloseReason {
        match self.0.closed().await {
            SessionError::Closed { code, reason } => CloseReason { code: Some(code), reason },
            other => CloseReason { code: None, reason: other.to_string() },
        }
    }

    /// Waits for a direct path, where the connection began over a relay and both ends are looking for one; no longer than
    /// this. Whether there is one.
    pub async fn direct_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.stats().is_relayed {
            if Instant::now() >= deadline {
                return false;
            }
            sleep(LOOK).await;
        }
        true
    }

    /// What it has carried so far.
    pub fn stats(&self) -> SessionStats {
        self.0.stats()
    }
}
