//! How fast payloads come from one peer: bytes, and the time for which at least one was coming in.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What comes in from one peer, and for how long it is coming in.
#[derive(Debug, Default)]
pub(super) struct Meter(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    coming: usize,
    since: Option<Instant>,
    busy: Duration,
    bytes: u64,
}

impl State {
    /// Counts the time up to now.
    fn settle(&mut self, now: Instant) {
        if let Some(since) = self.since.take() {
            self.busy += now - since;
        }
        self.since = (self.coming > 0).then_some(now);
    }
}

/// A payload that is coming in; it counts when this is dropped.
pub(super) struct Coming<'a> {
    meter: &'a Meter,
    bytes: u64,
}

impl Meter {
    /// A payload begins to come in.
    pub(super) fn begin(&self) -> Coming<'_> {
        self.change(|state| state.coming += 1);
        Coming { meter: self, bytes: 0 }
    }

    /// Bytes and busy time since the last call.
    pub(super) fn drain(&self) -> (u64, Duration) {
        self.change(|state| (std::mem::take(&mut state.bytes), std::mem::take(&mut state.busy)))
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        state.settle(now);
        let result = change(&mut state);
        state.since = (state.coming > 0).then_some(now);
        result
    }
}

impl Coming<'_> {
    /// It is there.
    pub(super) fn end(mut self, bytes: u64) {
        self.bytes = bytes;
    }
}

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        let bytes = self.bytes;
        self.meter.change(|state| {
            state.coming -= 1;
            state.bytes += bytes;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_that_come_at_once_are_busy_once() {
        let meter = Meter::default();
        let pause = Duration::from_millis(20);
        let (a, b) = (meter.begin(), meter.begin());
        std::thread::sleep(pause);
        a.end(10);
        b.end(5);
        let began = Instant::now();
        std::thread::sleep(pause);
        let (bytes, busy) = meter.drain();
        assert_eq!(bytes, 15);
        assert!(busy >= pause && busy < pause + began.elapsed(), "{busy:?}");
        assert_eq!(meter.drain(), (0, Duration::ZERO));
        drop(meter.begin());
        assert_eq!(meter.drain().0, 0, "what broke off brought nothing");
    }
}
