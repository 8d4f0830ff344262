//! What carries bytes: the seam between frames and what is below them.
//!
//! [`Endpoint`](crate::Endpoint), [`Session`](crate::Session) and the two ends of a stream of frames stand above these traits,
//! QUIC (`quic/`) and the network in memory of tests (`memory/`) below. Streams are polled, so that neither a
//! chunk nor a write costs an allocation; what happens once for a stream or a connection is a boxed future.

use std::fmt::Debug;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;

use crate::{ConnectError, PeerAddr, PeerId, RelayState, SessionError};

/// Something that will be there later.
pub(crate) type Later<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Both ends of a two-way stream on one side.
pub(crate) type Halves = (Box<dyn SendHalf>, Box<dyn ReceiveHalf>);

/// An open connection, of all that use it.
pub(crate) type SharedConnection = Arc<dyn Connection>;

/// What a connection is opened for. Two peers may have one of each at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// What the peers do together.
    Work,
    /// To be measured, by [`probe`](crate::probe).
    Probe,
    /// State in bulk, apart from the work, which would wait for it.
    State,
}

/// What a connection has carried so far.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SessionStats {
    /// Round-trip time of the path in use.
    pub rtt: Option<Duration>,
    /// Whether the path in use leads over a relay.
    pub is_relayed: bool,
    /// Bytes of all packets sent.
    pub bytes_sent: u64,
    /// Bytes of all packets received.
    pub bytes_received: u64,
    /// Packets sent, lost ones among them.
    pub sent_packets: u64,
    /// How many of the packets sent were lost.
    pub lost_packets: u64,
}

/// Where peers are dialled and awaited.
pub(crate) trait Wire: Debug + Send + Sync {
    /// Who this is.
    fn id(&self) -> PeerId;

    /// Where it may be reached.
    fn addr(&self) -> PeerAddr;

    /// How this stands to a relay.
    fn relay_state(&self) -> RelayState;

    /// Opens a connection to a peer.
    fn connect<'a>(&'a self, peer: &'a PeerAddr, purpose: Purpose)
    -> Later<'a, Result<SharedConnection, ConnectError>>;

    /// The next connection that a peer has opened; nothing once this is closed.
    fn accept(&self) -> Later<'_, Option<SharedConnection>>;

    /// Closes all connections, and waits a little until the peers know.
    fn close(&self) -> Later<'_, ()>;
}

/// One side of an open connection. It closes when this and all its streams are gone.
pub(crate) trait Connection: Debug + Send + Sync {
    /// Who is at the other end.
    fn peer(&self) -> PeerId;

    /// Differs between connections of one endpoint.
    fn number(&self) -> usize;

    /// What it was opened for.
    fn purpose(&self) -> Purpose;

    /// Gives the peer the room of a member.
    fn admit(&self);

    /// Lets the peer have so many two-way streams open at once, if that is more than any member has.
    fn allow_streams(&self, streams: u32);

    /// Opens a stream to the peer.
    fn open_uni(&self) -> Later<'_, Result<Box<dyn SendHalf>, SessionError>>;

    /// The next stream from the peer. May be dropped before it is done without losing one.
    fn accept_uni(&self) -> Later<'_, Result<Box<dyn ReceiveHalf>, SessionError>>;

    /// Opens a two-way stream.
    fn open_bi(&self) -> Later<'_, Result<Halves, SessionError>>;

    /// The peer's next two-way stream. May be dropped before it is done without losing one.
    fn accept_bi(&self) -> Later<'_, Result<Halves, SessionError>>;

    /// Closes the connection at once.
    fn close(&self, code: u32, reason: &str);

    /// Waits for the connection's end.
    fn closed(&self) -> Later<'_, SessionError>;

    /// What it has carried so far.
    fn stats(&self) -> SessionStats;
}

/// The sending end of a stream of bytes. Dropped, it ends the stream after what was written.
pub(crate) trait SendHalf: Debug + Send + Sync {
    /// Writes some of the bytes, at least one, as soon as there is room for it; how many.
    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize, SessionError>>;

    /// Streams of higher priority go first.
    fn set_priority(&mut self, priority: i32);

    /// Ends the stream and waits until the peer has received all of it.
    fn finish(&mut self) -> Later<'_, Result<(), SessionError>>;
}

/// The receiving end of a stream of bytes. Dropped before the stream's end, it tells the peer to stop.
pub(crate) trait ReceiveHalf: Debug + Send + Sync {
    /// At most so many of the next bytes, as soon as some are there; nothing at the stream's end.
    fn poll_chunk(&mut self, cx: &mut Context<'_>, most: usize) -> Poll<Result<Option<Bytes>, SessionError>>;
}
