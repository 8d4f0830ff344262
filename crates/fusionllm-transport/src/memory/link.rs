//! One connection, as each of its two sides knows it.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::task::Waker;
use std::time::Duration;

use bytes::Bytes;

use crate::{Purpose, SessionError};

/// 0 dialled, 1 was dialled.
pub(super) type Side = usize;

/// Streams that a peer may open before it is admitted: one-way and two-way.
pub(super) const TRIAL_STREAMS: [u64; 2] = [0, 1];
/// Streams of each kind that a peer may have open once it is admitted.
pub(super) const MEMBER_STREAMS: u64 = 16;

/// A stream by who opened it, its kind, and its number among those of the opener and kind, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct StreamId {
    pub(super) opener: Side,
    pub(super) is_two_way: bool,
    pub(super) index: u64,
}

impl StreamId {
    pub(super) fn kind(self) -> usize {
        usize::from(self.is_two_way)
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_two_way { "bi" } else { "uni" };
        write!(f, "{kind} {}.{}", self.opener, self.index)
    }
}

/// The sending end of a stream.
#[derive(Debug, Default)]
pub(super) struct Sending {
    /// Bytes that may still be written.
    pub(super) room: usize,
    pub(super) is_urgent: bool,
    /// The peer reads no more.
    pub(super) is_stopped: bool,
    /// The end was sent, or nobody is there to send it.
    pub(super) is_ended: bool,
    /// The peer has all of it.
    pub(super) is_confirmed: bool,
    /// When the last piece arrives.
    pub(super) last: Duration,
    pub(super) wakers: Vec<Waker>,
}

/// The receiving end.
#[derive(Debug, Default)]
pub(super) struct Receiving {
    pub(super) bytes: VecDeque<Bytes>,
    /// Bytes that were read, and for which the sender was given no new room yet.
    pub(super) unsaid: usize,
    /// The end has come.
    pub(super) is_ended: bool,
    /// The reader was told of the end.
    pub(super) is_read: bool,
    /// Nobody reads any more.
    pub(super) is_dropped: bool,
    /// It counts in [`End::done`] already.
    pub(super) is_settled: bool,
    pub(super) wakers: Vec<Waker>,
}

/// What one side knows.
#[derive(Debug, Default)]
pub(super) struct End {
    pub(super) place: usize,
    /// Why the connection is over at this side; nothing while it is open.
    pub(super) error: Option<SessionError>,
    /// Sessions and streams in use.
    pub(super) handles: usize,
    /// By kind, streams that this side has opened, and how many it may.
    pub(super) opened: [u64; 2],
    pub(super) may_open: [u64; 2],
    /// By kind, streams of the peer: seen, done, and how many may be open at once.
    pub(super) seen: [u64; 2],
    pub(super) done: [u64; 2],
    pub(super) allowed: [u64; 2],
    /// By kind, seen and not accepted.
    pub(super) incoming: [VecDeque<StreamId>; 2],
    pub(super) sending: BTreeMap<StreamId, Sending>,
    pub(super) receiving: BTreeMap<StreamId, Receiving>,
    pub(super) wakers: Vec<Waker>,
    pub(super) bytes_sent: u64,
    pub(super) bytes_received: u64,
}

/// Both sides, and what is between them.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) ends: [End; 2],
    pub(super) purpose: Purpose,
    /// By direction, from side 0 and from side 1: whether nothing gets through any more.
    pub(super) is_dead: [bool; 2],
    /// By direction: until when it is busy.
    pub(super) busy: [Duration; 2],
    /// It breaks after so many bytes more.
    pub(super) fuse: Option<u64>,
}

/// Why nothing can be done with a connection that nobody remembers.
pub(super) fn gone() -> SessionError {
    SessionError::Lost { reason: "it is gone".to_owned() }
}
