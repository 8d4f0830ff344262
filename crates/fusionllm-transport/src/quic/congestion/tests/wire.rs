//! Senders with a loss detection and timers as noq's, over one simulated wire: cuts, reordering, jitter, loss, changing rates,
//! queues short and long. Nothing depends on the machine's clock.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashSet, VecDeque};

use noq_proto::congestion::Controller;

use super::weather::{Dice, Weather};
use super::*;
use crate::quic::settings::{LATE, OVERTAKEN_BY};

pub(super) const PACKET: u64 = 1_250;
const US: u64 = 1_000;
const MS: u64 = 1_000_000;
pub(super) const SECOND: u64 = 1_000_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// The link has taken the packet through.
    Leaves(u64),
    Arrives(u64),
    /// Confirms what had arrived: so many packets.
    Confirms(usize),
    Wakes,
    Writes(u64),
}

/// One sender.
struct Flow {
    controller: LinkRate,
    /// Unlimited, or as much as was written.
    left: u64,
    /// When sent, and which piece of data.
    sent: BTreeMap<u64, (u64, u64)>,
    next_packet: u64,
    next_piece: u64,
    again: VecDeque<u64>,
    largest_confirmed: Option<u64>,
    arrived: Vec<u64>,
    newest_arrived: u64,
    confirmed: usize,
    pieces: HashSet<u64>,
    piece_of: Vec<u64>,
    may_send: u64,
    smoothed: f64,
    variation: f64,
    latest: f64,
    timeouts: u32,
    probes: u32,
    last_sent: u64,
    last_heard: u64,
    last_nudge: u64,
    loss_due: Option<u64>,
    wakes_at: u64,
    /// New bytes that came, by tenth of a second.
    came: Vec<u64>,
    /// What became of its packets before the link, by tenth of a second.
    entries: Vec<Entries>,
}

/// Packets that reached the link's queue.
#[derive(Clone, Copy, Debug, Default)]
struct Entries {
    queued: u64,
    /// There was no room for them.
    overflowed: u64,
    /// How long those that were queued wait, together.
    waits_ms: f64,
}

/// Everything at its time.
pub(super) struct Sky {
    weather: Vec<(u64, Weather)>,
    flows: Vec<Flow>,
    events: BinaryHeap<Reverse<(u64, u64, usize, What)>>,
    serial: u64,
    now: u64,
    base: Instant,
    /// What waits before the link: whose, and which.
    queue: VecDeque<(usize, u64)>,
    last_arrival: u64,
    dice: Dice,
}

impl Sky {
    /// Weather by the second at which it begins.
    pub(super) fn new(seed: u64, weather: &[(f64, Weather)]) -> Self {
        let weather = weather.iter().map(|(at, weather)| ((at * 1e9) as u64, *weather)).collect();
        Self {
            weather,
            flows: Vec::new(),
            events: BinaryHeap::new(),
            serial: 0,
            now: 0,
            base: Instant::now(),
            queue: VecDeque::new(),
            last_arrival: 0,
            dice: Dice(seed),
        }
    }

    /// A sender that begins then, with so many bytes, or with as many as go.
    pub(super) fn flow(&mut self, begins: f64, bytes: Option<u64>) -> usize {
        let at = (begins * 1e9) as u64;
        let controller = LinkRate::new(self.base + Duration::from_nanos(at), PACKET);
        self.flows.push(Flow {
            controller,
            left: 0,
            sent: BTreeMap::new(),
            next_packet: 0,
            next_piece: 0,
            again: VecDeque::new(),
            largest_confirmed: None,
            arrived: Vec::new(),
            newest_arrived: 0,
            confirmed: 0,
            pieces: HashSet::new(),
            piece_of: Vec::new(),
            may_send: at,
            smoothed: 0.0,
            variation: 0.0,
            latest: 0.0,
            timeouts: 0,
            probes: 0,
            last_sent: at,
            last_heard: at,
            last_nudge: at,
            loss_due: None,
            wakes_at: u64::MAX,
            came: Vec::new(),
            entries: Vec::new(),
        });
        let flow = self.flows.len() - 1;
        self.write(flow, begins, bytes.unwrap_or(u64::MAX / 4));
        flow
    }

    pub(super) fn write(&mut self, flow: usize, at: f64, bytes: u64) {
        self.at((at * 1e9) as u64, flow, What::Writes(bytes));
    }

