//! The emulated internet as a function of time: packets go in with a time, and come out with one.
//!
//! A packet passes the sender's uplink, the link of the pair, and the receiver's downlink, each a [`Pipe`]; uplink and
//! downlink are optional. The pair's link also delays and loses. No clock, thread or device is known here.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::link::{Link, Queue};
use crate::packet::Unit;
use crate::pipe::{Nanos, Pipe};

/// A unit is cut so small that the slowest pipe on its way carries it in this time: coarser, one flow would hold up
/// others and the receiver would see bursts; finer, a fast link would cost more system calls.
const GRAIN: Nanos = 200_000;
/// Most bytes under way; what exceeds it is dropped as by a full queue.
const MOST_IN_FLIGHT: u64 = 1 << 30;

/// What a node's own access allows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Access {
    /// Bits per second to the network; boundless if left out.
    pub up: Option<f64>,
    /// Bits per second from the network.
    pub down: Option<f64>,
    /// Queue of each.
    pub queue: Duration,
}

/// What became of a directed link's packets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Packets that were delivered.
    pub packets: u64,
    /// Bytes delivered, IP headers included.
    pub bytes: u64,
    /// Dropped by a full queue.
    pub dropped: u64,
    /// Lost on the way.
    pub lost: u64,
    /// Lost because the link was cut.
    pub cut: u64,
}

#[derive(Debug)]
struct Pair {
    link: Link,
    pipe: Pipe,
    random: ChaCha8Rng,
    /// Within a run of losses.
    losing: bool,
    last_out: Nanos,
    /// Counts cuts: what entered before one does not arrive after it.
    epoch: u32,
    counters: Counters,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Pair,
    Down,
    Out,
}

#[derive(Debug)]
struct Event {
    at: Nanos,
    /// Keeps the order of what is due at one time.
    number: u64,
    stage: Stage,
    from: usize,
    to: usize,
    epoch: u32,
    unit: Unit,
}

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}

impl Eq for Event {}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Event {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// The emulated internet.
#[derive(Debug)]
pub struct Fabric {
    up: Vec<Option<Pipe>>,
    down: Vec<Option<Pipe>>,
    pairs: Vec<Pair>,
    events: BinaryHeap<Reverse<Event>>,
    number: u64,
    in_flight: u64,
}

impl Fabric {
    /// Joins nodes by `links`, one for each directed pair, row by row; `seed` settles all chance.
    pub fn new(access: &[Access], links: &[Link], seed: u64) -> Self {
        let pipe = |rate: Option<f64>, queue| {
            rate.map(|bits| Pipe::new(bits, Queue::Time(queue).bytes(bits), nanos(Link::default().burst)))
        };
        let pair = |(index, link): (usize, &Link)| Pair {
            link: link.clone(),
            pipe: Pipe::new(link.bits_per_s, link.queue.bytes(link.bits_per_s), nanos(link.burst)),
            random: ChaCha8Rng::seed_from_u64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index as u64)),
            losing: false,
            last_out: 0,
            epoch: 0,
            counters: Counters::default(),
        };
        Self {
            up: access.iter().map(|access| pipe(access.up, access.queue)).collect(),
            down: access.iter().map(|access| pipe(access.down, access.queue)).collect(),
            pairs: links.iter().enumerate().map(pair).collect(),
            events: BinaryHeap::new(),
            number: 0,
            in_flight: 0,
        }
    }

    /// How many nodes it joins.
    pub fn nodes(&self) -> usize {
        self.up.len()
    }

    /// Counters of each directed pair, row by row.
    pub fn counters(&self) -> Vec<Counters> {
        self.pairs.iter().map(|pair| pair.counters).collect()
    }

    /// Gives a directed link new numbers. What already waits for it or travels on it arrives as it would have, unless
    /// the link is cut: then it is lost.
    pub fn change(&mut self, from: usize, to: usize, link: Link) {
        let pair = self.pair(from, to);
        pair.pipe.set(link.bits_per_s, link.queue.bytes(link.bits_per_s), nanos(link.burst));
        if link.cut && !pair.link.cut {
            pair.epoch += 1;
            pair.last_out = 0;
            pair.pipe.clear();
        }
        pair.link = link;
    }

    /// A node sends.
    pub fn arrive(&mut self, now: Nanos, from: usize, to: usize, unit: Unit) {
        let nodes = self.nodes();
        if from >= nodes || to >= nodes || from == to {
            return;
        }
        let most = self.most_segments(from, to, &unit);
        for unit in unit.chunks(most) {
            if self.in_flight + unit.wire_bytes() > MOST_IN_FLIGHT {
                self.pair(from, to).counters.dropped += unit.segments() as u64;
                continue;
            }
            let Some(pipe) = &mut self.up[from] else {
                self.enter_pair(now, from, to, unit);
                continue;
            };
            if let Some((at, unit)) = enter(pipe, now, unit, &mut self.pairs[from * nodes + to].counters) {
                self.schedule(at, Stage::Pair, from, to, unit);
            }
        }
    }

    /// When there is something to do next.
    pub fn next_due(&self) -> Option<Nanos> {
        self.events.peek().map(|Reverse(event)| event.at)
    }

    /// What has arrived by `now`, one after the other: receiver and packets.
    pub fn next_out(&mut self, now: Nanos) -> Option<(usize, Unit)> {
        while self.next_due().is_some_and(|at| at <= now) {
            let Reverse(event) = self.events.pop()?;
            self.in_flight -= event.unit.wire_bytes();
            let Event { at, stage, from, to, epoch, unit, .. } = event;
            let pair = self.pair(from, to);
            if stage != Stage::Pair && epoch != pair.epoch {
                pair.counters.cut += unit.segments() as u64;
                continue;
            }
            match stage {
                Stage::Pair => self.enter_pair(at, from, to, unit),
                Stage::Down => self.enter_down(at, from, to, unit),
                Stage::Out => {
                    pair.counters.packets += unit.segments() as u64;
                    pair.counters.bytes += unit.wire_bytes();
                    return Some((to, unit));
                }
            }
        }
        None
    }

    fn pair(&mut self, from: usize, to: usize) -> &mut Pair {
        let index = from * self.nodes() + to;
        &mut self.pairs[index]
    }

    fn most_segments(&self, from: usize, to: usize, unit: &Unit) -> usize {
        let pipes = [self.up[from].as_ref(), Some(&self.pairs[from * self.nodes() + to].pipe), self.down[to].as_ref()];
        let slowest = pipes.into_iter().flatten().map(Pipe::bits_per_s).fold(f64::INFINITY, f64::min);
        (slowest * GRAIN as f64 / 8e9 / unit.wire_bytes_of_first(1) as f64) as usize
    }

    fn enter_pair(&mut self, now: Nanos, from: usize, to: usize, unit: Unit) {
        let has_downlink = self.down[to].is_some();
        let pair = self.pair(from, to);
        if pair.link.cut {
            pair.counters.cut += unit.segments() as u64;
            return;
        }
        let Some((left, unit)) = enter(&mut pair.pipe, now, unit, &mut pair.counters) else { return };
        let jitter = pair.jitter();
        let mut at = (left + nanos(pair.link.latency)).saturating_add_signed(jitter).max(left);
        if !pair.link.reorder {
            at = at.max(pair.last_out);
            pair.last_out = at;
        }
        let stage = if has_downlink { Stage::Down } else { Stage::Out };
        for unit in pair.survivors(unit) {
            self.schedule(at, stage, from, to, unit);
        }
    }

    fn enter_down(&mut self, now: Nanos, from: usize, to: usize, unit: Unit) {
        let index = from * self.nodes() + to;
        let Some(pipe) = &mut self.down[to] else { return };
        if let Some((at, unit)) = enter(pipe, now, unit, &mut self.pairs[index].counters) {
            self.schedule(at, Stage::Out, from, to, unit);
        }
    }

    fn schedule(&mut self, at: Nanos, stage: Stage, from: usize, to: usize, unit: Unit) {
        self.number += 1;
        self.in_flight += unit.wire_bytes();
        let (number, epoch) = (self.number, self.pair(from, to).epoch);
        self.events.push(Reverse(Event { at, number, stage, from, to, epoch, unit }));
    }
}

