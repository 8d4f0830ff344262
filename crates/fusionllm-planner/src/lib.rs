//! From graph and profile to placement and task orders.
//!
//! Knows the OP-DAG, what CompNodes can do, and which codecs there are. Holds no tensors, no sockets and no
//! clock: the same inputs give the same placement, bit for bit.

mod adapt;
mod assemble;
mod cluster;
mod compare;
mod compression;
mod deferred;
mod draw;
mod error;
mod estimate;
mod format;
mod ids;
mod partition;
mod pieces;
mod pipeline;
mod placement;
mod plan;
mod plan_spec;
mod price;
mod ready;
mod recompute;
mod shared;
mod simulate;
mod survival;
mod task;
#[cfg(test)]
mod testing;

pub use adapt::{CodecChange, Controller, LinkObservation, StepObservation};
pub use cluster::{
    Cluster, ClusterFile, CompNodeProfile, DeviceEntry, FpBp, Host, LinkEntry, LinkProfile, MAX_COMPNODES, Measured,
};
pub use compare::{Candidate, compare};
pub use compression::{Compression, Direction, best_of_ratio, compress, topk_of_ratio};
pub use deferred::{Deferrable, may_defer};
pub use error::PlanError;
pub use estimate::{CutBytes, Estimate, Station, pipeline_formula};
pub use format::{format_bytes, format_perplexity, format_seconds};
pub use ids::{EdgeId, GroupId, NodeIndex, Route, SharedId, StageId, Way, Ways};
pub use partition::{clusters_by_bandwidth, kept_ops};
pub use pipeline::in_flight_limit;
pub use placement::{Group, PassPlan, Placement, Segment, Shared, Stage, StageEdge};
pub use plan::{CompNodePrediction, LinkPrediction, Plan, Prediction, place, plan, step_by_cut};
pub use plan_spec::{Owner, PlacementSpec, PlanSpec, StageSpec, Strategy};
pub use ready::{Need, is_ready, needs};
pub use recompute::Recompute;
pub use shared::{Pieces, SHARED_WINDOW};
pub use simulate::{
    Blame, Cargo, Cause, LinkUse, Resource, Simulated, Span, StepCosts, Trace, TraceEvent, Transfer, simulate,
};
pub use survival::{FailureCost, GoesOnFrom, snapshot_cost_s, snapshot_period_s};
pub use task::{Pipeline, Task};