    fn at(&mut self, time: u64, flow: usize, what: What) {
        self.serial += 1;
        self.events.push(Reverse((time, self.serial, flow, what)));
    }

    fn weather(&self) -> Weather {
        let at = self.weather.partition_point(|(begins, _)| *begins <= self.now);
        self.weather[at.saturating_sub(1)].1
    }

    pub(super) fn run(&mut self, until: f64) {
        let until = (until * 1e9) as u64;
        while self.events.peek().is_some_and(|Reverse((at, ..))| *at <= until) {
            let Some(Reverse((at, _, flow, what))) = self.events.pop() else { break };
            self.now = at;
            match what {
                What::Leaves(packet) => self.leaves(flow, packet),
                What::Arrives(packet) => self.arrives(flow, packet),
                What::Confirms(count) => self.confirms(flow, count),
                What::Writes(bytes) => self.flows[flow].left += bytes,
                What::Wakes => {
                    if self.flows[flow].wakes_at == at {
                        self.flows[flow].wakes_at = u64::MAX;
                    }
                    self.timers(flow);
                }
            }
            if !matches!(what, What::Leaves(_) | What::Arrives(_)) {
                self.send(flow);
            }
        }
        self.now = until;
    }

    /// New bytes that came from one second to another.
    pub(super) fn came(&self, flow: usize, from: f64, to: f64) -> f64 {
        let bin = |at: f64| (at * 10.0).round() as usize;
        (bin(from)..bin(to)).map(|at| self.flows[flow].came.get(at).copied().unwrap_or(0) as f64).sum()
    }

    /// Share of what the weather allows.
    pub(super) fn share(&self, flow: usize, from: f64, to: f64) -> f64 {
        let at = self.weather.partition_point(|(begins, _)| *begins <= (from * 1e9) as u64);
        self.came(flow, from, to) / (self.weather[at.saturating_sub(1)].1.bytes_per_s() * (to - from))
    }

    /// From one second to another: which share of a flow's packets the queue had no room for, and how many milliseconds the
    /// others waited in it on average.
    pub(super) fn queued(&self, flow: usize, from: f64, to: f64) -> (f64, f64) {
        let bin = |at: f64| (at * 10.0).round() as usize;
        let entries = || self.flows[flow].entries.iter().take(bin(to)).skip(bin(from));
        let (queued, overflowed) = entries().fold((0, 0), |(q, o), e| (q + e.queued, o + e.overflowed));
        let waits_ms: f64 = entries().map(|e| e.waits_ms).sum();
        (overflowed as f64 / (queued + overflowed).max(1) as f64, waits_ms / queued.max(1) as f64)
    }

    /// Seconds after `from` until `share` of the rate comes and goes on coming, by windows of `window` seconds.
    pub(super) fn back_after(&self, flow: usize, from: f64, end: f64, window: f64, share: f64) -> f64 {
        let mut at = from;
        while at + window <= end {
            if self.share(flow, at, at + window) >= share {
                return at - from;
            }
            at += 0.1;
        }
        f64::INFINITY
    }

    pub(super) fn is_done(&self, flow: usize) -> bool {
        let flow = &self.flows[flow];
        flow.left == 0 && flow.again.is_empty() && flow.pieces.len() as u64 == flow.next_piece
    }

    fn arrives(&mut self, flow: usize, packet: u64) {
        let (now, weather) = (self.now, self.weather());
        let f = &mut self.flows[flow];
        if f.newest_arrived.saturating_sub(packet) >= weather.remembers_packets {
            return;
        }
        f.newest_arrived = f.newest_arrived.max(packet);
        f.arrived.push(packet);
        let count = f.arrived.len();
        if f.pieces.insert(f.piece_of[packet as usize]) {
            let bin = (now / (SECOND / 10)) as usize;
            if f.came.len() <= bin {
                f.came.resize(bin + 1, 0);
            }
            f.came[bin] += PACKET;
        }
        if !weather.is_cut && !weather.is_back_cut {
            // The dice are left alone where nothing is drawn, as the other storms were.
            let draw = if weather.back_jitter_ms > 0.0 { self.dice.between(-1.0, 1.0) } else { 0.0 };
            let takes_ms = (weather.round_trip_ms / 2.0 + weather.back_jitter_ms * draw).max(0.0);
            self.at(now + (takes_ms * 1e6) as u64, flow, What::Confirms(count));
        }
    }

