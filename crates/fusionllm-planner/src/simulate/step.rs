//! A step as it was simulated: its tasks, its messages, and what each waited for.

use std::collections::BTreeMap;

use crate::{EdgeId, NodeIndex, Route, SharedId, Task};

/// What made something start when it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Nothing: it was the first.
    Start,
    /// The end of this span.
    Span(usize),
    /// The end of this transfer.
    Transfer(usize),
}

/// A task on its CompNode.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The CompNode that does it.
    pub node: NodeIndex,
    /// What it does.
    pub task: Task,
    /// When it begins, in seconds from the step's begin.
    pub start_s: f64,
    /// When it ends, in seconds from the step's begin.
    pub end_s: f64,
    /// Why it did not begin earlier.
    pub cause: Cause,
}

/// What a message carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cargo {
    /// An activation of this edge and micro-batch.
    Activation(EdgeId, u32),
    /// A gradient of this edge and micro-batch.
    Gradient(EdgeId, u32),
    /// A gradient of shared parameters.
    Shared(SharedId),
    /// A part or the total of the gradient norm.
    Norm,
}

/// A message on its link.
#[derive(Clone, Debug, PartialEq)]
pub struct Transfer {
    /// The CompNode that sends it.
    pub from: NodeIndex,
    /// The CompNode that receives it.
    pub to: NodeIndex,
    /// What the message carries.
    pub cargo: Cargo,
    /// Bytes as encoded.
    pub bytes: f64,
    /// When it begins to occupy the link, in seconds from the step's begin.
    pub start_s: f64,
    /// When the link is free again, in seconds from the step's begin.
    pub sent_s: f64,
    /// When the receiver has it, decoded, in seconds from the step's begin.
    pub end_s: f64,
    /// Why it did not begin earlier.
    pub cause: Cause,
}

/// What a step sends over one direction of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinkUse {
    /// Bytes, as encoded.
    pub bytes: f64,
    /// Share of the step for which the direction is occupied.
    pub busy: f64,
}

/// A simulated step.
#[derive(Clone, Debug, PartialEq)]
pub struct Simulated {
    /// Seconds until the last UPDATE ends.
    pub step_s: f64,
    /// Each task, with when it begins and ends.
    pub spans: Vec<Span>,
    /// Each message, with when it leaves and arrives.
    pub transfers: Vec<Transfer>,
}

impl Simulated {
    /// The share of the step for which each CompNode computes.
    pub fn busy(&self, nodes: usize) -> Vec<f64> {
        let mut busy = vec![0.0; nodes];
        for span in &self.spans {
            busy[span.node.index()] += (span.end_s - span.start_s) / self.step_s;
        }
        busy
    }

    /// By direction of a link: what is sent over it.
    pub fn links(&self) -> BTreeMap<Route, LinkUse> {
        let mut links: BTreeMap<Route, LinkUse> = BTreeMap::new();
        for transfer in &self.transfers {
            let link = links.entry(Route { from: transfer.from, to: transfer.to }).or_default();
            link.bytes += transfer.bytes;
            link.busy += (transfer.sent_s - transfer.start_s) / self.step_s;
        }
        links
    }
}
