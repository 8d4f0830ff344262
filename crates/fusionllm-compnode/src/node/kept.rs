//! What a job has reported and the broker may not have written yet: one that was started again is told it once more.

use std::collections::VecDeque;

use fusionllm_protocol::FromCompNode;

/// Reports that are kept for a broker that writes none: more than may wait for one that is away.
const MOST_KEPT: usize = 1 << 13;

/// The reports of a job, from the first one that may not be written.
#[derive(Debug)]
pub(super) struct Kept {
    /// With the step that was done when each was made.
    messages: VecDeque<(u64, FromCompNode)>,
    /// Those of steps up to this one are not here any more.
    gone: u64,
    /// Updates done.
    done: u64,
    /// Whether all steps are done, and all shards are sent.
    has_finished: bool,
    /// Whether a broker that was started again has not taken the job back yet: it is told nothing of it.
    is_awaited: bool,
}

impl Kept {
    /// Of a job that begins after `start_step` updates.
    pub(super) fn new(start_step: u64) -> Self {
        Self { messages: VecDeque::new(), gone: start_step, done: start_step, has_finished: false, is_awaited: false }
    }

    /// The first step whose report is here, with all later ones.
    pub(super) fn first(&self) -> u64 {
        self.gone + 1
    }

    /// Updates done.
    pub(super) fn done(&self) -> u64 {
        self.done
    }

    /// Whether more may be reported now: compute waits for a broker that does not take its job back.
    pub(super) fn has_room(&self) -> bool {
        !self.is_awaited || self.messages.len() < MOST_KEPT
    }

    /// Keeps a report, if it is one that is missed when it is lost. Gives it back if the broker is told now.
    pub(super) fn report(&mut self, message: FromCompNode) -> Option<FromCompNode> {
        if let FromCompNode::Step { report, .. } = &message {
            self.done = report.step;
        }
        let step = match &message {
            FromCompNode::Step { .. } | FromCompNode::Note { .. } => self.done,
            FromCompNode::ShardFailed { step, .. } => *step,
            _ => return Some(message),
        };
        if !self.is_awaited {
            // A broker that writes nothing for so long will not have the job back.
            if self.messages.len() >= MOST_KEPT
                && let Some((step, _)) = self.messages.pop_front()
            {
                self.gone = self.gone.max(step);
            }
            self.messages.push_back((step, message.clone()));
            return Some(message);
        }
        self.messages.push_back((step, message));
        None
    }

    /// All is done. Whether the broker is told now.
    pub(super) fn finish(&mut self) -> bool {
        self.has_finished = true;
        !self.is_awaited
    }

    /// The broker has written all up to this step.
    pub(super) fn recorded(&mut self, step: u64) {
        // Nobody writes what was not done.
        self.gone = self.gone.max(step.min(self.done));
        while self.messages.front().is_some_and(|(of, _)| *of <= self.gone) {
            self.messages.pop_front();
        }
    }

    /// Another broker process is there, which knows nothing of the job yet.
    pub(super) fn wait(&mut self) {
        self.is_awaited = true;
    }

    /// Whether that has not taken the job back.
    pub(super) fn is_awaited(&self) -> bool {
        self.is_awaited
    }

    /// It has the job back, with all up to this step written. Gives what it is to be told, and whether all is done.
    pub(super) fn taken_back(&mut self, recorded: u64) -> (Vec<FromCompNode>, bool) {
        self.recorded(recorded);
        self.is_awaited = false;
        (self.messages.iter().map(|(_, message)| message.clone()).collect(), self.has_finished)
    }
}

#[cfg(test)]
mod tests {
    use fusionllm_protocol::{Generation, JobId, RunKey, StepReport};

    use super::*;

    const KEY: RunKey = RunKey { job: JobId(1), generation: Generation(1) };

    fn step(step: u64) -> FromCompNode {
        let report = StepReport {
            step,
            loss: None,
            eval_loss: None,
            eval_accuracy: None,
            lr: 0.0,
            grad_norm: None,
            step_s: 0.0,
            busy_s: 0.0,
            live_max: 0,
            links: Vec::new(),
            received: Vec::new(),
            trace: None,
        };
        FromCompNode::Step { key: KEY, report }
    }

    #[test]
    fn what_is_not_written_is_told_again_and_once() {
        let mut kept = Kept::new(4);
        assert_eq!((kept.first(), kept.done()), (5, 4));
        for number in 5..=8 {
            assert_eq!(kept.report(step(number)), Some(step(number)), "its broker is there");
        }
        let failed = FromCompNode::ShardFailed { key: KEY, step: 8, reason: "full".to_owned() };
        assert!(kept.report(failed.clone()).is_some());
        kept.recorded(6);
        kept.recorded(2);
        assert_eq!(kept.first(), 7);
        kept.wait();
        assert_eq!(kept.report(step(9)), None, "another one must have the job back first");
        assert!(!kept.finish());
        // What concerns no report is told in any case.
        let reading = FromCompNode::Reading { key: KEY, done: 1, total: 2 };
        assert_eq!(kept.report(reading.clone()), Some(reading));
        assert_eq!(kept.taken_back(7), (vec![step(8), failed, step(9)], true));
        assert_eq!(kept.report(step(10)), Some(step(10)));
        kept.recorded(1000);
        assert_eq!((kept.first(), kept.done()), (11, 10));
    }

    #[test]
    fn a_broker_that_writes_nothing_makes_it_keep_only_so_many_and_one_that_decides_nothing_makes_it_wait() {
        let mut kept = Kept::new(0);
        for number in 1..=MOST_KEPT as u64 + 10 {
            assert!(kept.has_room());
            kept.report(step(number));
        }
        assert_eq!((kept.first(), kept.messages.len()), (11, MOST_KEPT));
        kept.wait();
        assert!(!kept.has_room(), "nothing more may get lost");
    }
}
