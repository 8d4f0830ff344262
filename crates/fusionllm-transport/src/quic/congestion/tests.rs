//! The controller over a link of one sender, in numbers instead of packets and sockets.

mod storms;
mod weather;
mod wire;

use noq_proto::congestion::Controller;

use super::*;

const PACKET: u64 = 1_250;
const MS: Duration = Duration::from_millis(1);

/// A link with a drop-tail queue.
struct Link {
    bytes_per_s: f64,
    round_trip: Duration,
    queue: Duration,
    /// Every so many packets one is lost.
    loses_each: u64,
    /// How often the receiver's machine, which computes, comes to confirm what has arrived.
    confirms_each: Duration,
}

impl Link {
    fn new(mbit_per_s: f64, round_trip_ms: u32) -> Self {
        Self {
            bytes_per_s: mbit_per_s * 1e6 / 8.0,
            round_trip: MS * round_trip_ms,
            queue: MS * 100,
            loses_each: u64::MAX,
            confirms_each: Duration::ZERO,
        }
    }
}

/// A sender with its link, and the clock of both.
struct Lab {
    controller: LinkRate,
    link: Link,
    began: Instant,
    now: Instant,
    link_free: Instant,
    packets: u64,
    longest_round_trip: Duration,
}

impl Lab {
    fn new(link: Link) -> Self {
        let now = Instant::now();
        let controller = LinkRate::new(now, PACKET);
        Self { controller, link, began: now, now, link_free: now, packets: 0, longest_round_trip: Duration::ZERO }
    }

    /// Sends so many bytes until all are confirmed (what is lost, again); how many times longer that took than the link
    /// needs for them and a round trip.
    fn send(&mut self, bytes: u64) -> f64 {
        let began = self.now;
        let mut left = bytes.div_ceil(PACKET);
        // When each packet on its way comes back, if it does, when it was sent, and its number.
        let mut under_way: VecDeque<(Option<Instant>, Instant, u64)> = VecDeque::new();
        let mut may_send = self.now;
        while left > 0 || !under_way.is_empty() {
            let in_flight = under_way.len() as u64 * PACKET;
            let has_room = in_flight + PACKET <= self.controller.window_bytes();
            if left > 0 && !has_room {
                self.controller.on_cwnd_limited();
            }
            let next_back = under_way.iter().find_map(|(back, ..)| *back);
            if left > 0 && has_room && next_back.is_none_or(|back| may_send <= back) {
                self.now = self.now.max(may_send);
                left -= 1;
                let back = self.pass();
                under_way.push_back((back, self.now, self.packets));
                let pacing = self.controller.pacing().unwrap_or(1e6);
                may_send = self.now + Duration::from_secs_f64(PACKET as f64 / pacing);
                continue;
            }
            let Some(back) = next_back else {
                // Nothing comes back by which a loss would show: a timer.
                self.now += self.link.round_trip * 2;
                left += under_way.len() as u64;
                under_way
                    .drain(..)
                    .for_each(|(.., packet)| self.controller.on_packet_lost(PACKET as u16, packet, began));
                continue;
            };
            self.now = self.now.max(back);
            // What was sent before and does not come is lost.
            while let Some((.., packet)) = under_way.pop_front_if(|(back, ..)| back.is_none()) {
                left += 1;
                self.controller.on_packet_lost(PACKET as u16, packet, self.now);
            }
            while let Some((_, sent, _)) =
                under_way.pop_front_if(|(back, ..)| back.is_some_and(|back| back <= self.now))
            {
                self.longest_round_trip = self.longest_round_trip.max(self.now - sent);
                self.controller.on_confirmed(sent, PACKET);
            }
            self.controller.on_batch_end(self.now, under_way.len() as u64 * PACKET);
        }
        let ideal = bytes as f64 / self.link.bytes_per_s + self.link.round_trip.as_secs_f64();
        (self.now - began).as_secs_f64() / ideal
    }

    /// When a packet that is sent now is confirmed.
    fn pass(&mut self) -> Option<Instant> {
        self.packets += 1;
        self.controller.on_packet_sent(self.now, PACKET as u16, self.packets);
        let begins = self.link_free.max(self.now);
        if begins - self.now > self.link.queue || self.packets.is_multiple_of(self.link.loses_each) {
            return None;
        }
        self.link_free = begins + Duration::from_secs_f64(PACKET as f64 / self.link.bytes_per_s);
        let back = self.link_free + self.link.round_trip;
        let each = self.link.confirms_each.as_nanos().max(1) as u64;
        let since = (back - self.began).as_nanos() as u64;
        Some(self.began + Duration::from_nanos(since.div_ceil(each) * each))
    }

    fn pause(&mut self, pause: Duration) {
        self.now += pause;
    }
}

