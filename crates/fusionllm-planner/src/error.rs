//! Why no placement could be made.

/// Why a job cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// There are fewer ops to give away than CompNodes.
    #[error("{compnodes} CompNodes but only {ops} ops to place, use at most {ops} CompNodes")]
    MoreCompNodesThanOps {
        /// CompNodes asked for.
        compnodes: usize,
        /// Ops that can be given to a CompNode of their own.
        ops: usize,
    },
    /// The cluster is empty.
    #[error("no CompNode to place the job on, expected at least one")]
    NoCompNodes,
    /// The graph has no ops.
    #[error("the OP-DAG has no ops")]
    EmptyGraph,
    /// A count that must be positive is zero.
    #[error("{what} is 0, expected at least 1")]
    Zero {
        /// What is zero.
        what: &'static str,
    },
    /// The strategy has no name known here.
    #[error("{reason}")]
    Strategy {
        /// What is wrong and what would be right.
        reason: String,
    },
    /// An explicit stage list does not fit graph and cluster.
    #[error("placement.stages[{stage}]: {reason}")]
    Stage {
        /// Index of the entry.
        stage: usize,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// Private data would leave its owner.
    #[error("data.private holds op `{op}` on CompNode 0, but placement.stages puts it on CompNode {compnode}")]
    Private {
        /// The op that sees token ids or labels.
        op: String,
        /// Where the stages put it.
        compnode: u32,
    },
    /// A speed that is not a positive number.
    #[error("CompNode `{name}` has speed {flop_per_s} FLOP/s, expected a positive number")]
    Speed {
        /// Which CompNode.
        name: String,
        /// Its speed as text.
        flop_per_s: String,
    },
    /// No CompNode can take a next task: the stages wait for each other.
    #[error("the task orders cannot be completed: the stages wait for each other (internal error)")]
    Deadlock,
}
