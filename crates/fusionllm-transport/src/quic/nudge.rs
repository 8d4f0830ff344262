//! Asks a peer that has gone silent whether it is there again.
//!
//! When nothing comes back, QUIC asks again after ever longer times, in noq 1.4 each a second longer than the one before: a
//! link that was cut for five seconds may be back for four before anybody notices. So a connection on which something is
//! unanswered sends one byte every now and then. Its confirmation shows what else was lost, which is then sent again.

use std::time::Duration;

use iroh::endpoint::{Connection, WeakConnectionHandle};
use tokio::time::{Instant, MissedTickBehavior, interval};

/// How often it is looked at, and asked.
const EACH: Duration = Duration::from_millis(250);
/// An answer that takes so many round trips, and [`EACH`], does not come.
const ROUND_TRIPS: u32 = 2;
/// A round trip without an answer yet: what QUIC assumes.
const UNKNOWN_ROUND_TRIP: Duration = Duration::from_millis(333);

/// Runs until the connection ends.
pub(crate) async fn run(connection: WeakConnectionHandle) {
    let mut looks = interval(EACH);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut silence = Silence::new(Instant::now());
    loop {
        looks.tick().await;
        let Some(connection) = connection.upgrade().filter(|c| c.close_reason().is_none()) else { return };
        let stats = connection.stats();
        let round_trip = longest_round_trip(&connection).unwrap_or(UNKNOWN_ROUND_TRIP);
        if silence.look(Instant::now(), stats.udp_rx.datagrams, stats.udp_tx.datagrams, round_trip) {
            // A peer that takes no datagrams is asked by QUIC alone.
            let _ = connection.send_datagram(vec![0].into());
        }
    }
}

fn longest_round_trip(connection: &Connection) -> Option<Duration> {
    connection.paths().iter().map(|path| path.stats().rtt).max()
}

/// Since when nothing came.
#[derive(Debug)]
struct Silence {
    since: Instant,
    received: u64,
    /// Sent by the time when something last came.
    sent: u64,
}

impl Silence {
    fn new(now: Instant) -> Self {
        Self { since: now, received: 0, sent: 0 }
    }

    /// Takes in the counts of packets, and says whether to ask.
    fn look(&mut self, now: Instant, received: u64, sent: u64, round_trip: Duration) -> bool {
        // As long as nothing is sent, no answer is due.
        if received != self.received || sent == self.sent {
            *self = Self { since: now, received, sent };
        }
        now.saturating_duration_since(self.since) >= EACH + round_trip * ROUND_TRIPS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_unanswered_is_asked_about() {
        let start = Instant::now();
        let mut silence = Silence::new(start);
        let mut look = |quarter: u32, received, sent| {
            silence.look(start + EACH * quarter, received, sent, Duration::from_millis(50))
        };
        assert!(!look(0, 10, 10));
        // Nothing to answer.
        assert!(!look(40, 10, 10));
        // Answered each time.
        assert!((41..60).all(|n| !look(n, 10 + u64::from(n), 10 + u64::from(n))));
        // Unanswered since look 59, for longer than two round trips and a look.
        let asked: Vec<bool> = (60..66).map(|n| look(n, 69, 100 + u64::from(n))).collect();
        assert_eq!(asked, [false, true, true, true, true, true]);
        assert!(!look(66, 70, 300));
    }
}
