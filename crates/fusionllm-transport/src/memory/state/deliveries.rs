//! How packets are sent and arrive.

use std::time::Duration;

use bytes::Bytes;
use rand::RngExt;

use super::{Event, State};
use crate::SessionError;
use crate::memory::link::{Receiving, Sending, Side, StreamId};
use crate::memory::packets::Packet;

/// Largest piece of a stream that travels as a whole.
const PIECE_BYTES: usize = 1200;

impl State {
    /// Puts bytes of a stream on their way, in pieces. The connection may break at any of them.
    pub(crate) fn send_bytes(&mut self, link: usize, from: Side, stream: StreamId, mut bytes: Bytes) {
        while !bytes.is_empty() {
            let most = self.dice.random_range(1..=PIECE_BYTES).min(bytes.len());
            let fuse = self.links.get(&link).and_then(|link| link.fuse).unwrap_or(u64::MAX);
            let until_it_breaks = usize::try_from(fuse).unwrap_or(usize::MAX);
            let piece = bytes.split_to(most.min(until_it_breaks));
            if let Some(fuse) = self.links.get_mut(&link).and_then(|link| link.fuse.as_mut()) {
                *fuse -= piece.len() as u64;
            }
            if !piece.is_empty() {
                self.send(link, from, Packet::Data { stream, bytes: piece });
            }
            if until_it_breaks <= most {
                self.cut(link);
            }
        }
    }

    /// Puts a packet on its way, unless nothing gets through.
    pub(crate) fn send(&mut self, link: usize, from: Side, packet: Packet) {
        let to = 1 - from;
        let jitter = self.up_to(self.weather.jitter);
        let way = self.weather.latency + jitter;
        let Some(link_state) = self.links.get_mut(&link) else { return };
        if link_state.is_dead[from] {
            return self.note(&format_args!("#{link} {from}>{to} into nothing: {packet}"));
        }
        link_state.ends[from].bytes_sent += packet.len() as u64;
        let takes = Duration::from_secs_f64(packet.len() as f64 / self.weather.bytes_per_s.max(1) as f64);
        let sending = packet.ordered_in().and_then(|stream| link_state.ends[from].sending.get_mut(&stream));
        // What is urgent, and what holds no data, waits for nothing else.
        let waits = sending.as_ref().is_some_and(|sending| !sending.is_urgent);
        let begins = if waits { link_state.busy[from].max(self.now) } else { self.now };
        if waits {
            link_state.busy[from] = begins + takes;
        }
        let mut at = begins + takes + way;
        if let Some(sending) = sending {
            at = at.max(sending.last);
            sending.last = at;
        }
        self.note(&format_args!("#{link} {from}>{to} sends {packet}"));
        self.schedule_at(at, Event::Arrive { link, to, packet });
    }

    /// A packet reaches a side.
    pub(super) fn arrive(&mut self, link: usize, to: Side, packet: Packet) {
        self.note(&format_args!("#{link} side {to} gets {packet}"));
        if let Some(stream) = packet.ordered_in() {
            self.see(link, to, stream);
        }
        let Some(end) = self.end(link, to).filter(|end| end.error.is_none()) else { return };
        match packet {
            Packet::Data { stream, bytes } => {
                end.bytes_received += bytes.len() as u64;
                let Some(receiving) = end.receiving.get_mut(&stream) else { return };
                if !receiving.is_dropped {
                    receiving.bytes.push_back(bytes);
                    let mut wake = std::mem::take(&mut receiving.wakers);
                    self.wake.append(&mut wake);
                }
            }
            Packet::End { stream } => {
                let Some(receiving) = end.receiving.get_mut(&stream) else { return };
                receiving.is_ended = true;
                let mut wake = std::mem::take(&mut receiving.wakers);
                self.wake.append(&mut wake);
                self.send(link, to, Packet::Confirmed { stream });
                self.settle(link, to, stream);
            }
            Packet::Confirmed { stream } => {
                self.change_sending(link, to, stream, |sending| sending.is_confirmed = true);
                self.settle(link, to, stream);
            }
            Packet::Stop { stream } => self.change_sending(link, to, stream, |sending| sending.is_stopped = true),
            Packet::Room { stream, bytes } => {
                self.change_sending(link, to, stream, |sending| sending.room += bytes);
            }
            Packet::Limit { kind, streams } => {
                end.may_open[kind] = end.may_open[kind].max(streams);
                let mut wake = std::mem::take(&mut end.wakers);
                self.wake.append(&mut wake);
            }
            Packet::Close { code, reason } => self.fail(link, to, SessionError::Closed { code, reason }),
        }
    }

    fn change_sending(&mut self, link: usize, side: Side, stream: StreamId, change: impl FnOnce(&mut Sending)) {
        let Some(sending) = self.end(link, side).and_then(|end| end.sending.get_mut(&stream)) else { return };
        change(sending);
        let mut wake = std::mem::take(&mut sending.wakers);
        self.wake.append(&mut wake);
    }

    /// A stream of the peer, and all that it has opened before: whichever comes first, they are accepted in their order.
    fn see(&mut self, link: usize, side: Side, stream: StreamId) {
        if stream.opener == side {
            return;
        }
        let window = self.weather.window.max(1);
        let Some(end) = self.end(link, side).filter(|end| end.error.is_none()) else { return };
        let kind = stream.kind();
        while end.seen[kind] <= stream.index {
            let seen = StreamId { index: end.seen[kind], ..stream };
            end.seen[kind] += 1;
            end.receiving.insert(seen, Receiving::default());
            if seen.is_two_way {
                end.sending.insert(seen, Sending { room: window, ..Sending::default() });
            }
            end.incoming[kind].push_back(seen);
        }
        let mut wake = std::mem::take(&mut end.wakers);
        self.wake.append(&mut wake);
    }
}
