//! How fast packets are delivered, from when they were sent and confirmed.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A sample over fewer packets than this says nothing: they may have come in one batch.
pub(super) const LEAST_PACKETS: u64 = 16;
/// Packets that were confirmed by so much more slowly than they were sent were held up by the link.
const STRETCH: f64 = 1.1;

/// What a batch of confirmations showed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sample {
    /// Delivered bytes per second; nothing if too few were delivered.
    pub(super) rate: Option<Rate>,
    /// Round trip of the newest packet.
    pub(super) round_trip: Duration,
    /// What was delivered when that packet was sent. Rounds are counted by it.
    pub(super) delivered_before: u64,
}

/// A speed that was seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rate {
    pub(super) bytes_per_s: f64,
    /// Whether it is the link's: what was sent came more slowly. Otherwise the link can do at least this.
    pub(super) is_of_link: bool,
}

/// The state of things when packets were sent.
#[derive(Clone, Copy, Debug)]
struct Sending {
    at: Instant,
    mark: Mark,
    burst: u64,
}

/// A point from which a sample is taken.
#[derive(Clone, Copy, Debug)]
struct Mark {
    /// Bytes delivered by then.
    delivered: u64,
    /// When the last of them was confirmed.
    confirmed: Instant,
    /// When the newest packet of them was sent.
    sent: Instant,
    /// Whether it is the start of a burst, from which only a round trip later anything is confirmed.
    is_start: bool,
}

/// Samples the speed of delivery.
///
/// As in the delivery rate estimation of BBR, a sample reaches from the last confirmation before a packet was sent to that
/// packet's own, and takes the slower of sending and confirming. Differently from there, the packets of a burst that went
/// out before anything of it was confirmed are measured from the burst's first confirmation, not from its start: a burst
/// shorter than a round trip would otherwise show bytes per round trip, however fast the link is. And where a round trip is
/// over before the next packets go out, since those are paced, a sample reaches over as many of them as it needs.
#[derive(Clone, Debug)]
pub(super) struct Sampler {
    packet_bytes: u64,
    in_flight: u64,
    last: Mark,
    sendings: VecDeque<Sending>,
    /// Of the batch that is being confirmed.
    newest: Option<Sending>,
    burst: u64,
    /// First confirmation of the present burst.
    first: Option<Mark>,
    /// Where a sample over several round trips begins.
    anchor: Option<Mark>,
    last_sent: Instant,
    /// Nothing before it counts: the first confirmation after a silence.
    resumed: Option<Mark>,
    /// Whether the next confirmation is that.
    is_silent: bool,
}

impl Sampler {
    pub(super) fn new(now: Instant, packet_bytes: u64) -> Self {
        let last = Mark { delivered: 0, confirmed: now, sent: now, is_start: true };
        let sendings = VecDeque::new();
        Self {
            packet_bytes,
            in_flight: 0,
            last,
            sendings,
            newest: None,
            burst: 0,
            first: None,
            anchor: None,
            last_sent: now,
            resumed: None,
            is_silent: false,
        }
    }

    /// Bytes delivered so far.
    pub(super) fn delivered(&self) -> u64 {
        self.last.delivered
    }

    /// Bytes on their way.
    pub(super) fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// Whether nothing was confirmed of what is being sent after a pause.
    pub(super) fn is_fresh(&self) -> bool {
        self.first.is_none()
    }

    pub(super) fn set_packet_bytes(&mut self, packet_bytes: u64) {
        self.packet_bytes = packet_bytes;
    }

    /// A packet went out. With nothing on its way a burst begins, unless pacing held the packet back for at most `pause`.
    pub(super) fn sent(&mut self, now: Instant, bytes: u64, pause: Duration) {
        let waited = now.saturating_duration_since(self.last_sent);
        self.last_sent = now;
        if self.in_flight == 0 && (self.burst == 0 || waited > pause) {
            self.anchor = None;
            self.last = Mark { delivered: self.last.delivered, confirmed: now, sent: now, is_start: true };
            self.burst += 1;
            self.first = None;
        }
        self.in_flight += bytes;
        if self.sendings.back().is_none_or(|sending| sending.at != now) {
            self.sendings.push_back(Sending { at: now, mark: self.last, burst: self.burst });
        }
    }

    /// Nothing came for longer than a round trip. What the link did meanwhile says nothing of its speed, so samples begin
    /// anew at the next confirmation.
    pub(super) fn silence(&mut self) {
        self.is_silent = true;
    }

    pub(super) fn lost(&mut self, bytes: u64) {
        self.in_flight = self.in_flight.saturating_sub(bytes);
    }

    /// One packet of a batch was delivered.
    pub(super) fn confirmed(&mut self, sent: Instant, bytes: u64) {
        self.last.delivered += bytes;
        self.in_flight = self.in_flight.saturating_sub(bytes);
        // Of packets older than one that was confirmed no sample is taken any more.
        while self.sendings.front().is_some_and(|sending| sending.at < sent) {
            self.sendings.pop_front();
        }
        if let Some(sending) = self.sendings.front().filter(|sending| sending.at == sent) {
            self.newest = Some(*sending);
        }
    }

