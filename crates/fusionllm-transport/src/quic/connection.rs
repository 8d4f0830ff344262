//! Connections and streams of QUIC, behind the traits of [`crate::wire`].

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use iroh::endpoint::{Connection, ConnectionError, ReadError, RecvStream, SendStream, StoppedError, WriteError};

use super::doorway::Stay;
use super::{nudge, settings};
use crate::wire::{self, Halves, Later, ReceiveHalf, SendHalf, SessionStats, SharedConnection};
use crate::{PeerId, Purpose, SessionError};

/// A connection, and its stay in the doorway until the peer is admitted or all is gone.
#[derive(Debug)]
pub(super) struct QuicConnection {
    connection: Connection,
    peer: PeerId,
    stay: Option<Stay>,
}

impl QuicConnection {
    /// With a peer that is known: it has the room of a member.
    pub(super) fn of_member(connection: Connection) -> SharedConnection {
        let connection = Self::new(connection, None);
        wire::Connection::admit(&connection);
        Arc::new(connection)
    }

    /// With a peer that has yet to show who it is.
    pub(super) fn on_trial(connection: Connection, stay: Stay) -> SharedConnection {
        Arc::new(Self::new(connection, Some(stay)))
    }

    fn new(connection: Connection, stay: Option<Stay>) -> Self {
        let peer = PeerId::from_bytes(*connection.remote_id().as_bytes());
        tokio::spawn(nudge::run(connection.weak_handle()));
        Self { connection, peer, stay }
    }
}

impl wire::Connection for QuicConnection {
    fn peer(&self) -> PeerId {
        self.peer
    }

    fn number(&self) -> usize {
        self.connection.stable_id()
    }

    fn purpose(&self) -> Purpose {
        settings::purpose(self.connection.alpn())
    }

    fn admit(&self) {
        settings::give_room(&self.connection);
        if let Some(stay) = &self.stay {
            stay.end();
        }
    }

    fn allow_streams(&self, streams: u32) {
        settings::allow_streams(&self.connection, streams);
    }

    fn open_uni(&self) -> Later<'_, Result<Box<dyn SendHalf>, SessionError>> {
        Box::pin(async { Ok(Box::new(self.connection.open_uni().await?) as Box<dyn SendHalf>) })
    }

    fn accept_uni(&self) -> Later<'_, Result<Box<dyn ReceiveHalf>, SessionError>> {
        Box::pin(async { Ok(Box::new(self.connection.accept_uni().await?) as Box<dyn ReceiveHalf>) })
    }

    fn open_bi(&self) -> Later<'_, Result<Halves, SessionError>> {
        Box::pin(async { Ok(halves(self.connection.open_bi().await?)) })
    }

    fn accept_bi(&self) -> Later<'_, Result<Halves, SessionError>> {
        Box::pin(async { Ok(halves(self.connection.accept_bi().await?)) })
    }

    fn close(&self, code: u32, reason: &str) {
        self.connection.close(code.into(), reason.as_bytes());
    }

    fn closed(&self) -> Later<'_, SessionError> {
        Box::pin(async { self.connection.closed().await.into() })
    }

    fn stats(&self) -> SessionStats {
        let stats = self.connection.stats();
        let paths = self.connection.paths();
        let selected = paths.iter().find(|path| path.is_selected());
        SessionStats {
            rtt: selected.as_ref().map(|path| path.stats().rtt),
            is_relayed: selected.is_some_and(|path| path.is_relay()),
            bytes_sent: stats.udp_tx.bytes,
            bytes_received: stats.udp_rx.bytes,
            sent_packets: stats.sent_packets,
            lost_packets: stats.lost_packets,
        }
    }
}

fn halves((send, receive): (SendStream, RecvStream)) -> Halves {
    (Box::new(send), Box::new(receive))
}

impl SendHalf for SendStream {
    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize, SessionError>> {
        Self::poll_write(Pin::new(self), cx, bytes).map_err(Into::into)
    }

    fn set_priority(&mut self, priority: i32) {
        // A stream that has ended needs no priority.
        let _ = Self::set_priority(self, priority);
    }

    fn finish(&mut self) -> Later<'_, Result<(), SessionError>> {
        // Only a stream that was reset before cannot be finished, and then the peer has not received all.
        let finished = Self::finish(self).map_err(|e| SessionError::Lost { reason: e.to_string() });
        Box::pin(async move {
            finished?;
            match self.stopped().await? {
                None => Ok(()),
                Some(code) => Err(SessionError::StreamEnded { code: code.into_inner() }),
            }
        })
    }
}

impl ReceiveHalf for RecvStream {
    fn poll_chunk(&mut self, cx: &mut Context<'_>, most: usize) -> Poll<Result<Option<Bytes>, SessionError>> {
        // Nothing is lost with the future: what waits is noted in the connection.
        pin!(self.read_chunk(most)).poll(cx).map_err(Into::into)
    }
}

impl From<ConnectionError> for SessionError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => Self::Closed {
                code: close.error_code.into_inner(),
                reason: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            ConnectionError::LocallyClosed => Self::ClosedHere,
            ConnectionError::TimedOut => Self::TimedOut,
            other => Self::Lost { reason: other.to_string() },
        }
    }
}

impl From<WriteError> for SessionError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::ConnectionLost(error) => error.into(),
            WriteError::Stopped(code) => Self::StreamEnded { code: code.into_inner() },
            other @ (WriteError::ClosedStream | WriteError::ZeroRttRejected) => {
                Self::Lost { reason: other.to_string() }
            }
        }
    }
}

impl From<ReadError> for SessionError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::ConnectionLost(error) => error.into(),
            ReadError::Reset(code) => Self::StreamEnded { code: code.into_inner() },
            other @ (ReadError::ClosedStream | ReadError::ZeroRttRejected) => Self::Lost { reason: other.to_string() },
        }
    }
}

impl From<StoppedError> for SessionError {
    fn from(error: StoppedError) -> Self {
        match error {
            StoppedError::ConnectionLost(error) => error.into(),
            other @ StoppedError::ZeroRttRejected => Self::Lost { reason: other.to_string() },
        }
    }
}
