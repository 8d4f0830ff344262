//! How fast a connection may send over links between far places.
//!
//! A model of the link, in the manner of BBR: the speed at which it delivers, and its round trip without a queue. Packets
//! go out evenly at that speed, with at most two round trips' worth on their way. What it does otherwise is for the
//! traffic of training: bursts of some hundred kilobytes with pauses between them, beside messages of a few bytes.
//!
//! - Only packets that the link itself slowed down say how slow it is ([`sampler`]). Pauses and small messages say nothing
//!   and age nothing, so after them a burst goes out at the speed of the one before.
//! - There is no phase that holds a connection back for the sake of measuring. The queue is emptied once a cycle, which
//!   takes what the probe before it has put in.
//! - Loss slows it down only when a round loses more than [`TOLERATED_LOSS`]: what radio and long links lose is no sign
//!   of a queue.
//!
//! It yields when a queue builds up ([`LinkRate::is_crowded`]), and so leaves at most about a round trip of queue even where
//! several connections share a link.

mod sampler;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use noq_proto::RttEstimator;
use noq_proto::congestion::{Controller, ControllerFactory, ControllerMetrics};

use sampler::{Sample, Sampler};

/// Packets that may be on their way before anything is known, as browsers and content networks do.
const INITIAL_PACKETS: u64 = 32;
/// However slow the link, so many may.
const LEAST_PACKETS: u64 = 4;
/// Speed against the model at the start: a little above what doubles it each round (4 ln 2).
const STARTUP_GAIN: f64 = 2.77;
/// Speed against the model when probing for more.
const PROBE_GAIN: f64 = 1.25;
/// Likewise when the round before has found more: the model may be far off, as after a machine has stalled.
const FOUND_GAIN: f64 = 2.0;
/// Bytes on their way against what one round trip holds: confirmations come late and in batches.
const WINDOW_GAIN: f64 = 2.0;
/// Beyond which the window has this much for the machine's own delays, which on a short link are longer than it is.
const MACHINE_DELAY: Duration = Duration::from_millis(10);
/// And at least so many packets: twice what a sample needs, or a connection that became slow would see nothing.
const HEADROOM_PACKETS: u64 = 2 * sampler::LEAST_PACKETS;
/// Rounds that showed the link's speed, of which the fastest counts.
const REMEMBERED_ROUNDS: usize = 10;
/// Rounds between two probes: more often costs queue, less often finds new speed late.
const CRUISE_ROUNDS: u32 = 6;
/// The start is over when the link's speed has not grown by [`GROWTH`] for so many rounds.
const FULL_ROUNDS: u32 = 2;
/// What counts as growth of the link's speed.
const GROWTH: f64 = 1.25;
/// A round that loses more overflows a queue.
const TOLERATED_LOSS: f64 = 0.1;
/// And at least so many packets: one of five says nothing.
const LEAST_LOST_PACKETS: u64 = 8;
/// A queue longer than the round trip and this is not ours alone, or the link has become slow.
const CROWDED: Duration = Duration::from_millis(100);
/// The shortest round trip is of this time, or twice as long: a changed route may be longer.
const ROUND_TRIP_MEMORY: Duration = Duration::from_secs(60);
/// What is sent as one piece takes this long on the link.
const PIECE_TIME: f64 = 0.001;
/// Seconds without a packet that are a pause at any pace.
const LONGEST_PACING_PAUSE: f64 = 0.25;
/// No larger piece can be given to the kernel.
const MOST_PIECE_BYTES: u64 = 64 << 10;

/// Makes a [`LinkRate`] for each path of a connection.
#[derive(Debug, Default)]
pub(crate) struct LinkRateConfig;

impl ControllerFactory for LinkRateConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(LinkRate::new(now, u64::from(current_mtu)))
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// Doubles until the link's speed shows.
    Startup,
    /// Lets the queue run empty, for a round.
    Drain,
    /// At the link's speed, for so many more rounds.
    Cruise(u32),
    /// Asks for so many times the speed, for a round or as long as there is more.
    Probe(f64),
}

/// What one round trip has shown.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    /// Fastest sample, whether any was of the link itself.
    bytes_per_s: f64,
    is_of_link: bool,
    shortest: Option<Duration>,
    lost: u64,
    began_at: u64,
    was_window_full: bool,
}

/// The shortest round trip of the last minute or two.
#[derive(Clone, Debug)]
struct ShortestRoundTrip {
    since: Instant,
    before: Option<Duration>,
    now: Option<Duration>,
}

impl ShortestRoundTrip {
    fn see(&mut self, now: Instant, round_trip: Duration) {
        if now.saturating_duration_since(self.since) > ROUND_TRIP_MEMORY {
            (self.since, self.before) = (now, self.now.take());
        }
        self.now = Some(self.now.map_or(round_trip, |shortest| shortest.min(round_trip)));
    }

