//! How fast a connection may send over links between far places.
//!
//! A model of the link, in the manner of BBR: the speed at which it delivers, and its round trip without a queue. Packets
//! go out evenly at that speed, with at most two round trips' worth on their way. What it does otherwise is for the
//! traffic of training: bursts of some hundred kilobytes with pauses between them, beside messages of a few bytes.
//!
//! - Only packets that the link itself slowed down say how slow it is ([`sampler`]). Pauses, small messages and times
//!   without any answer say nothing and age nothing, so after them a burst goes out at the speed of the one before.
//! - There is no phase that holds a connection back for the sake of measuring. The queue is emptied once a cycle, which
//!   takes what the probe before it has put in.
//! - What radio and long links lose at any speed is no sign of a queue ([`losses`]). It is made up for by sending more, but
//!   only what is lost, too, while the queue runs empty ([`lean`]): at a link that drops what it has no queue for, more would
//!   be lost for what is sent more.
//! - However slow the model, enough packets go out in each round trip to see that the link is faster, and then the speed
//!   doubles each round trip. So no mistake of the model lasts.
//!
//! It yields when a queue builds up ([`LinkRate::yield_to_queue`]), and so a connection alone leaves at most about a round trip
//! of queue. Several that fill one link together without a pause never see it empty: each takes the queue of the others for
//! a part of the way, and together they fill what the bottleneck holds.

mod controller;
mod growth;
mod lean;
mod losses;
mod round;
mod sampler;
mod sounding;
#[cfg(test)]
mod tests;
mod window;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

pub(crate) use controller::LinkRateConfig;
use growth::{GROWTH, LastGrowth};
use lean::Lean;
use losses::{Counts, Losses};
use round::{Round, ShortestRoundTrip};
use sampler::{Sample, Sampler};
use sounding::Sounding;

/// Packets that may be on their way before anything is known, as browsers and content networks do.
const INITIAL_PACKETS: u64 = 32;
/// However slow the link, so many may.
const LEAST_PACKETS: u64 = 4;
/// Speed against the model at the start: a little above what doubles it each round (4 ln 2).
const STARTUP_GAIN: f64 = 2.77;
/// Speed against the model when probing for more.
const PROBE_GAIN: f64 = 1.25;
/// A probe has found more when it got this much more of what it had.
const FOUND: f64 = (1.0 + PROBE_GAIN) / 2.0;
/// Speed against the model when a probe has found more: it may be far off.
const GROWTH_GAIN: f64 = 2.5;
/// Window against the model meanwhile.
const GROWTH_WINDOW: f64 = 3.0;
/// Bytes on their way against what one round trip holds: confirmations come late and in batches.
const WINDOW_GAIN: f64 = 2.0;
/// Beyond which the window has this much for the machine's own delays, which on a short link are longer than it is.
const MACHINE_DELAY: Duration = Duration::from_millis(10);
/// And at least so many packets: twice what a sample needs, or a connection that became slow would see nothing.
const HEADROOM_PACKETS: u64 = 2 * sampler::LEAST_PACKETS;
/// Rounds that showed the link's speed, of which the fastest counts.
const REMEMBERED_ROUNDS: usize = 10;
/// Rounds between two probes, on a short link: more often costs queue, less often finds new speed late.
const MOST_CRUISE_ROUNDS: u32 = 6;
/// The same on a long link.
const LEAST_CRUISE_ROUNDS: u32 = 2;
/// Of what takes as long, so that new speed is found within seconds on any link.
const CRUISE: Duration = Duration::from_millis(500);
/// A queue longer than the round trip and this is not ours alone, or the link has become slow.
const CROWDED: Duration = Duration::from_millis(100);
/// After so many rounds of such a queue, although we yield, it is not ours, or the way has become longer.
const PATIENCE: u32 = 3;
/// For how long it then counts as the way's.
const STANDING: Duration = Duration::from_secs(10);
/// Nothing came for this long, and one and a half round trips: the link is cut, or somebody stalls.
const SILENCE: Duration = Duration::from_millis(100);
/// While nothing comes, seconds between two packets.
const SILENT_PACE: f64 = 0.2;
/// A round trip before one is known.
const UNKNOWN_ROUND_TRIP: Duration = Duration::from_millis(333);
/// What is sent as one piece takes this long on the link.
const PIECE_TIME: f64 = 0.001;
/// Seconds without a packet that are a pause at any pace.
const LONGEST_PACING_PAUSE: f64 = 0.25;
/// No larger piece can be given to the kernel.
const MOST_PIECE_BYTES: u64 = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// Doubles until the link's speed shows.
    Startup,
    /// The same from a speed that is known.
    Growth,
    /// Lets the queue run empty, for a round.
    Drain,
    /// At the link's speed, for so many more rounds.
    Cruise(u32),
    /// Asks for more, for a round.
    Probe,
    /// Sees in the round after what came of it, against the speed before.
    Probed(f64),
    /// Sees with next to nothing on its way how long that is.
    Sound,
}

