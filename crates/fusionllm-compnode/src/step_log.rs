//! What a task loop did when, for the trace of a step.

use std::collections::VecDeque;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use fusionllm_planner::Task;
use fusionllm_protocol::{Channel, StepTrace, TracedMessage, TracedTask};

/// This step after a start is traced: by then devices and connections are warm.
const TRACED: u64 = 5;

/// Seconds of this process's clock, which [`ClockOffset`] brings to the broker's.
fn process_seconds(at: Instant) -> f64 {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    let began = *BEGAN.get_or_init(Instant::now);
    // Nothing that is logged lies before the first call by more than rounding.
    at.saturating_duration_since(began).as_secs_f64()
}

/// The log of the step at hand.
#[derive(Debug, Default)]
pub(crate) struct StepLog {
    trace: Option<StepTrace>,
}

impl StepLog {
    /// Begins the log of a step, if it is the one that is traced.
    pub(crate) fn begin(&mut self, step: u64, start_step: u64, steps: u64) {
        let traced = (start_step + TRACED).min(steps);
        self.trace = (step + 1 == traced).then(StepTrace::default);
    }

    pub(crate) fn task(&mut self, task: Task, start: Instant, end: Instant) {
        if let Some(trace) = &mut self.trace {
            let (start_s, end_s) = (process_seconds(start), process_seconds(end));
            // Weight gradients are made one by one.
            if let (Task::Wg { .. }, Some(last)) = (task, trace.tasks.last_mut())
                && last.task == task
            {
                last.end_s = end_s;
                return;
            }
            trace.tasks.push(TracedTask { task, start_s, end_s });
        }
    }

    pub(crate) fn sent(&mut self, channel: Channel, micro_batch: u32) {
        if let Some(trace) = &mut self.trace {
            trace.sent.push(TracedMessage { channel, micro_batch, at_s: process_seconds(Instant::now()) });
        }
    }

    pub(crate) fn arrived(&mut self, channel: Channel, micro_batch: u32, at: Instant) {
        if let Some(trace) = &mut self.trace {
            trace.arrived.push(TracedMessage { channel, micro_batch, at_s: process_seconds(at) });
        }
    }

    /// The trace, in seconds of this process's clock.
    pub(crate) fn end(&mut self) -> Option<StepTrace> {
        self.trace.take()
    }
}

/// Heartbeats that are not answered yet. An answer names its heartbeat: on a long way several are out at once.
#[derive(Debug, Default)]
pub(crate) struct Heartbeats {
    count: u64,
    sent: VecDeque<(u64, Instant)>,
}

impl Heartbeats {
    /// Heartbeats whose answers are still waited for.
    const MOST: usize = 32;

    /// One goes out now; its number.
    pub(crate) fn send(&mut self) -> u64 {
        self.count += 1;
        self.sent.push_back((self.count, Instant::now()));
        if self.sent.len() > Self::MOST {
            self.sent.pop_front();
        }
        self.count
    }

    /// When the heartbeat of this number was sent; nothing if it was answered before.
    pub(crate) fn answered(&mut self, number: u64) -> Option<Instant> {
        let at = self.sent.iter().position(|(n, _)| *n == number)?;
        self.sent.remove(at).map(|(_, sent)| sent)
    }
}

/// How far the broker's clock is ahead of this process's, by the heartbeat with the shortest way.
#[derive(Debug, Default)]
pub(crate) struct ClockOffset(Mutex<Option<(Duration, f64)>>);

impl ClockOffset {
    /// A heartbeat was sent at `sent` and answered when the broker's clock stood at `broker_s`.
    pub(crate) fn learn(&self, sent: Instant, broker_s: f64) {
        let (now, round_trip) = (Instant::now(), sent.elapsed());
        let offset = broker_s - (process_seconds(now) - round_trip.as_secs_f64() / 2.0);
        let mut best = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if best.is_none_or(|(shortest, _)| round_trip < shortest) {
            *best = Some((round_trip, offset));
        }
    }

    /// What is learned from now on is of another clock.
    pub(crate) fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The trace in seconds of the broker's clock; nothing if that is not known.
    pub(crate) fn apply(&self, mut trace: StepTrace) -> Option<StepTrace> {
        let (_, offset) = (*self.0.lock().unwrap_or_else(PoisonError::into_inner))?;
        trace.shift(offset);
        Some(trace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_step_is_logged() {
        let mut log = StepLog::default();
        for (step, traced) in [(3, false), (4, true), (5, false)] {
            log.begin(step, 0, 100);
            log.task(Task::Update, Instant::now(), Instant::now());
            assert_eq!(log.end().is_some(), traced, "step {step}");
        }
        log.begin(1, 0, 2);
        assert!(log.end().is_some(), "a short run's last step");
    }

    #[test]
    fn an_answer_belongs_to_the_heartbeat_of_its_number() {
        let mut heartbeats = Heartbeats::default();
        let before = Instant::now();
        let first = heartbeats.send();
        std::thread::sleep(Duration::from_millis(5));
        let second = heartbeats.send();
        let (second, first) = (heartbeats.answered(second).unwrap(), heartbeats.answered(first).unwrap());
        assert!(before <= first && first + Duration::from_millis(5) <= second);
        assert_eq!(heartbeats.answered(1), None, "each is answered once");
        for _ in 0..1000 {
            heartbeats.send();
        }
        assert!(heartbeats.sent.len() <= Heartbeats::MOST);
    }

    #[test]
    fn a_broker_that_comes_back_has_another_clock() {
        let offset = ClockOffset::default();
        offset.learn(Instant::now(), 1000.0);
        offset.forget();
        assert_eq!(offset.apply(StepTrace::default()), None);
        // A longer way than the first one, and yet it counts.
        offset.learn(Instant::now() - Duration::from_millis(20), 1.0);
        assert!(offset.apply(StepTrace::default()).is_some());
    }

    #[test]
    fn a_trace_is_brought_to_the_brokers_clock() {
        let offset = ClockOffset::default();
        assert_eq!(offset.apply(StepTrace::default()), None);
        let now = Instant::now();
        let before = process_seconds(now);
        offset.learn(now, 1000.0);
        let mut log = StepLog::default();
        log.begin(0, 0, 1);
        log.task(Task::Update, now, now);
        let trace = offset.apply(log.end().unwrap()).unwrap();
        assert!((trace.tasks[0].start_s - 1000.0).abs() < 0.1, "{trace:?} {before}");
    }
}