    fn get(&self) -> Option<Duration> {
        self.now.into_iter().chain(self.before).min()
    }
}

/// A congestion controller by the link's speed; see the module.
#[derive(Clone, Debug)]
struct LinkRate {
    packet_bytes: u64,
    phase: Phase,
    sampler: Sampler,
    round_trip: ShortestRoundTrip,
    /// Of rounds that showed the link's speed, the newest last.
    rates: VecDeque<f64>,
    /// The speed at the start of the startup's last growth, and rounds since then.
    full: (f64, u32),
    /// The window while starting up.
    startup_window: u64,
    round: Round,
    /// The round ends when a packet is confirmed that was sent after so much was delivered.
    round_end: u64,
    was_window_full_before: bool,
    /// Everything was lost for several round trips; nothing came since.
    is_cut: bool,
}

impl LinkRate {
    fn new(now: Instant, packet_bytes: u64) -> Self {
        Self {
            packet_bytes,
            phase: Phase::Startup,
            sampler: Sampler::new(now, packet_bytes),
            round_trip: ShortestRoundTrip { since: now, before: None, now: None },
            rates: VecDeque::with_capacity(REMEMBERED_ROUNDS),
            full: (0.0, 0),
            startup_window: INITIAL_PACKETS * packet_bytes,
            round: Round::default(),
            round_end: 0,
            was_window_full_before: false,
            is_cut: false,
        }
    }

    /// The link's speed in bytes per second; 0 if nothing is known.
    fn bytes_per_s(&self) -> f64 {
        self.rates.iter().copied().fold(self.round.bytes_per_s, f64::max)
    }

    /// What `trips` round trips hold, and some for late confirmations.
    fn trips_worth(&self, trips: f64) -> u64 {
        let rate = self.bytes_per_s();
        let round_trip = self.round_trip.get().unwrap_or_default().as_secs_f64();
        let headroom = (rate * MACHINE_DELAY.as_secs_f64()).max((HEADROOM_PACKETS * self.packet_bytes) as f64);
        (trips * rate * round_trip + headroom) as u64
    }

    fn window_bytes(&self) -> u64 {
        let least = LEAST_PACKETS * self.packet_bytes;
        if self.is_cut {
            return least;
        }
        let window = match self.phase {
            Phase::Startup => self.startup_window,
            Phase::Drain => self.trips_worth(1.0),
            Phase::Cruise(_) => self.trips_worth(WINDOW_GAIN),
            // Where the window and not the link is what bounds, only a larger one shows it.
            Phase::Probe(gain) => (gain * self.trips_worth(WINDOW_GAIN) as f64) as u64,
        };
        window.max(least)
    }

    /// Bytes per second at which packets go out, above 0; nothing before a round trip is known.
    fn pacing(&self) -> Option<f64> {
        let round_trip = self.round_trip.get()?.as_secs_f64().max(1e-6);
        let rate = self.bytes_per_s();
        let pacing = match self.phase {
            Phase::Startup => (rate * STARTUP_GAIN).max(2.0 * self.startup_window as f64 / round_trip),
            Phase::Probe(gain) => rate * gain,
            // After a pause there is no queue, so a burst may begin with a probe.
            Phase::Drain | Phase::Cruise(_) if self.sampler.is_fresh() => rate * PROBE_GAIN,
            Phase::Drain | Phase::Cruise(_) => rate,
        };
        (pacing > 0.0).then_some(pacing)
    }

    /// What is sent as one piece at this pace.
    fn piece_bytes(&self, pacing: f64) -> u64 {
        ((pacing * PIECE_TIME) as u64).clamp(2 * self.packet_bytes, MOST_PIECE_BYTES)
    }

    /// Beyond which there was nothing to send.
    fn longest_pacing_pause(&self) -> Duration {
        let seconds = self.pacing().map_or(0.0, |pacing| 2.0 * self.piece_bytes(pacing) as f64 / pacing);
        Duration::from_secs_f64(seconds.min(LONGEST_PACING_PAUSE))
    }

    fn on_confirmed(&mut self, sent: Instant, bytes: u64) {
        self.sampler.confirmed(sent, bytes);
        let is_window_full = self.round.was_window_full || self.was_window_full_before;
        if self.phase == Phase::Startup && is_window_full {
            // Once something is known of the speed, no further than the next doubling needs.
            let rate = self.bytes_per_s();
            let most = if rate > 0.0 { self.trips_worth(STARTUP_GAIN) } else { u64::MAX };
            self.startup_window = (self.startup_window + bytes).min(most.max(self.startup_window));
        }
    }

