//! Stages that the job file lists itself.

use fusionllm_graph::OpDag;

use super::pins::Pins;
use crate::{NodeIndex, PlanError, Segment, StageSpec};

pub(super) fn segments(
    dag: &OpDag,
    compnodes: usize,
    stages: &[StageSpec],
    pins: &Pins,
) -> Result<Vec<Segment>, PlanError> {
    let mut segments: Vec<Segment> = Vec::new();
    let mut start = 0;
    for (index, stage) in stages.iter().enumerate() {
        let fail = |reason: String| PlanError::Stage { stage: index, reason };
        if stage.compnode as usize >= compnodes {
            return Err(fail(format!("CompNode {} does not exist, the job has {compnodes}", stage.compnode)));
        }
        let last = dag.find(&stage.last_op).ok_or_else(|| fail(format!("no op is named `{}`", stage.last_op)))?;
        let end = last.index() + 1;
        if end <= start {
            return Err(fail(format!("op `{}` comes before the end of the stage before it", stage.last_op)));
        }
        let node = NodeIndex(stage.compnode);
        let held = (start..end).find(|&i| pins.pinned[i] && node != NodeIndex::DATA_OWNER);
        if let Some(op) = held.and_then(|i| dag.ops().get(i)) {
            return Err(PlanError::Private { op: op.name.clone(), compnode: stage.compnode });
        }
        segments.push(Segment { compnode: node, ops: start..end });
        start = end;
    }
    if start != dag.ops().len() {
        let last = dag.ops().last().map_or("", |op| op.name.as_str());
        let reason = format!("the last stage must end with the last op, `{last}`");
        return Err(PlanError::Stage { stage: stages.len().saturating_sub(1), reason });
    }
    for node in 0..compnodes {
        if !segments.iter().any(|s| s.compnode.index() == node) {
            let reason = format!("CompNode {node} gets no stage, every CompNode needs one");
            return Err(PlanError::Stage { stage: stages.len().saturating_sub(1), reason });
        }
    }
    Ok(segments)
}