#[test]
fn a_long_transfer_fills_the_link_and_leaves_its_queue_short() {
    for (mbit_per_s, round_trip_ms) in [(100.0, 50), (8.0, 100), (500.0, 100), (1_000.0, 2)] {
        let mut lab = Lab::new(Link::new(mbit_per_s, round_trip_ms));
        lab.send((mbit_per_s * 1e6 / 8.0) as u64);
        lab.longest_round_trip = Duration::ZERO;
        let took = lab.send((mbit_per_s * 1e6) as u64);
        assert!(took < 1.06, "{mbit_per_s} Mbit/s: {took} times the least");
        // The window, by a quarter more while probing.
        let most = (lab.link.round_trip * 2 + MACHINE_DELAY).mul_f64(PROBE_GAIN) + MS;
        assert!(lab.longest_round_trip < most, "{mbit_per_s} Mbit/s: {:?}", lab.longest_round_trip);
    }
}

#[test]
fn the_start_finds_the_links_speed_in_a_few_round_trips() {
    let mut lab = Lab::new(Link::new(100.0, 50));
    // 4 MB take 0.32 s; doubling from 32 packets takes 5 round trips.
    let took = lab.send(4_000_000);
    assert!(took < 2.0, "{took} times the least");
    assert!((lab.controller.bytes_per_s() - 12.5e6).abs() < 1e6, "{}", lab.controller.bytes_per_s());
}

#[test]
fn loss_that_is_not_of_a_queue_costs_little_more_than_what_was_lost() {
    for loses_each in [100, 50, 20] {
        let mut lab = Lab::new(Link { loses_each, ..Link::new(100.0, 50) });
        lab.send(12_500_000);
        let took = lab.send(125_000_000);
        let least = 1.0 / (1.0 - 1.0 / loses_each as f64);
        assert!(took < least * 1.08, "one of {loses_each}: {took} times the least");
    }
}

#[test]
fn bursts_with_pauses_and_small_messages_keep_the_links_speed() {
    let mut lab = Lab::new(Link::new(100.0, 50));
    for n in 0..600 {
        let took = lab.send(100_000);
        assert!(n < 10 || took < 1.1, "burst {n}: {took} times the least");
        for _ in 0..3 {
            lab.pause(MS * 20);
            lab.send(100);
        }
        lab.pause(MS * 500);
    }
}

#[test]
fn small_messages_alone_do_not_slow_the_first_burst() {
    let mut lab = Lab::new(Link::new(100.0, 50));
    for _ in 0..1_000 {
        lab.send(100);
        lab.pause(MS * 30);
    }
    let took = lab.send(4_000_000);
    assert!(took < 2.0, "{took} times the least");
}

#[test]
fn a_link_that_becomes_slower_or_faster_is_found_again() {
    let mut lab = Lab::new(Link::new(100.0, 50));
    lab.send(50_000_000);
    lab.link.bytes_per_s = 1e6;
    lab.send(5_000_000);
    lab.longest_round_trip = Duration::ZERO;
    let took = lab.send(10_000_000);
    assert!(took < 1.1 && lab.longest_round_trip < MS * 150, "{took}, {:?}", lab.longest_round_trip);
    lab.link.bytes_per_s = 25e6;
    lab.send(100_000_000);
    let took = lab.send(100_000_000);
    assert!(took < 1.06, "{took} times the least");
}

/// Two machines beside each other, busy computing, so that confirmations come every 10 ms. For a few messages they come
/// every 300: what the link then seems to do is far below what it does, and must not be believed for ever.
#[test]
fn a_machine_that_stalls_does_not_stay_slow() {
    let mut lab = Lab::new(Link { round_trip: MS / 5, ..Link::new(10_000.0, 0) });
    let mut message = |confirms_each: Duration| {
        lab.link.confirms_each = confirms_each;
        let began = lab.now;
        lab.send(500_000);
        let took = lab.now - began;
        lab.pause(MS * 50);
        took
    };
    (0..50).for_each(|_| _ = message(MS * 10));
    let before = message(MS * 10);
    let stalled: Vec<Duration> = (0..4).map(|_| message(MS * 300)).collect();
    let after: Vec<Duration> = (0..40).map(|_| message(MS * 10)).collect();
    assert!(before <= MS * 20 && stalled.iter().any(|&took| took > MS * 300), "{before:?}, stalled {stalled:?}");
    assert!(after[20..].iter().all(|&took| took <= MS * 50), "{before:?} before, then {after:?}");
}

#[test]
fn a_cut_link_gets_a_few_packets_until_something_comes() {
    let mut lab = Lab::new(Link::new(100.0, 50));
    lab.send(50_000_000);
    let window = lab.controller.window_bytes();
    let now = lab.now;
    lab.controller.on_congestion_event(now, now, true, false, window, 0);
    assert_eq!(lab.controller.window_bytes(), LEAST_PACKETS * PACKET);
    lab.send(PACKET);
    assert!(lab.controller.window_bytes() > window / 2);
}

#[test]
fn a_longer_route_is_believed_after_a_while() {
    let now = Instant::now();
    let mut shortest = ShortestRoundTrip { since: now, before: None, now: None };
    shortest.see(now, MS * 50);
    for s in 1..=60 {
        shortest.see(now + Duration::from_secs(s), MS * 90);
        assert_eq!(shortest.get(), Some(MS * 50));
    }
    for s in 61..=125 {
        shortest.see(now + Duration::from_secs(s), MS * 90);
    }
    assert_eq!(shortest.get(), Some(MS * 90));
}
