//! When the way is longer than was believed, so that a window by its length never fills the link.

use std::time::{Duration, Instant};

/// So many such rounds, with none between that speaks against it, say that it may be.
const ROUNDS: u32 = 4;
/// A round trip longer by this than what was sent explains is longer for something else.
const LONGER: f64 = 1.05;
/// From one sounding to the next at least, or so many round trips, whatever is longer.
const PAUSE: (Duration, u32) = (Duration::from_secs(10), 50);

/// Watches for round trips that nothing sent explains.
#[derive(Clone, Debug, Default)]
pub(super) struct Sounding {
    rounds: u32,
    /// The longest round trip that the window of the round before explains.
    explained: Duration,
    not_before: Option<Instant>,
    /// What may be on its way while sounding.
    window: u64,
}

impl Sounding {
    /// A round is over. At the speed that is believed the link takes `explained` for the window of this round, and `settled`
    /// for that between probes. Nothing that was sent waited longer, so if the `shortest` round trip was longer, the way is;
    /// there is none where the window was not full. Says whether to sound.
    pub(super) fn end_round(&mut self, explained: Duration, settled: Duration, shortest: Option<Duration>) -> bool {
        let explained = std::mem::replace(&mut self.explained, explained).max(explained);
        let Some(shortest) = shortest else { return false };
        if shortest > explained.mul_f64(LONGER) {
            self.rounds += 1;
        } else if shortest <= settled.mul_f64(LONGER) {
            self.rounds = 0;
        }
        self.rounds >= ROUNDS
    }

    /// Whether it begins now. So little may be on its way then that none of it waits: half of what came in a round trip of the
    /// length that is believed, when `in_flight` took as long as `round_trip`.
    pub(super) fn begin(&mut self, now: Instant, in_flight: u64, believed: Duration, round_trip: Duration) -> bool {
        self.rounds = 0;
        if self.not_before.is_some_and(|at| now < at) {
            return false;
        }
        let (least, trips) = PAUSE;
        self.not_before = Some(now + least.max(believed * trips));
        self.window = (in_flight as f64 / 2.0 * believed.as_secs_f64() / round_trip.as_secs_f64().max(1e-6)) as u64;
        true
    }

    pub(super) fn forget(&mut self) {
        self.rounds = 0;
    }

    pub(super) fn window(&self) -> u64 {
        self.window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn round_trips_that_nothing_explains_ask_for_a_sounding() {
        let mut sounding = Sounding::default();
        let mut round =
            |explained: u32, trip: Option<u32>| sounding.end_round(MS * explained, MS * 30, trip.map(|t| MS * t));
        assert!((0..3).all(|_| !round(30, Some(50))));
        assert!(!round(30, Some(31)), "speaks against it");
        assert!((0..3).all(|_| !round(30, Some(50))));
        assert!(!round(60, Some(50)) && !round(30, Some(50)), "a probe explains it, in this round and the next");
        assert!(!round(30, None), "the window was not full");
        assert!(round(30, Some(50)));
    }

    #[test]
    fn soundings_are_rare_and_leave_nothing_to_wait() {
        let (mut sounding, now) = (Sounding::default(), Instant::now());
        assert!(sounding.begin(now, 100_000, MS * 10, MS * 50));
        assert_eq!(sounding.window(), 10_000);
        assert!(!sounding.begin(now + MS * 9_999, 100_000, MS * 10, MS * 50));
        assert!(sounding.begin(now + MS * 10_000, 100_000, MS * 300, MS * 600));
        assert!(!sounding.begin(now + MS * 24_000, 100_000, MS * 300, MS * 600));
    }
}