/// A congestion controller by the link's speed; see the module.
#[derive(Clone, Debug)]
struct LinkRate {
    packet_bytes: u64,
    phase: Phase,
    sampler: Sampler,
    losses: Losses,
    lean: Lean,
    sounding: Sounding,
    round_trip: ShortestRoundTrip,
    /// A longer round trip that counts for the shortest until then, since yielding does not shorten it.
    standing: Option<(Duration, Instant)>,
    /// Rounds in a row that yielded.
    crowded_rounds: u32,
    /// Since when, and since how many delivered bytes, every packet took too long.
    long_since: Option<(Instant, u64)>,
    /// The last sample's round trip.
    latest: Duration,
    /// By how much packets are later than the earliest where no queue is ours.
    spread: Duration,
    /// Of rounds that showed the link's speed, the newest last.
    rates: VecDeque<f64>,
    growth: LastGrowth,
    /// The window while starting up.
    startup_window: u64,
    round: Round,
    /// The round ends when a packet is confirmed that was sent after so much was delivered.
    round_end: u64,
    was_window_full_before: bool,
    /// Everything was lost for several round trips; nothing came since.
    is_cut: bool,
    /// Nothing came for longer than it should take.
    is_silent: bool,
    /// When something last came, or the first packet went out after a pause.
    last_heard: Instant,
    last_packet: u64,
    /// Packets up to this one were sent before or during a silence: that they are lost says nothing.
    forgiven: u64,
    /// Of the batch that is being confirmed: when its packets were sent.
    batch: Vec<Instant>,
}

impl LinkRate {
    fn new(now: Instant, packet_bytes: u64) -> Self {
        Self {
            packet_bytes,
            phase: Phase::Startup,
            sampler: Sampler::new(now, packet_bytes),
            losses: Losses::default(),
            lean: Lean::default(),
            sounding: Sounding::default(),
            round_trip: ShortestRoundTrip { since: now, before: None, now: None },
            standing: None,
            crowded_rounds: 0,
            long_since: None,
            latest: UNKNOWN_ROUND_TRIP,
            spread: Duration::ZERO,
            rates: VecDeque::with_capacity(REMEMBERED_ROUNDS),
            growth: LastGrowth::default(),
            startup_window: INITIAL_PACKETS * packet_bytes,
            round: Round::default(),
            round_end: 0,
            was_window_full_before: false,
            is_cut: false,
            is_silent: false,
            last_heard: now,
            last_packet: 0,
            forgiven: 0,
            batch: Vec::new(),
        }
    }

