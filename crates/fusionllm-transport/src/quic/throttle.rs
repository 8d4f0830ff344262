//! Log lines that strangers cause must not fill a disk.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lets through so many at once.
const BURST: u32 = 10;
/// One more line may be written for each time that this passes.
const EACH: Duration = Duration::from_secs(1);

/// Lets ten pass at once and one a second after, and counts what it held back.
#[derive(Debug)]
pub(crate) struct Throttle(Mutex<State>);

#[derive(Debug)]
struct State {
    left: u32,
    since: Option<Instant>,
    held_back: u64,
}

impl Throttle {
    /// One that has let nothing pass yet.
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(State { left: BURST, since: None, held_back: 0 }))
    }

    /// Whether one more may pass, and if so, how many were held back since the last one that did.
    pub(crate) fn pass(&self) -> Option<u64> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = *state.since.get_or_insert(now);
        let earned = u32::try_from(now.saturating_duration_since(since).as_nanos() / EACH.as_nanos()).unwrap_or(BURST);
        if earned > 0 {
            state.left = state.left.saturating_add(earned).min(BURST);
            state.since = Some(if earned >= BURST { now } else { since + EACH * earned });
        }
        if state.left == 0 {
            state.held_back += 1;
            return None;
        }
        state.left -= 1;
        Some(std::mem::take(&mut state.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_passes_as_ten_and_one_a_second() {
        let (throttle, start) = (Throttle::new(), Instant::now());
        let passed = |from_ms: u64, to_ms: u64| {
            (from_ms..to_ms).filter_map(|ms| throttle.pass_at(start + Duration::from_millis(ms))).collect::<Vec<_>>()
        };
        assert_eq!(passed(0, 999), [0; 10]);
        // The first after the flood says how many it stands for.
        assert_eq!(passed(999, 3_500), [990, 999, 999]);
        assert_eq!(passed(60_000, 60_500).len(), 10);
    }
}
