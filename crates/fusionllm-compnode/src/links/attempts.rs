//! How often and for how long a lost stream is opened again.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{BACK_OFF, REDIAL_LIMIT};

/// Streams that may be lost one after another, however long that takes.
const LEAST_ATTEMPTS: u32 = 8;

/// Streams of one channel that were lost since its receiver last took something, or since one lasted.
#[derive(Debug)]
pub(super) struct Attempts {
    lost: u32,
    since: Option<Instant>,
    pause: Duration,
    /// When the receiver answered the present stream.
    opened: Option<Instant>,
}

impl Default for Attempts {
    fn default() -> Self {
        Self { lost: 0, since: None, pause: BACK_OFF.0, opened: None }
    }
}

/// The receiver takes nothing, on whichever stream.
#[derive(Debug)]
pub(super) struct GaveUp {
    lost: u32,
    seconds: u64,
}

impl GaveUp {
    /// In words, with why the last stream was lost.
    pub(super) fn after(&self, reason: &str) -> String {
        format!("took nothing over {} streams in {} s; the last one: {reason}", self.lost, self.seconds)
    }
}

impl Attempts {
    /// The receiver has answered a stream at `now`. That alone is no progress: it may break every one that it answers.
    pub(super) fn opened(&mut self, now: Instant) {
        self.opened = Some(now);
    }

    /// The receiver has taken a message more.
    pub(super) fn progress(&mut self) {
        *self = Self { opened: self.opened, ..Self::default() };
    }

    /// A stream was lost: waits before the next one, longer each time.
    pub(super) async fn again(&mut self) -> Result<(), GaveUp> {
        sleep(self.lost_at(Instant::now())?).await;
        Ok(())
    }

    /// A stream was lost at `now`: how long to wait before the next one.
    fn lost_at(&mut self, now: Instant) -> Result<Duration, GaveUp> {
        // A receiver that computes for long takes nothing meanwhile, and over a bad link loses streams.
        if self.opened.take().is_some_and(|opened| now - opened > REDIAL_LIMIT) {
            *self = Self::default();
        }
        let elapsed = now - *self.since.get_or_insert(now);
        self.lost += 1;
        if self.lost >= LEAST_ATTEMPTS && elapsed > REDIAL_LIMIT {
            return Err(GaveUp { lost: self.lost, seconds: elapsed.as_secs() });
        }
        let pause = self.pause;
        self.pause = (self.pause * 2).min(BACK_OFF.1);
        Ok(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_streams_are_opened_again_ever_later_and_not_for_ever() {
        let began = Instant::now();
        let (mut attempts, mut pauses, mut now) = (Attempts::default(), Vec::new(), began);
        let gave_up = loop {
            match attempts.lost_at(now) {
                Ok(pause) => {
                    pauses.push(pause);
                    now += pause;
                }
                Err(gave_up) => break gave_up.after("gone"),
            }
        };
        assert!(pauses.is_sorted() && pauses[0] == BACK_OFF.0 && pauses.last() == Some(&BACK_OFF.1), "{pauses:?}");
        assert!(now - began > REDIAL_LIMIT && now - began < REDIAL_LIMIT * 2);
        assert!(gave_up.starts_with("took nothing over ") && gave_up.ends_with("the last one: gone"), "{gave_up}");
    }

    #[test]
    fn a_receiver_that_answers_and_breaks_every_stream_is_given_up() {
        let (mut attempts, mut now) = (Attempts::default(), Instant::now());
        let mut streams = 0;
        loop {
            attempts.opened(now);
            now += REDIAL_LIMIT / 10;
            let Ok(pause) = attempts.lost_at(now) else { break };
            now += pause;
            streams += 1;
            assert!(streams < 20, "it goes on for ever");
        }
        // One that takes something, or whose stream lasts, is not.
        let (mut taking, mut lasting) = (Attempts::default(), Attempts::default());
        for _ in 0..50 {
            now += REDIAL_LIMIT / 2;
            taking.opened(now);
            taking.progress();
            assert_eq!(taking.lost_at(now + BACK_OFF.1).ok(), Some(BACK_OFF.0));
            lasting.opened(now);
            assert_eq!(lasting.lost_at(now + REDIAL_LIMIT * 2).ok(), Some(BACK_OFF.0));
        }
    }

    #[test]
    fn a_stream_that_lasted_long_is_not_the_last_one() {
        let mut attempts = Attempts::default();
        let began = Instant::now();
        for lost in 0..LEAST_ATTEMPTS - 1 {
            assert!(attempts.lost_at(began + REDIAL_LIMIT * 2 * lost).is_ok());
        }
    }
}