    /// Whether what is on its way should have been answered.
    fn is_overdue(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last_heard) > self.latest.mul_f64(1.5) + SILENCE
    }

    fn on_sent(&mut self, now: Instant, bytes: u64, packet: u64) {
        if self.sampler.in_flight() == 0 {
            self.last_heard = now;
        }
        self.is_silent |= self.is_overdue(now);
        self.last_packet = packet;
        self.lean.sent(now, packet, self.phase == Phase::Drain && !self.sampler.is_fresh());
        self.sampler.sent(now, bytes, self.longest_pacing_pause());
    }

    fn on_confirmed(&mut self, sent: Instant, bytes: u64) {
        self.sampler.confirmed(sent, bytes);
        self.lean.confirmed(sent);
        self.batch.push(sent);
        let is_window_full = self.round.was_window_full || self.was_window_full_before;
        if self.phase == Phase::Startup && is_window_full {
            // Once something is known of the speed, no further than the next doubling needs.
            let rate = self.bytes_per_s();
            let most = if rate > 0.0 { self.trips_worth(STARTUP_GAIN) } else { u64::MAX };
            self.startup_window = (self.startup_window + bytes).min(most.max(self.startup_window));
        }
    }

    fn on_batch_end(&mut self, now: Instant, in_flight: u64) {
        let was_silent = self.is_silent || self.is_overdue(now);
        self.is_silent = false;
        self.last_heard = now;
        if was_silent {
            self.sampler.silence();
        }
        let sent = std::mem::take(&mut self.batch);
        let sample = self.sampler.end_batch(now, in_flight);
        if was_silent {
            self.resume();
        } else {
            self.round.add_trips(sent.iter().map(|sent| now.saturating_duration_since(*sent)));
        }
        self.batch = sent;
        self.batch.clear();
        if let Some(counts) = self.lean.take() {
            self.losses.end_lean(counts);
        }
        let Some(sample) = sample else { return };
        self.is_cut = false;
        self.latest = sample.round_trip;
        self.round_trip.see(now, sample.round_trip);
        if self.standing.is_some_and(|(standing, until)| now > until || sample.round_trip < standing / 2) {
            self.standing = None;
        }
        if self.phase == Phase::Sound {
            if !was_silent && sample.delivered_before >= self.round_end {
                self.end_sounding(now, sample.round_trip);
            }
            return;
        }
        if !was_silent && sample.delivered_before >= self.round.began_at {
            self.watch_queue(now, sample.round_trip);
        }
        let delivered = self.sampler.delivered() - self.round.began_at;
        let is_enough = delivered >= sampler::LEAST_PACKETS * self.packet_bytes;
        if sample.delivered_before >= self.round_end && (is_enough || self.rates.is_empty()) {
            self.end_round(now);
            self.round_end = self.sampler.delivered();
        }
        // A packet from before a silence has waited out the silence.
        self.add(&sample, was_silent);
    }

    /// Yields as soon as packets take too long for a round trip on end: rounds are as long as the queue, and it grows.
    fn watch_queue(&mut self, now: Instant, round_trip: Duration) {
        let Some(shortest) = self.base_round_trip().filter(|shortest| round_trip > *shortest * 2 + CROWDED) else {
            self.long_since = None;
            return;
        };
        let delivered = self.sampler.delivered();
        let (since, before) = *self.long_since.get_or_insert((now, delivered));
        let (took, came) = (now.saturating_duration_since(since), delivered - before);
        if took < shortest.max(MACHINE_DELAY) || came < sampler::LEAST_PACKETS * self.packet_bytes {
            return;
        }
        self.long_since = None;
        let round = Round {
            bytes_per_s: came as f64 / took.as_secs_f64().max(1e-6),
            shortest: Some(round_trip),
            ..Round::default()
        };
        self.yield_to_queue(&round, now);
        self.round = Round { began_at: delivered, ..Round::default() };
        self.round_end = delivered;
    }

    /// Something comes again. What was lost meanwhile, and how long it took, is not the link's way; its speed is what it was,
    /// until it shows otherwise, which is looked for soon.
    fn resume(&mut self) {
        self.long_since = None;
        self.sounding.forget();
        self.forgiven = self.last_packet;
        self.lean = Lean::default();
        self.round = Round { began_at: self.sampler.delivered(), ..Round::default() };
        self.round_end = self.sampler.delivered();
        if !matches!(self.phase, Phase::Startup) && !self.rates.is_empty() {
            self.phase = Phase::Probe;
        }
    }

    fn add(&mut self, sample: &Sample, was_silent: bool) {
        let round = &mut self.round;
        if !was_silent && sample.delivered_before >= round.began_at {
            round.shortest = Some(round.shortest.map_or(sample.round_trip, |s| s.min(sample.round_trip)));
        }
        if let Some(rate) = sample.rate {
            round.bytes_per_s = round.bytes_per_s.max(rate.bytes_per_s);
            round.is_of_link |= rate.is_of_link;
        }
    }

    /// The first packet that was sent while sounding is back.
    fn end_sounding(&mut self, now: Instant, round_trip: Duration) {
        let believed = self.base_round_trip().unwrap_or_default();
        self.round = Round { began_at: self.sampler.delivered(), ..Round::default() };
        self.round_end = self.sampler.delivered();
        if round_trip > believed {
            self.standing = None;
            self.round_trip = ShortestRoundTrip { since: now, before: None, now: Some(round_trip) };
        }
        self.phase = Phase::Probe;
    }

    fn end_round(&mut self, now: Instant) {
        let is_short = self.is_window_short();
        let began_at = self.sampler.delivered();
        let round = std::mem::replace(&mut self.round, Round { began_at, ..Round::default() });
        self.was_window_full_before = round.was_window_full;
        let before = self.bytes_per_s();
        if self.phase == Phase::Drain && round.packets >= sampler::LEAST_PACKETS {
            self.spread = (self.spread + round.spread()) / 2;
        }
        if self.overflows(&round, began_at) {
            self.yield_to_queue(&round, now);
            return;
        }
        if self.long_since.is_none() {
            self.crowded_rounds = 0;
        }
        if round.is_of_link || round.bytes_per_s > before {
            if self.rates.len() == REMEMBERED_ROUNDS {
                self.rates.pop_front();
            }
            self.rates.push_back(round.bytes_per_s);
        }
        self.phase = self.next_phase(&round, before);
        if is_short {
            self.sound(now, round.shortest_of_all);
        }
    }

    /// Whether round after round takes longer than what is on its way explains.
    fn is_window_short(&mut self) -> bool {
        let rate = self.sending_rate();
        if rate <= 0.0 || self.phase == Phase::Startup {
            return false;
        }
        let time = |bytes: u64| Duration::from_secs_f64(bytes as f64 / rate);
        // A window for less than so many round trips shows no growth.
        let part = if self.phase == Phase::Growth { GROWTH } else { 1.0 };
        let (explained, settled) = (time(self.window_bytes()).div_f64(part), time(self.trips_worth(WINDOW_GAIN)));
        let is_full = self.round.was_window_full && self.was_window_full_before;
        self.sounding.end_round(explained, settled, self.round.shortest_of_all.filter(|_| is_full))
    }

    /// Lets next to nothing on its way, to see how long that is, unless that was seen not long ago.
    fn sound(&mut self, now: Instant, round_trip: Option<Duration>) -> bool {
        let (Some(believed), Some(round_trip)) = (self.base_round_trip(), round_trip) else { return false };
        let in_flight = self.sampler.in_flight();
        let begins = !self.rates.is_empty() && self.sounding.begin(now, in_flight, believed, round_trip);
        if begins {
            self.phase = Phase::Sound;
        }
        begins
    }

    fn yield_to_queue(&mut self, round: &Round, now: Instant) {
        self.crowded_rounds += 1;
        // What was delivered in this round is what there is for us. If yielding once did not help, twice does not either.
        if round.bytes_per_s > 0.0 && self.crowded_rounds == 1 {
            self.rates.clear();
            self.rates.push_back(round.bytes_per_s);
        }
        if self.crowded_rounds == 2 && self.sound(now, round.shortest) {
            return;
        }
        if self.crowded_rounds > PATIENCE {
            self.standing = round.shortest.map(|shortest| (shortest, now + STANDING));
            self.crowded_rounds = 0;
        }
        if !self.rates.is_empty() {
            self.phase = Phase::Drain;
        }
    }

    fn next_phase(&mut self, round: &Round, before: f64) -> Phase {
        let has_found = round.bytes_per_s > before * FOUND && before > 0.0;
        match self.phase {
            phase @ (Phase::Startup | Phase::Growth) => {
                self.growth.see(round);
                if self.growth.is_over() { Phase::Drain } else { phase }
            }
            Phase::Probed(before) if round.bytes_per_s > before * FOUND => self.grow(round),
            Phase::Drain | Phase::Cruise(_) if has_found => self.grow(round),
            Phase::Drain => Phase::Cruise(self.cruise_rounds()),
            Phase::Cruise(0) => Phase::Probe,
            Phase::Cruise(rounds) => Phase::Cruise(rounds - 1),
            Phase::Probe => Phase::Probed(before),
            Phase::Probed(_) => Phase::Drain,
            Phase::Sound => Phase::Probe,
        }
    }

    fn grow(&mut self, round: &Round) -> Phase {
        self.growth = LastGrowth::to(round);
        Phase::Growth
    }

    fn cruise_rounds(&self) -> u32 {
        let round_trip = self.latest.as_secs_f64().max(1e-6);
        ((CRUISE.as_secs_f64() / round_trip) as u32).clamp(LEAST_CRUISE_ROUNDS, MOST_CRUISE_ROUNDS)
    }

    /// Whether a round shows a queue that overflows.
    fn overflows(&mut self, round: &Round, delivered: u64) -> bool {
        let packets = |bytes: u64| bytes / self.packet_bytes.max(1);
        let overflows =
            self.losses.end_round(Counts { came: packets(delivered - round.began_at), lost: packets(round.lost) });
        // At the start more is asked for than there is, until it shows that no more comes.
        let is_growing = matches!(self.phase, Phase::Startup) && self.growth.goes_on(round);
        overflows && !is_growing
    }
}