    fn confirms(&mut self, flow: usize, count: usize) {
        let weather = self.weather();
        if weather.is_cut || weather.is_back_cut {
            return;
        }
        let (now, base) = (self.now, self.base);
        let f = &mut self.flows[flow];
        f.last_heard = now;
        if count <= f.confirmed {
            return;
        }
        let mut packets: Vec<u64> = f.arrived[f.confirmed..count].to_vec();
        f.confirmed = count;
        packets.sort_unstable();
        let mut newest = None;
        let mut any = false;
        for packet in packets {
            if let Some((sent, _)) = f.sent.remove(&packet) {
                any = true;
                f.controller.on_confirmed(base + Duration::from_nanos(sent), PACKET);
                if f.largest_confirmed.is_none_or(|largest| packet > largest) {
                    newest = Some(sent);
                }
            }
            f.largest_confirmed = f.largest_confirmed.max(Some(packet));
        }
        if !any {
            return;
        }
        let in_flight = f.sent.len() as u64 * PACKET;
        f.controller.on_batch_end(base + Duration::from_nanos(now), in_flight);
        if let Some(sent) = newest {
            let trip = (now - sent) as f64;
            f.latest = trip;
            if f.smoothed == 0.0 {
                (f.smoothed, f.variation) = (trip, trip / 2.0);
            } else {
                f.variation = 0.75 * f.variation + 0.25 * (f.smoothed - trip).abs();
                f.smoothed = 0.875 * f.smoothed + 0.125 * trip;
            }
        }
        self.detect(flow);
        self.flows[flow].timeouts = 0;
    }

    /// As RFC 9002, with the thresholds of this crate.
    fn detect(&mut self, flow: usize) {
        let (now, base) = (self.now, self.base);
        let f = &mut self.flows[flow];
        let Some(largest) = f.largest_confirmed else { return };
        let delay = (f.smoothed.max(f.latest) * f64::from(LATE)) as u64;
        f.loss_due = None;
        let mut lost = Vec::new();
        for (&packet, &(sent, _)) in f.sent.range(..largest) {
            if sent + delay <= now || largest >= packet + u64::from(OVERTAKEN_BY) {
                lost.push((packet, sent));
            } else {
                f.loss_due = Some(sent + delay);
                break;
            }
        }
        let mut first = None;
        for &(packet, sent) in &lost {
            let Some((_, piece)) = f.sent.remove(&packet) else { continue };
            f.again.push_back(piece);
            f.controller.on_packet_lost(PACKET as u16, packet, base + Duration::from_nanos(now));
            first.get_or_insert(sent);
        }
        if let (Some(first), Some(&(packet, last))) = (first, lost.last()) {
            let is_persistent = (last - first) as f64 > 3.0 * (f.smoothed + 4.0 * f.variation + 25e6);
            let (now, sent) = (base + Duration::from_nanos(now), base + Duration::from_nanos(last));
            f.controller.on_congestion_event(now, sent, is_persistent, false, 0, packet);
        }
    }

    fn probe_timeout(f: &Flow) -> u64 {
        let base = if f.smoothed == 0.0 { 1e9 } else { f.smoothed + (4.0 * f.variation).max(1e6) + 25e6 };
        let mut wait = base;
        for n in 1..=f.timeouts {
            wait = (base * 2f64.powi(n.min(16) as i32)).min(wait + 1e9);
        }
        f.last_sent + wait as u64
    }

    fn timers(&mut self, flow: usize) {
        let now = self.now;
        if self.flows[flow].loss_due.is_some_and(|due| due <= now) {
            self.detect(flow);
        }
        let f = &mut self.flows[flow];
        if !f.sent.is_empty() && f.loss_due.is_none() && Self::probe_timeout(f) <= now {
            f.probes += 2;
            f.timeouts += 1;
        }
        // What `nudge` does.
        let silent = now.saturating_sub(f.last_heard);
        if f.last_sent > f.last_heard
            && silent as f64 > 250e6 + 2.0 * f.smoothed.max(1.0)
            && now - f.last_nudge >= 250 * MS
        {
            f.last_nudge = now;
            let in_flight = f.sent.len() as u64 * PACKET;
            if in_flight + PACKET <= f.controller.window_bytes() {
                f.probes += 1;
            }
        }
    }

