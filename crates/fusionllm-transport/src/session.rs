//! One connection to one peer.

use std::sync::Arc;
use std::time::Duration;

use iroh::endpoint::{Connection, ConnectionError};

use crate::doorway::Stay;
use crate::endpoint::PROBE_ALPN;
use crate::stream::{FrameSink, FrameSource};
use crate::{PeerId, SessionError, nudge, settings};

/// An open connection. Clones are the same one; it closes when the last one goes.
#[derive(Clone, Debug)]
pub struct Session {
    connection: Connection,
    peer: PeerId,
    /// Until the peer is admitted, or all clones are gone.
    stay: Option<Arc<Stay>>,
}

/// Why a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloseReason {
    /// The peer's code, if it closed the connection.
    pub code: Option<u64>,
    /// What happened, in words.
    pub reason: String,
}

/// What a connection has carried so far.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SessionStats {
    /// Round-trip time of the path in use.
    pub rtt: Option<Duration>,
    /// Bytes of all packets sent.
    pub bytes_sent: u64,
    /// Bytes of all packets received.
    pub bytes_received: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Of which were lost.
    pub lost_packets: u64,
}

impl Session {
    pub(crate) fn new(connection: Connection, stay: Option<Stay>) -> Self {
        let peer = PeerId::from_bytes(*connection.remote_id().as_bytes());
        tokio::spawn(nudge::run(connection.weak_handle()));
        Self { connection, peer, stay: stay.map(Arc::new) }
    }

    /// Gives the peer the room of a member: some streams, and 64 MiB that are not read yet. Before that, one that was accepted
    /// [`OnTrial`](crate::Admit::OnTrial) has one two-way stream and 64 KiB.
    pub fn admitted(&self) {
        settings::give_room(&self.connection);
        if let Some(stay) = &self.stay {
            stay.end();
        }
    }

    /// Lets the peer have so many two-way streams open at once, if that is more than any member has.
    pub fn allow_streams(&self, streams: u32) {
        settings::allow_streams(&self.connection, streams);
    }

    /// Who is at the other end.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// Whether it was opened to be measured ([`Endpoint::connect_to_probe`](crate::Endpoint::connect_to_probe)).
    pub fn is_probe(&self) -> bool {
        self.connection.alpn() == PROBE_ALPN
    }

    /// Whether both are the same connection.
    pub fn is_same(&self, other: &Self) -> bool {
        self.peer == other.peer && self.connection.stable_id() == other.connection.stable_id()
    }

    /// Opens a stream to the peer, who sees it once something is sent.
    ///
    /// # Errors
    /// [`SessionError`] if the connection is gone.
    pub async fn open_uni(&self) -> Result<FrameSink, SessionError> {
        Ok(FrameSink::new(self.connection.open_uni().await?))
    }

    /// The next one-way stream that the peer has opened. May be dropped before it is done without losing a stream.
    ///
    /// # Errors
    /// [`SessionError`] if the connection is gone.
    pub async fn accept_uni(&self) -> Result<FrameSource, SessionError> {
        Ok(FrameSource::new(self.connection.accept_uni().await?))
    }

    /// Opens a two-way stream to the peer, who sees it once something is sent.
    ///
    /// # Errors
    /// [`SessionError`] if the connection is gone.
    pub async fn open_bi(&self) -> Result<(FrameSink, FrameSource), SessionError> {
        let (send, receive) = self.connection.open_bi().await?;
        Ok((FrameSink::new(send), FrameSource::new(receive)))
    }

    /// The next two-way stream that the peer has opened. May be dropped before it is done without losing a stream.
    ///
    /// # Errors
    /// [`SessionError`] if the connection is gone.
    pub async fn accept_bi(&self) -> Result<(FrameSink, FrameSource), SessionError> {
        let (send, receive) = self.connection.accept_bi().await?;
        Ok((FrameSink::new(send), FrameSource::new(receive)))
    }

    /// Closes the connection at once; what is still on its way may be lost. Call [`FrameSink::finish`] before to be
    /// sure that it came.
    pub fn close(&self, code: u32, reason: &str) {
        self.connection.close(code.into(), reason.as_bytes());
    }

    /// Waits for the connection's end.
    pub async fn closed(&self) -> CloseReason {
        match self.connection.closed().await {
            ConnectionError::ApplicationClosed(close) => CloseReason {
                code: Some(close.error_code.into_inner()),
                reason: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            other => CloseReason { code: None, reason: SessionError::from(other).to_string() },
        }
    }

    /// What it has carried so far.
    pub fn stats(&self) -> SessionStats {
        let stats = self.connection.stats();
        let rtt = self.connection.paths().iter().find(|p| p.is_selected()).map(|p| p.stats().rtt);
        SessionStats {
            rtt,
            bytes_sent: stats.udp_tx.bytes,
            bytes_received: stats.udp_rx.bytes,
            sent_packets: stats.sent_packets,
            lost_packets: stats.lost_packets,
        }
    }
}