    /// The batch is over, and `in_flight` bytes are still on their way.
    pub(super) fn end_batch(&mut self, now: Instant, in_flight: u64) -> Option<Sample> {
        self.in_flight = in_flight;
        let newest = self.newest.take()?;
        let here = Mark { delivered: self.last.delivered, confirmed: now, sent: newest.at, is_start: false };
        self.last = here;
        if std::mem::take(&mut self.is_silent) {
            self.resumed = Some(here);
        }
        let round_trip = now.saturating_duration_since(newest.at);
        let delivered_before = newest.mark.delivered;
        // What an earlier burst left behind is measured from where it was sent.
        let is_present = newest.burst == self.burst;
        let from = match self.first {
            Some(first) if newest.mark.is_start && is_present => first,
            Some(_) => newest.mark,
            None => {
                self.first = is_present.then_some(here);
                newest.mark
            }
        };
        let rate = self.rate(from, here);
        let rate = rate.or_else(|| self.anchor.filter(|_| is_present).and_then(|anchor| self.rate(anchor, here)));
        if is_present && (self.anchor.is_none() || rate.is_some()) {
            self.anchor = Some(here);
        }
        Some(Sample { rate, round_trip, delivered_before })
    }

    fn rate(&self, from: Mark, here: Mark) -> Option<Rate> {
        let from = self.resumed.filter(|resumed| from.confirmed < resumed.confirmed).unwrap_or(from);
        let bytes = here.delivered.saturating_sub(from.delivered);
        let sending = here.sent.saturating_duration_since(from.sent).as_secs_f64();
        let confirming = here.confirmed.saturating_duration_since(from.confirmed).as_secs_f64();
        let longer = sending.max(confirming);
        if bytes < LEAST_PACKETS * self.packet_bytes || longer <= 0.0 {
            return None;
        }
        let is_of_link = !from.is_start && confirming >= sending * STRETCH;
        Some(Rate { bytes_per_s: bytes as f64 / longer, is_of_link })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKET: u64 = 1_000;

    /// Sends `packets` with `gap_us` between them over a link that takes `link_us` for each and 50 ms there and back.
    fn burst(sampler: &mut Sampler, start: Instant, packets: u32, gap_us: u64, link_us: u64) -> Vec<Sample> {
        let half = Duration::from_millis(25);
        let gap = Duration::from_micros(gap_us);
        let mut free = start;
        let mut events = Vec::new();
        for n in 0..packets {
            let sent = start + gap * n;
            free = free.max(sent) + Duration::from_micros(link_us);
            events.push((sent, None));
            events.push((free + half * 2, Some(sent)));
        }
        events.sort();
        let mut samples = Vec::new();
        for (at, confirms) in events {
            match confirms {
                None => sampler.sent(at, PACKET, Duration::ZERO),
                Some(sent) => {
                    sampler.confirmed(sent, PACKET);
                    samples.extend(sampler.end_batch(at, sampler.in_flight()));
                }
            }
        }
        samples
    }

    #[test]
    fn a_burst_shorter_than_a_round_trip_shows_the_links_speed() {
        let start = Instant::now();
        let mut sampler = Sampler::new(start, PACKET);
        // 10 MB/s offered to a link of 2 MB/s: 40 packets take 20 ms of a round trip of 50.
        let samples = burst(&mut sampler, start, 40, 100, 500);
        let last = samples.last().unwrap();
        let rate = last.rate.unwrap();
        assert!((rate.bytes_per_s - 2e6).abs() < 1e5 && rate.is_of_link, "{rate:?}");
        assert!(samples.iter().all(|s| s.rate.is_none_or(|r| r.bytes_per_s < 2.2e6)));
    }

    #[test]
    fn a_sender_that_is_slower_than_the_link_shows_what_it_sent() {
        let start = Instant::now();
        let mut sampler = Sampler::new(start, PACKET);
        let samples = burst(&mut sampler, start, 400, 1_000, 100);
        let rate = samples.last().unwrap().rate.unwrap();
        assert!((rate.bytes_per_s - 1e6).abs() < 1e5 && !rate.is_of_link, "{rate:?}");
    }

    #[test]
    fn a_small_message_shows_no_speed() {
        let start = Instant::now();
        let mut sampler = Sampler::new(start, PACKET);
        for n in 0..10 {
            let samples = burst(&mut sampler, start + Duration::from_secs(n), 3, 100, 500);
            assert!(samples.iter().all(|sample| sample.rate.is_none()));
        }
    }

    #[test]
    fn a_pause_is_in_no_sample() {
        let start = Instant::now();
        let mut sampler = Sampler::new(start, PACKET);
        for n in 0..5 {
            let samples = burst(&mut sampler, start + Duration::from_secs(10 * n), 200, 100, 500);
            let rate = samples.last().unwrap().rate.unwrap();
            assert!((rate.bytes_per_s - 2e6).abs() < 1e5, "{rate:?}");
        }
    }
}