    fn on_batch_end(&mut self, now: Instant, in_flight: u64) {
        let Some(sample) = self.sampler.end_batch(now, in_flight) else { return };
        self.is_cut = false;
        self.round_trip.see(now, sample.round_trip);
        if sample.delivered_before >= self.round_end {
            self.end_round();
            self.round_end = self.sampler.delivered();
        }
        self.add(&sample);
    }

    fn add(&mut self, sample: &Sample) {
        let round = &mut self.round;
        round.shortest = Some(round.shortest.map_or(sample.round_trip, |s| s.min(sample.round_trip)));
        if let Some(rate) = sample.rate {
            round.bytes_per_s = round.bytes_per_s.max(rate.bytes_per_s);
            round.is_of_link |= rate.is_of_link;
        }
    }

    fn end_round(&mut self) {
        let began_at = self.sampler.delivered();
        let round = std::mem::replace(&mut self.round, Round { began_at, ..Round::default() });
        self.was_window_full_before = round.was_window_full;
        let before = self.bytes_per_s();
        if self.is_crowded(&round, began_at) {
            // What was delivered in this round is what there is for us.
            if round.bytes_per_s > 0.0 {
                self.rates.clear();
                self.rates.push_back(round.bytes_per_s);
            }
            if !self.rates.is_empty() {
                self.phase = Phase::Drain;
            }
            return;
        }
        if round.is_of_link || round.bytes_per_s > before {
            if self.rates.len() == REMEMBERED_ROUNDS {
                self.rates.pop_front();
            }
            self.rates.push_back(round.bytes_per_s);
        }
        self.phase = self.next_phase(&round, before);
    }

    fn next_phase(&mut self, round: &Round, before: f64) -> Phase {
        match self.phase {
            Phase::Startup => {
                if round.bytes_per_s >= self.full.0 * GROWTH {
                    self.full = (round.bytes_per_s, 0);
                } else if round.is_of_link {
                    self.full.1 += 1;
                }
                if self.full.1 >= FULL_ROUNDS { Phase::Drain } else { Phase::Startup }
            }
            Phase::Drain => Phase::Cruise(CRUISE_ROUNDS),
            Phase::Cruise(0) => Phase::Probe(PROBE_GAIN),
            Phase::Cruise(rounds) => Phase::Cruise(rounds - 1),
            // Half of what it asked for is more than chance.
            Phase::Probe(gain) if round.bytes_per_s > before * (1.0 + gain) / 2.0 => Phase::Probe(FOUND_GAIN),
            Phase::Probe(_) => Phase::Drain,
        }
    }

    /// Whether a round shows a queue that overflows, or is longer than our window makes it.
    fn is_crowded(&self, round: &Round, delivered: u64) -> bool {
        let sent = (delivered - round.began_at) + round.lost;
        let overflows =
            round.lost >= LEAST_LOST_PACKETS * self.packet_bytes && round.lost as f64 > TOLERATED_LOSS * sent as f64;
        let is_long = match (round.shortest, self.round_trip.get()) {
            (Some(round), Some(shortest)) => round > shortest * 2 + CROWDED,
            _ => false,
        };
        overflows || is_long
    }
}

impl Controller for LinkRate {
    fn on_packet_sent(&mut self, now: Instant, bytes: u16, _pn: u64) {
        self.sampler.sent(now, u64::from(bytes), self.longest_pacing_pause());
    }

    fn on_cwnd_limited(&mut self) {
        self.round.was_window_full = true;
    }

    fn on_ack(&mut self, _now: Instant, sent: Instant, bytes: u64, _pn: u64, _app_limited: bool, _rtt: &RttEstimator) {
        self.on_confirmed(sent, bytes);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, _app_limited: bool, _largest: Option<u64>) {
        self.on_batch_end(now, in_flight);
    }

    fn on_congestion_event(
        &mut self,
        _now: Instant,
        _sent: Instant,
        is_persistent_congestion: bool,
        _is_ecn: bool,
        _lost_bytes: u64,
        _largest_lost_pn: u64,
    ) {
        self.is_cut |= is_persistent_congestion;
    }

    fn on_packet_lost(&mut self, lost_bytes: u16, _pn: u64, _now: Instant) {
        self.round.lost += u64::from(lost_bytes);
        self.sampler.lost(u64::from(lost_bytes));
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.packet_bytes = u64::from(new_mtu);
        self.sampler.set_packet_bytes(self.packet_bytes);
    }

    fn window(&self) -> u64 {
        self.window_bytes()
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.window_bytes();
        if let Some(pacing) = self.pacing() {
            metrics.pacing_rate = Some(pacing as u64);
            metrics.send_quantum = Some(self.piece_bytes(pacing));
        }
        let rate = self.bytes_per_s();
        metrics.bandwidth_estimate = (rate > 0.0).then_some((rate * 8.0) as u64);
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        INITIAL_PACKETS * self.packet_bytes
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