impl Pair {
    fn jitter(&mut self) -> i64 {
        let most = nanos(self.link.jitter) as i64;
        if most == 0 { 0 } else { self.random.random_range(-most..=most) }
    }

    /// Draws for each packet, and returns the runs that are left.
    fn survivors(&mut self, unit: Unit) -> Vec<Unit> {
        if self.link.loss == 0.0 {
            return vec![unit];
        }
        let lost: Vec<bool> = (0..unit.segments()).map(|_| self.draw_loss()).collect();
        self.counters.lost += lost.iter().filter(|lost| **lost).count() as u64;
        if !lost.contains(&true) {
            return vec![unit];
        }
        let mut start = 0;
        let mut runs = Vec::new();
        for run in lost.chunk_by(|a, b| a == b) {
            if !run[0] {
                runs.push(unit.clone().part(start..start + run.len()));
            }
            start += run.len();
        }
        runs
    }

    /// Independent losses, or a chain of two states whose share of losing time is `loss` and whose losing runs have the
    /// asked mean length.
    fn draw_loss(&mut self) -> bool {
        let (loss, burst) = (self.link.loss, self.link.loss_burst);
        let draw = self.random.random_range(0.0..1.0);
        if burst < 1.0 || loss >= 1.0 {
            return draw < loss;
        }
        let leave = 1.0 / burst;
        let enter = (loss * leave / (1.0 - loss)).min(1.0);
        self.losing = if self.losing { draw >= leave } else { draw < enter };
        self.losing
    }
}

/// What the pipe admits of a unit and when that has left; the rest is counted as dropped.
fn enter(pipe: &mut Pipe, now: Nanos, unit: Unit, counters: &mut Counters) -> Option<(Nanos, Unit)> {
    let (fits, at) = pipe.admit(now, &unit);
    counters.dropped += (unit.segments() - fits) as u64;
    (fits > 0).then(|| (at, unit.part(0..fits)))
}

fn nanos(time: Duration) -> Nanos {
    time.as_nanos() as Nanos
}

#[cfg(test)]
mod tests;
