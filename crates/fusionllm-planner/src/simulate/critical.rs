//! The critical path: what the step waited for, from its end back to its begin.

use std::collections::BTreeMap;
use std::fmt;

use super::{Cause, Simulated};
use crate::NodeIndex;

/// Something that takes time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// A CompNode's device.
    Device(NodeIndex),
    /// A direction of a link.
    Link(NodeIndex, NodeIndex),
}

/// How much of the critical path a resource takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Blame {
    /// The device, or the direction of a link.
    pub resource: Resource,
    /// In words, with the CompNodes' names.
    pub name: String,
    /// Share of the step, 0 to 1.
    pub share: f64,
}

impl fmt::Display for Blame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = self.share * 100.0;
        match self.resource {
            Resource::Device(_) => write!(f, "{percent:.0} % of the step computes on {}", self.name),
            Resource::Link(..) => write!(f, "{percent:.0} % of the step waits for the link {}", self.name),
        }
    }
}

impl Simulated {
    /// What lies on the critical path, the largest share first. The shares add up to 1.
    pub fn critical_path(&self, names: &[String]) -> Vec<Blame> {
        let mut seconds: BTreeMap<Resource, f64> = BTreeMap::new();
        let last = self.spans.iter().enumerate().max_by(|a, b| a.1.end_s.total_cmp(&b.1.end_s));
        let mut at = last.map_or(Cause::Start, |(index, _)| Cause::Span(index));
        let mut until = self.step_s;
        loop {
            let (resource, start_s, cause) = match at {
                Cause::Start => break,
                Cause::Span(index) => {
                    let span = &self.spans[index];
                    (Resource::Device(span.node), span.start_s, span.cause)
                }
                Cause::Transfer(index) => {
                    let transfer = &self.transfers[index];
                    (Resource::Link(transfer.from, transfer.to), transfer.start_s, transfer.cause)
                }
            };
            // A transfer that another one waited for counts only until the link was free.
            *seconds.entry(resource).or_default() += until - start_s;
            (until, at) = (start_s, cause);
        }
        let name = |node: NodeIndex| names.get(node.index()).cloned().unwrap_or_else(|| node.to_string());
        let mut blames: Vec<Blame> = seconds
            .into_iter()
            .map(|(resource, seconds)| Blame {
                resource,
                name: match resource {
                    Resource::Device(node) => name(node),
                    Resource::Link(from, to) => format!("{} → {}", name(from), name(to)),
                },
                share: seconds / self.step_s,
            })
            .collect();
        blames.sort_by(|a, b| b.share.total_cmp(&a.share));
        blames
    }
}