    fn send(&mut self, flow: usize) {
        loop {
            let now = self.now;
            let f = &mut self.flows[flow];
            let has_data = f.left > 0 || !f.again.is_empty();
            let in_flight = f.sent.len() as u64 * PACKET;
            let has_room = in_flight + PACKET <= f.controller.window_bytes();
            let is_probe = f.probes > 0;
            if has_data && !has_room {
                f.controller.on_cwnd_limited();
            }
            if !(is_probe || has_data && has_room) || f.may_send > now {
                break;
            }
            if is_probe {
                f.probes -= 1;
            }
            let piece = if let Some(piece) = f.again.pop_front() {
                piece
            } else if f.left > 0 {
                f.left = f.left.saturating_sub(PACKET);
                f.next_piece += 1;
                f.next_piece - 1
            } else {
                // The oldest once more.
                f.sent.values().next().map_or(0, |(_, piece)| *piece)
            };
            let packet = f.next_packet;
            f.next_packet += 1;
            f.piece_of.push(piece);
            f.sent.insert(packet, (now, piece));
            f.last_sent = now;
            f.controller.on_packet_sent(self.base + Duration::from_nanos(now), PACKET as u16, packet);
            let pacing = f.controller.pacing().unwrap_or(1e7);
            f.may_send = f.may_send.max(now.saturating_sub(MS)) + (PACKET as f64 / pacing * 1e9) as u64;
            self.pass(flow, packet);
        }
        self.sleep(flow);
    }

    fn sleep(&mut self, flow: usize) {
        let now = self.now;
        let f = &self.flows[flow];
        let has_data = f.left > 0 || !f.again.is_empty();
        let has_room = f.sent.len() as u64 * PACKET + PACKET <= f.controller.window_bytes();
        let mut next = u64::MAX;
        if f.may_send > now && (has_data && has_room || f.probes > 0) {
            next = next.min(f.may_send);
        }
        if let Some(due) = f.loss_due {
            next = next.min(due);
        } else if !f.sent.is_empty() {
            next = next.min(Self::probe_timeout(f));
        }
        if !f.sent.is_empty() {
            next = next.min(now + 50 * MS);
        }
        let next = next.max(now + 10 * US);
        if next < f.wakes_at && next < u64::MAX / 2 {
            self.flows[flow].wakes_at = next;
            self.at(next, flow, What::Wakes);
        }
    }

    fn pass(&mut self, flow: usize, packet: u64) {
        let weather = self.weather();
        if weather.is_cut || self.dice.share() < weather.loss {
            return;
        }
        let waiting_ms = self.queue.len() as f64 * PACKET as f64 * 8e-3 / weather.mbit_per_s;
        let bin = (self.now / (SECOND / 10)) as usize;
        let entries = &mut self.flows[flow].entries;
        entries.resize(entries.len().max(bin + 1), Entries::default());
        if waiting_ms > weather.queue_ms {
            entries[bin].overflowed += 1;
            return;
        }
        entries[bin].queued += 1;
        entries[bin].waits_ms += waiting_ms;
        self.queue.push_back((flow, packet));
        if self.queue.len() == 1 {
            self.serve();
        }
    }

    /// The first in the queue goes over the link.
    fn serve(&mut self) {
        if let Some(&(flow, packet)) = self.queue.front() {
            let takes = PACKET as f64 * 8e3 / self.weather().mbit_per_s;
            self.at(self.now + takes as u64, flow, What::Leaves(packet));
        }
    }

    fn leaves(&mut self, flow: usize, packet: u64) {
        let weather = self.weather();
        self.queue.pop_front();
        self.serve();
        if weather.is_cut {
            return;
        }
        let mut late = weather.round_trip_ms * 5e5 + weather.jitter_ms * 1e6 * self.dice.between(-1.0, 1.0);
        if weather.detour_packets > 0.0 && self.dice.share() < 0.1 {
            late += weather.detour_packets * PACKET as f64 * 8e3 / weather.mbit_per_s;
        }
        let mut at = self.now + late.max(0.0) as u64;
        if !weather.reorders && weather.detour_packets == 0.0 {
            at = at.max(self.last_arrival);
        }
        self.last_arrival = self.last_arrival.max(at);
        self.at(at, flow, What::Arrives(packet));
    }
}
