//! Why no placement could be made.

use crate::GroupId;

/// So many gigabytes; of few of them to the byte, where two digits would say nothing.
fn gigabytes(gigabytes: &f64) -> String {
    let digits = if *gigabytes >= 0.01 { 2 } else { 9 };
    format!("{gigabytes:.digits$} GB")
}

/// How many blocks there are, and what would be right.
fn few_blocks(blocks: usize) -> String {
    match blocks {
        0 => "the names of the model's ops tell no blocks: leave it out".to_owned(),
        1 => "the model has one block, which must be left for others: leave it out".to_owned(),
        _ => format!(
            "the model has {blocks} blocks, of which one must be left for others: keep at most {} in all",
            blocks - 1
        ),
    }
}

/// Why a job cannot be placed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
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
    /// A placement has a CompNode that the cluster has not.
    #[error("CompNode `{name}` of the placement is not in the cluster")]
    Absent {
        /// Name of the CompNode.
        name: String,
    },
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
    /// A group is no whole pipeline.
    #[error("{group} holds op `{op}` {times} times, expected once: each group holds the whole OP-DAG")]
    NotWhole {
        /// The group.
        group: GroupId,
        /// Name of an op.
        op: String,
        /// How often the group holds it.
        times: usize,
    },
    /// Private data would leave its owner.
    #[error("data.private holds op `{op}` on CompNode 0, but placement.stages puts it on CompNode {compnode}")]
    Private {
        /// The op that must stay.
        op: String,
        /// Where the stages put it.
        compnode: u32,
    },
    /// The model has not so many blocks to keep.
    #[error("data.keep_blocks is {keep:?}, and {}", few_blocks(*.blocks))]
    KeepBlocks {
        /// The first and the last blocks that are to stay with the data owner.
        keep: [u32; 2],
        /// Blocks of the model.
        blocks: usize,
    },
    /// What stays with the data owner shares a parameter with what need not.
    #[error(
        "data.private keeps op `{kept}` with the data owner, but its parameter `{param}` is used by op `{other}` too, which is not \
         kept: leave data.private out, or train on one CompNode without it"
    )]
    KeptParam {
        /// Name of the parameter.
        param: String,
        /// An op that stays with the owner.
        kept: String,
        /// One that need not.
        other: String,
    },
    /// Machines of one organisation cannot be kept apart.
    #[error(
        "data.private keeps machines of one organisation apart, but beside the data owner {of_org} of {others} CompNodes belong to \
         `{org}`: they would be neighbours, or see both ends of the model; let CompNodes of other organisations join, use fewer \
         of `{org}`, or leave data.private out"
    )]
    Orgs {
        /// Name of the organisation.
        org: String,
        /// Its CompNodes.
        of_org: usize,
        /// All that do not own the data.
        others: usize,
    },
    /// A number of a CompNode's profile is out of range.
    #[error("CompNode `{name}` has {what} {got}, expected {expected}")]
    Profile {
        /// Name of the CompNode.
        name: String,
        /// Which number of its profile, as in the cluster file.
        what: &'static str,
        /// Its value as text.
        got: String,
        /// What would be right.
        expected: &'static str,
    },
    /// A link's numbers are out of range.
    #[error("link `{from}` to `{to}` has {got}, expected a latency of at least 0 and a positive bandwidth")]
    Link {
        /// Name of the sending CompNode.
        from: String,
        /// Name of the receiving CompNode.
        to: String,
        /// Its numbers as text.
        got: String,
    },
    /// The table of links does not fit the CompNodes.
    #[error("{compnodes} CompNodes need as many rows and columns of links, got {rows} rows")]
    LinkTable {
        /// Number of CompNodes.
        compnodes: usize,
        /// Rows of the table.
        rows: usize,
    },
    /// A cluster file contradicts itself.
    #[error("{reason}")]
    ClusterFile {
        /// What is wrong and what would be right.
        reason: String,
    },
    /// One op alone is too large for every CompNode.
    #[error(
        "op `{op}` alone needs {needed} with its optimizer state and one micro-batch, the largest CompNode `{compnode}` has \
         {memory}: use smaller micro-batches (more train.micro_batches) or a larger device",
        needed = gigabytes(needed_gb),
        memory = gigabytes(memory_gb)
    )]
    OpTooLarge {
        /// Name of the op.
        op: String,
        /// What it needs, in GB.
        needed_gb: f64,
        /// The CompNode with the most memory.
        compnode: String,
        /// Its memory in GB.
        memory_gb: f64,
    },
    /// The data owner cannot hold what must be with the data.
    #[error(
        "the data owner `{compnode}` needs {needed_gb:.6} GB for the {kept} ops that stay with the data and has {memory_gb:.6} GB: name \
         another data.owner, lower data.keep_blocks if it is set, or use smaller micro-batches (more train.micro_batches)"
    )]
    OwnerTooSmall {
        /// Name of the data owner.
        compnode: String,
        /// How many ops stay with it.
        kept: usize,
        /// What it needs at least, in GB.
        needed_gb: f64,
        /// Its memory in GB.
        memory_gb: f64,
    },
    /// No cut fits the CompNodes' memories.
    #[error(
        "the job needs {needed} with optimizer state and one micro-batch in flight per stage, the {compnodes} CompNodes have \
         {memory} in all and no cut fits: add CompNodes, or use smaller micro-batches (more train.micro_batches), or a \
         smaller data.seq_len",
        needed = gigabytes(needed_gb),
        memory = gigabytes(memory_gb)
    )]
    NoFit {
        /// What it needs at least, in GB.
        needed_gb: f64,
        /// How many CompNodes there are.
        compnodes: usize,
        /// What they have, in GB.
        memory_gb: f64,
    },
    /// A strategy's placement does not fit a CompNode's memory.
    #[error(
        "CompNode `{compnode}` would need {} and has {}; strategy `op-fence` heeds memory",
        gigabytes(needed_gb),
        gigabytes(memory_gb)
    )]
    OverMemory {
        /// Name of the CompNode.
        compnode: String,
        /// What it would need, in GB.
        needed_gb: f64,
        /// Its memory in GB.
        memory_gb: f64,
    },
    /// Too many possibilities to try them all.
    #[error(
        "strategy `optimal` tries every placement of up to {most_compnodes} CompNodes and {most_ops} ops, here are {compnodes} and \
         {ops}: use `op-fence`"
    )]
    TooLargeForOptimal {
        /// CompNodes of the cluster.
        compnodes: usize,
        /// Ops of the graph.
        ops: usize,
        /// Most CompNodes that the strategy takes.
        most_compnodes: usize,
        /// Most ops that it takes.
        most_ops: usize,
    },
    /// A boundary tensor is too large for its codec.
    #[error(transparent)]
    Codec(fusionllm_codec::CodecError),
    /// No CompNode can take a next task: the stages wait for each other.
    #[error("the task orders cannot be completed: the stages wait for each other (internal error)")]
    Deadlock,
}
