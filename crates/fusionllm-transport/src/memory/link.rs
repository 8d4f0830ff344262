//! One connection, as each of its two sides knows it.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::task::Waker;
use std::time::Duration;

use bytes::Bytes;

use super::packets::Packet;
use super::state::{Event, State};
use crate::SessionError;

/// 0 dialled, 1 was dialled.
pub(super) type Side = usize;

/// Streams that a peer may open before it is admitted: one-way and two-way.
pub(super) const TRIAL_STREAMS: [u64; 2] = [0, 1];
/// And after.
pub(super) const MEMBER_STREAMS: u64 = 16;

/// Of a stream.
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
    /// Read, and not yet said.
    pub(super) unsaid: usize,
    /// The end has come.
    pub(super) is_ended: bool,
    /// And was read.
    pub(super) is_read: bool,
    /// Nobody reads any more.
    pub(super) is_dropped: bool,
    /// Counted as done.
    pub(super) is_settled: bool,
    pub(super) wakers: Vec<Waker>,
}

/// What one side knows.
#[derive(Debug, Default)]
pub(super) struct End {
    pub(super) place: usize,
    /// Why it ended.
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
    pub(super) is_probe: bool,
    /// By direction, from side 0 and from side 1: whether nothing gets through any more.
    pub(super) is_dead: [bool; 2],
    /// By direction: until when it is busy.
    pub(super) busy: [Duration; 2],
    /// It breaks after so many bytes more.
    pub(super) fuse: Option<u64>,
}

impl State {
    /// A connection between two endpoints. Nobody holds it yet.
    pub(super) fn connect(&mut self, from: usize, to: usize, is_probe: bool) -> usize {
        let link = usize::try_from(self.number()).unwrap_or(usize::MAX);
        let end = |place| End { place, may_open: TRIAL_STREAMS, allowed: TRIAL_STREAMS, ..End::default() };
        let ends = [end(from), end(to)];
        let link_state = Link { ends, is_probe, is_dead: [false; 2], busy: [self.now; 2], fuse: None };
        self.links.insert(link, link_state);
        self.draw_fate(link);
        link
    }

    pub(super) fn end(&mut self, link: usize, side: Side) -> Option<&mut End> {
        self.links.get_mut(&link)?.ends.get_mut(side)
    }

    /// The connection is over at this side.
    pub(super) fn fail(&mut self, link: usize, side: Side, error: SessionError) {
        let Some(end) = self.end(link, side) else { return };
        if end.error.is_some() {
            return;
        }
        let text = error.to_string();
        end.error = Some(error);
        let mut wake = std::mem::take(&mut end.wakers);
        end.sending.values_mut().for_each(|s| wake.append(&mut s.wakers));
        end.receiving.values_mut().for_each(|r| wake.append(&mut r.wakers));
        self.wake.append(&mut wake);
        self.note(&format_args!("#{link} side {side}: {text}"));
        self.forget_if_over(link);
    }

    /// Closes it from this side.
    pub(super) fn close(&mut self, link: usize, side: Side, code: u32, reason: &str) {
        if self.end(link, side).is_none_or(|end| end.error.is_some()) {
            return;
        }
        let packet = Packet::Close { code: code.into(), reason: reason.to_owned() };
        self.send(link, side, packet);
        self.fail(link, side, SessionError::ClosedHere);
    }

    /// Something of this side is not in use any more.
    pub(super) fn release(&mut self, link: usize, side: Side) {
        let Some(end) = self.end(link, side) else { return };
        end.handles = end.handles.saturating_sub(1);
        if end.handles == 0 {
            self.close(link, side, 0, "");
            self.forget_if_over(link);
        }
    }

    fn forget_if_over(&mut self, link: usize) {
        let is_over = |end: &End| end.error.is_some() && end.handles == 0;
        if self.links.get(&link).is_some_and(|link| link.ends.iter().all(is_over)) {
            self.links.remove(&link);
        }
    }

    /// A side finds out that nothing comes any more.
    pub(super) fn notice(&mut self, link: usize, side: Side) {
        self.fail(link, side, SessionError::TimedOut);
    }

    /// Lets the peer of `side` have so many streams of a kind open at once.
    pub(super) fn allow(&mut self, link: usize, side: Side, kind: usize, streams: u64) {
        let Some(end) = self.end(link, side) else { return };
        if streams > end.allowed[kind] {
            end.allowed[kind] = streams;
            let streams = end.done[kind] + streams;
            self.send(link, side, Packet::Limit { kind, streams });
        }
    }

    /// The room of a member.
    pub(super) fn admit(&mut self, link: usize, side: Side) {
        (0..2).for_each(|kind| self.allow(link, side, kind, MEMBER_STREAMS));
    }

    /// Counts a stream of the peer as done once both its halves are, at this side.
    pub(super) fn settle(&mut self, link: usize, side: Side, stream: StreamId) {
        let Some(end) = self.end(link, side) else { return };
        let sent = end.sending.get(&stream).is_none_or(|s| s.is_confirmed || s.is_ended && s.is_stopped);
        let Some(receiving) = end.receiving.get_mut(&stream).filter(|_| stream.opener != side) else { return };
        let received = receiving.is_read || receiving.is_ended && receiving.is_dropped;
        if !sent || !received || receiving.is_settled {
            return;
        }
        receiving.is_settled = true;
        let kind = stream.kind();
        end.done[kind] += 1;
        let streams = end.done[kind] + end.allowed[kind];
        self.send(link, side, Packet::Limit { kind, streams });
    }

    pub(super) fn arrive_later(&mut self, at: Duration, link: usize, to: Side, packet: Packet) {
        self.schedule_at(at, Event::Arrive { link, to, packet });
    }
}
