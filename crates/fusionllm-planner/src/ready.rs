//! The one readiness rule: what a task waits for.
//!
//! FP of a stage needs the activation of every incoming edge. BP needs what FP kept, and the gradient of every
//! outgoing edge that carries one. The generator of task orders and the runtime's task loop both ask here, so
//! what was planned and what runs cannot drift apart.

use crate::{EdgeId, StageEdge, StageId, Task};

/// One thing that a task cannot start without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Need {
    /// The activation of a micro-batch over an edge.
    Activation {
        /// The edge that brings it.
        edge: EdgeId,
        /// The micro-batch.
        micro_batch: u32,
    },
    /// The gradient of a micro-batch over an edge.
    Gradient {
        /// The edge that brings it, against its direction.
        edge: EdgeId,
        /// The micro-batch.
        micro_batch: u32,
    },
    /// What the stage's own FP kept of the micro-batch.
    Kept {
        /// The stage whose FP kept it.
        stage: StageId,
        /// The micro-batch.
        micro_batch: u32,
    },
}

/// All that `task` needs. WG comes after its BP in its order and needs no more. UPDATE needs nothing here: it is last
/// in its order, and what it waits for (shared gradients, the global norm) is not per micro-batch.
pub fn needs(edges: &[StageEdge], task: Task) -> impl Iterator<Item = Need> + '_ {
    let kept = match task {
        Task::Bp { stage, micro_batch } => Some(Need::Kept { stage, micro_batch }),
        Task::Fp { .. } | Task::Wg { .. } | Task::Update => None,
    };
    kept.into_iter().chain(edges.iter().filter_map(move |e| match task {
        Task::Fp { stage, micro_batch } if e.to == stage => Some(Need::Activation { edge: e.id, micro_batch }),
        Task::Bp { stage, micro_batch } if e.from == stage && e.gradient => {
            Some(Need::Gradient { edge: e.id, micro_batch })
        }
        Task::Fp { .. } | Task::Bp { .. } | Task::Wg { .. } | Task::Update => None,
    }))
}

/// Whether `task` may run, given what is there.
pub fn is_ready(edges: &[StageEdge], task: Task, has: impl Fn(Need) -> bool) -> bool {
    needs(edges, task).all(has)
}

/// By stage, the edges that touch it, so that a task need not look through all.
pub(crate) fn touching(stages: usize, edges: &[StageEdge]) -> Vec<Vec<StageEdge>> {
    let mut touching = vec![Vec::new(); stages];
    for edge in edges {
        touching[edge.from.index()].push(edge.clone());
        touching[edge.to.index()].push(edge.clone());
    }
    touching
}
