//! The log of those who were not let in, of which there may be many.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use fusionllm_transport::PeerId;

/// Refusals that are logged one by one in each [`PERIOD`]; of the others only the number.
const EACH: u32 = 10;
const PERIOD: Duration = Duration::from_secs(60);

/// How many were refused in the present period.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<Option<Period>>);

#[derive(Clone, Copy, Debug)]
struct Period {
    began: Instant,
    count: u32,
}

impl Refusals {
    /// Logs that a peer was refused, by its key alone: what else it says of itself is not known to be true.
    pub(super) fn log(&self, peer: PeerId, reason: &str) {
        let (is_shown, missed) = self.count(Instant::now());
        if missed > 0 {
            tracing::warn!("{missed} more connections were refused in the minute before");
        }
        if is_shown {
            tracing::warn!(%peer, reason, "refused");
        }
    }

    /// Counts one more. Whether it is to be logged, and how many of the period before were not.
    fn count(&self, now: Instant) -> (bool, u32) {
        let mut period = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let old = period.filter(|p| now.saturating_duration_since(p.began) >= PERIOD);
        let missed = old.map_or(0, |p| p.count.saturating_sub(EACH));
        let current = period.filter(|_| old.is_none()).unwrap_or(Period { began: now, count: 0 });
        let current = Period { count: current.count.saturating_add(1), ..current };
        *period = Some(current);
        (current.count <= EACH, missed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_refusals_is_counted_and_not_logged() {
        let refusals = Refusals::default();
        let begin = Instant::now();
        let shown = (0..5000).filter(|_| refusals.count(begin).0).count();
        assert_eq!(shown, EACH as usize);
        assert_eq!(refusals.count(begin + PERIOD), (true, 5000 - EACH));
        assert_eq!(refusals.count(begin + PERIOD), (true, 0));
    }
}
