//! A step as a trace that <https://ui.perfetto.dev> opens (the Chrome trace event form).

use serde::{Deserialize, Serialize};

use super::{Cargo, Simulated};
use crate::{Route, Task};

/// A whole trace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// Bars and names of rows, in any order.
    #[serde(rename = "traceEvents")]
    pub events: Vec<TraceEvent>,
}

/// One bar, or the name of a row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceEvent {
    /// What it is, as shown.
    pub name: String,
    /// `X`: a bar; `M`: the name of a process or thread.
    pub ph: String,
    /// Process: the CompNode.
    pub pid: u32,
    /// Thread: 0 computes, above that one for each peer that is sent to.
    pub tid: u32,
    /// Begin in microseconds.
    pub ts: f64,
    /// Length in microseconds.
    #[serde(default)]
    pub dur: f64,
    /// For a name: the name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub args: Option<NameArgs>,
}

/// The arguments of a naming event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameArgs {
    /// What the viewer writes on the row.
    pub name: String,
}

impl Trace {
    /// Several steps of the same CompNodes, each under a word of its own.
    pub fn side_by_side(steps: &[(&str, &Simulated)], names: &[String]) -> Self {
        let mut events = Vec::new();
        let count = u32::try_from(names.len()).unwrap_or(u32::MAX);
        for (place, (word, step)) in (0u32..).zip(steps) {
            let named: Vec<String> = names.iter().map(|name| format!("{name}, {word}")).collect();
            let mut own = step.events(&named);
            own.iter_mut().for_each(|event| event.pid += place * count);
            events.extend(own);
        }
        Self { events }
    }
}

impl TraceEvent {
    fn bar(name: String, pid: u32, tid: u32, start_s: f64, end_s: f64) -> Self {
        let (ts, dur) = (start_s * 1e6, (end_s - start_s) * 1e6);
        Self { name, ph: "X".to_owned(), pid, tid, ts, dur, args: None }
    }

    fn label(what: &str, pid: u32, tid: u32, name: String) -> Self {
        let args = Some(NameArgs { name });
        Self { name: what.to_owned(), ph: "M".to_owned(), pid, tid, ts: 0.0, dur: 0.0, args }
    }
}

impl Simulated {
    /// The step as a trace, with the CompNodes' names.
    pub fn trace(&self, names: &[String]) -> Trace {
        Trace { events: self.events(names) }
    }

    fn events(&self, names: &[String]) -> Vec<TraceEvent> {
        let mut events = Vec::new();
        for (pid, name) in (0..).zip(names) {
            events.push(TraceEvent::label("process_name", pid, 0, name.clone()));
            events.push(TraceEvent::label("thread_name", pid, 0, "compute".to_owned()));
        }
        for span in &self.spans {
            let name = match span.task {
                Task::Fp { stage, micro_batch } => format!("FP {} m{micro_batch}", stage.0),
                Task::Bp { stage, micro_batch } => format!("BP {} m{micro_batch}", stage.0),
                Task::Wg { stage, micro_batch } => format!("WG {} m{micro_batch}", stage.0),
                Task::Update => "UPDATE".to_owned(),
            };
            events.push(TraceEvent::bar(name, span.node.0, 0, span.start_s, span.end_s));
        }
        for Route { from, to } in self.links().keys() {
            let name = names.get(to.index()).cloned().unwrap_or_default();
            events.push(TraceEvent::label("thread_name", from.0, to.0 + 1, format!("to {name}")));
        }
        for transfer in &self.transfers {
            let name = match transfer.cargo {
                Cargo::Activation(edge, micro_batch) => format!("activation {} m{micro_batch}", edge.0),
                Cargo::Gradient(edge, micro_batch) => format!("gradient {} m{micro_batch}", edge.0),
                Cargo::Shared(_) => "shared gradient".to_owned(),
                Cargo::Norm => "norm".to_owned(),
            };
            let (pid, tid) = (transfer.from.0, transfer.to.0 + 1);
            events.push(TraceEvent::bar(name, pid, tid, transfer.start_s, transfer.sent_s));
        }
        events
    }
}
