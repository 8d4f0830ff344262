//! What round trips show.

use std::time::{Duration, Instant};

/// Jitter beyond it is not made up for by more packets under way.
const MOST_SPREAD: Duration = Duration::from_millis(200);
/// The shortest round trip is of this time, or twice as long: a changed route may be longer.
const ROUND_TRIP_MEMORY: Duration = Duration::from_secs(60);

/// What one round trip has shown.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Round {
    /// Fastest sample, whether any was of the link itself.
    pub(super) bytes_per_s: f64,
    pub(super) is_of_link: bool,
    pub(super) shortest: Option<Duration>,
    /// Of all packets: how many, and their round trips together.
    pub(super) packets: u64,
    pub(super) trips: Duration,
    pub(super) shortest_of_all: Option<Duration>,
    pub(super) lost: u64,
    pub(super) began_at: u64,
    pub(super) was_window_full: bool,
}

/// The shortest round trip of the last minute or two.
#[derive(Clone, Debug)]
pub(super) struct ShortestRoundTrip {
    pub(super) since: Instant,
    pub(super) before: Option<Duration>,
    pub(super) now: Option<Duration>,
}

impl ShortestRoundTrip {
    pub(super) fn see(&mut self, now: Instant, round_trip: Duration) {
        if now.saturating_duration_since(self.since) > ROUND_TRIP_MEMORY {
            (self.since, self.before) = (now, self.now.take());
        }
        self.now = Some(self.now.map_or(round_trip, |shortest| shortest.min(round_trip)));
    }

    pub(super) fn get(&self) -> Option<Duration> {
        self.now.into_iter().chain(self.before).min()
    }
}

impl Round {
    pub(super) fn add_trips(&mut self, trips: impl Iterator<Item = Duration>) {
        for trip in trips {
            self.packets += 1;
            self.trips += trip;
            self.shortest_of_all = Some(self.shortest_of_all.map_or(trip, |shortest| shortest.min(trip)));
        }
    }

    /// How much later than the earliest its packets came, on average.
    pub(super) fn spread(&self) -> Duration {
        let packets = u32::try_from(self.packets).unwrap_or(u32::MAX).max(1);
        (self.trips / packets).saturating_sub(self.shortest_of_all.unwrap_or_default()).min(MOST_SPREAD)
    }
}
