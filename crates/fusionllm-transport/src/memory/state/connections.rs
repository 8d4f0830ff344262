//! What happens to connections and their streams.

use super::State;
use crate::memory::link::{End, Link, MEMBER_STREAMS, Side, StreamId, TRIAL_STREAMS};
use crate::memory::packets::Packet;
use crate::{Purpose, SessionError};

impl State {
    /// A connection between two endpoints. Nobody holds it yet.
    pub(super) fn connect(&mut self, from: usize, to: usize, purpose: Purpose) -> usize {
        let link = usize::try_from(self.number()).unwrap_or(usize::MAX);
        let end = |place| End { place, may_open: TRIAL_STREAMS, allowed: TRIAL_STREAMS, ..End::default() };
        let ends = [end(from), end(to)];
        let link_state = Link { ends, purpose, is_dead: [false; 2], busy: [self.now; 2], fuse: None };
        self.links.insert(link, link_state);
        self.draw_fate(link);
        link
    }

    pub(crate) fn end(&mut self, link: usize, side: Side) -> Option<&mut End> {
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
    pub(crate) fn close(&mut self, link: usize, side: Side, code: u32, reason: &str) {
        if self.end(link, side).is_none_or(|end| end.error.is_some()) {
            return;
        }
        let packet = Packet::Close { code: code.into(), reason: reason.to_owned() };
        self.send(link, side, packet);
        self.fail(link, side, SessionError::ClosedHere);
    }

    /// Something of this side is not in use any more.
    pub(crate) fn release(&mut self, link: usize, side: Side) {
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
    pub(crate) fn allow(&mut self, link: usize, side: Side, kind: usize, streams: u64) {
        let Some(end) = self.end(link, side) else { return };
        if streams > end.allowed[kind] {
            end.allowed[kind] = streams;
            let streams = end.done[kind] + streams;
            self.send(link, side, Packet::Limit { kind, streams });
        }
    }

    /// The room of a member.
    pub(crate) fn admit(&mut self, link: usize, side: Side) {
        (0..2).for_each(|kind| self.allow(link, side, kind, MEMBER_STREAMS));
    }

    /// Counts a stream of the peer as done once both its halves are, at this side.
    pub(crate) fn settle(&mut self, link: usize, side: Side, stream: StreamId) {
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
}
