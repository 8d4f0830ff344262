//! What CompNodes did in one step, and all of it as the simulator would have it.

use std::collections::BTreeMap;

use fusionllm_planner::{Cargo, Cause, NodeIndex, Simulated, Span, Task, Transfer};
use serde::{Deserialize, Serialize};

use crate::Channel;

/// A task that was computed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TracedTask {
    /// Which task of the step it was.
    pub task: Task,
    /// From when, in seconds.
    pub start_s: f64,
    /// When it ended, in seconds on the same clock.
    pub end_s: f64,
}

/// One end of a message's way.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TracedMessage {
    /// The channel that the message belongs to.
    pub channel: Channel,
    /// Its micro-batch.
    pub micro_batch: u32,
    /// When it was handed over or delivered, in seconds.
    pub at_s: f64,
}

/// What one CompNode did in one step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepTrace {
    /// Tasks in the order in which they were computed.
    pub tasks: Vec<TracedTask>,
    /// Messages that it handed over to be sent.
    pub sent: Vec<TracedMessage>,
    /// Messages that were delivered to it.
    pub arrived: Vec<TracedMessage>,
}

impl StepTrace {
    /// Adds `seconds` to every time.
    pub fn shift(&mut self, seconds: f64) {
        for task in &mut self.tasks {
            (task.start_s, task.end_s) = (task.start_s + seconds, task.end_s + seconds);
        }
        self.sent.iter_mut().chain(&mut self.arrived).for_each(|m| m.at_s += seconds);
    }
}

/// The step as all CompNodes of a placement did it, beginning at 0. `traces` are in its order. A message lasts from
/// when it was handed over, whatever was before it in its queue, until it was delivered; its size is not known.
pub fn measured_step(traces: &[StepTrace]) -> Simulated {
    let tasks = traces.iter().flat_map(|t| &t.tasks);
    let begin = tasks.clone().map(|t| t.start_s).fold(f64::INFINITY, f64::min);
    let end = tasks.map(|t| t.end_s).fold(begin, f64::max);
    let span = |(node, trace): (u32, &StepTrace)| -> Vec<Span> {
        let of = |t: &TracedTask| Span {
            node: NodeIndex(node),
            task: t.task,
            start_s: t.start_s - begin,
            end_s: t.end_s - begin,
            cause: Cause::Start,
        };
        trace.tasks.iter().map(of).collect()
    };
    let mut sent: BTreeMap<(Channel, u32), (NodeIndex, f64)> = BTreeMap::new();
    for (node, trace) in (0..).map(NodeIndex).zip(traces) {
        sent.extend(trace.sent.iter().map(|m| ((m.channel, m.micro_batch), (node, m.at_s))));
    }
    let mut transfers = Vec::new();
    for (to, trace) in (0..).map(NodeIndex).zip(traces) {
        for message in &trace.arrived {
            let Some(&(from, at_s)) = sent.get(&(message.channel, message.micro_batch)) else { continue };
            // Clocks agree to about a round trip; nothing arrives before it was sent.
            let (start_s, end_s) = (at_s - begin, (message.at_s - begin).max(at_s - begin));
            let cargo = cargo(message);
            transfers.push(Transfer {
                from,
                to,
                cargo,
                bytes: 0.0,
                start_s,
                sent_s: end_s,
                end_s,
                cause: Cause::Start,
            });
        }
    }
    let spans = (0..).zip(traces).flat_map(span).collect();
    Simulated { step_s: (end - begin).max(0.0), spans, transfers }
}

fn cargo(message: &TracedMessage) -> Cargo {
    match message.channel {
        Channel::Activation(edge) => Cargo::Activation(edge, message.micro_batch),
        Channel::Gradient(edge) => Cargo::Gradient(edge, message.micro_batch),
        Channel::Shared { id, .. } => Cargo::Shared(id),
        Channel::NormPart { .. } | Channel::NormTotal { .. } => Cargo::Norm,
    }
}

#[cfg(test)]
mod tests {
    use fusionllm_planner::{EdgeId, StageId};

    use super::*;

    #[test]
    fn what_two_compnodes_saw_becomes_one_step() {
        let task = |stage, start_s, end_s| TracedTask {
            task: Task::Fp { stage: StageId(stage), micro_batch: 0 },
            start_s,
            end_s,
        };
        let message = |at_s| TracedMessage { channel: Channel::Activation(EdgeId(0)), micro_batch: 0, at_s };
        let first = StepTrace { tasks: vec![task(0, 10.0, 11.0)], sent: vec![message(11.0)], arrived: Vec::new() };
        let second = StepTrace { tasks: vec![task(1, 12.0, 14.0)], sent: Vec::new(), arrived: vec![message(12.0)] };
        let step = measured_step(&[first, second]);
        assert_eq!((step.step_s, step.spans.len()), (4.0, 2));
        let transfer = &step.transfers[0];
        assert_eq!((transfer.from.0, transfer.to.0, transfer.start_s, transfer.end_s), (0, 1, 1.0, 2.0));
        assert_eq!(measured_step(&[]).step_s, 0.0);
    }
}
