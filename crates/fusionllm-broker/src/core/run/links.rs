//! What is seen of a run's links, and what its controller makes of it.

use std::collections::BTreeMap;

use fusionllm_planner::{CodecChange, LinkObservation, NodeIndex, StepObservation, Way};
use fusionllm_protocol::{CodecNote, LinkBytes, LinkSpeed, StepReport};

use super::super::ConnectionId;
use super::super::drift::Came;
use super::Run;

impl Run {
    /// What came over links, by the places of their ends; nothing of those that are not of this placement.
    pub(super) fn came(&self, speeds: &[&LinkSpeed]) -> Vec<Came> {
        let names = &self.placement.compnodes;
        let of = |speed: &&LinkSpeed| {
            let (from, to) = (place_in(names, &speed.from)?, place_in(names, &speed.to)?);
            Some(Came { from, to, bytes: speed.bytes, busy_s: speed.busy_s })
        };
        speeds.iter().filter_map(of).collect()
    }

    /// By which way messages came to a CompNode that reports a step: from whom, and whether over the relay.
    pub(in crate::core) fn ways_to(&self, connection: ConnectionId, report: &StepReport) -> Vec<(ConnectionId, bool)> {
        let names = &self.placement.compnodes;
        let way = |speed: &LinkSpeed| {
            let from = *self.members.get(names.iter().position(|name| *name == speed.from)?)?;
            (from != connection).then_some((from, speed.relayed))
        };
        report.received.iter().take(names.len()).filter_map(way).collect()
    }

    /// What the controller makes of a step.
    pub(super) fn adapt(&mut self, step: u64, reports: &BTreeMap<NodeIndex, StepReport>) -> Vec<CodecChange> {
        let Some(controller) = &mut self.controller else { return Vec::new() };
        let names = &self.placement.compnodes;
        let index = |name: &str| place_in(names, name);
        let speeds = || reports.values().flat_map(|r| &r.received);
        let seen = |link: &LinkBytes| {
            let speed = speeds().find(|s| (&s.from, &s.to) == (&link.from, &link.to))?;
            Some(LinkObservation {
                from: index(&link.from)?,
                to: index(&link.to)?,
                dense_bytes: link.dense_bytes,
                received_bytes: speed.bytes,
                busy_s: speed.busy_s,
                error: link.error,
            })
        };
        let observation = StepObservation {
            step,
            loss: reports.values().find_map(|r| r.loss).unwrap_or(f64::NAN),
            compute_s: reports.values().map(|r| r.busy_s).fold(0.0, f64::max),
            links: reports.values().flat_map(|r| &r.links).filter_map(seen).collect(),
        };
        controller.observe(&observation)
    }

    /// A change of codec for people.
    pub(super) fn note(&self, change: &CodecChange) -> CodecNote {
        let name = |node: Option<NodeIndex>| {
            node.and_then(|n| self.placement.compnodes.get(n.index())).cloned().unwrap_or_default()
        };
        let edge = self.placement.edges.get(change.edge.index());
        let receiver = edge.and_then(|e| self.placement.route(e, change.way)).map(|route| route.to);
        CodecNote {
            from: name(Some(change.sender)),
            to: name(receiver),
            op: edge.map(|e| self.dag.op(e.op).name.clone()).unwrap_or_default(),
            gradient: change.way == Way::Gradient,
            codec: change.codec.to_string(),
            reason: change.reason.clone(),
        }
    }
}

/// The place of a CompNode in a placement.
fn place_in(names: &[String], name: &str) -> Option<NodeIndex> {
    (0..).map(NodeIndex).zip(names).find(|(_, known)| *known == name).map(|(index, _)| index)
}
