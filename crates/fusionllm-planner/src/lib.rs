//! From graph and profile to placement and task orders.
//!
//! Knows the OP-DAG, what CompNodes can do, and which codecs there are. Holds no tensors, no sockets and no
//! clock: the same inputs give the same placement, bit for bit.

mod cluster;
mod error;
mod ids;
mod partition;
mod pipeline;
mod placement;
mod ready;

pub use cluster::{Cluster, CompNodeProfile};
pub use error::PlanError;
pub use ids::{EdgeId, NodeIndex, StageId};
pub use partition::{Segment, StageSpec, Strategy, partition};
pub use pipeline::{Pipeline, Task, in_flight_limit};
pub use placement::{PassPlan, Placement, PlacementSpec, Stage, StageEdge, TiedParam, place};
pub use ready::{Need, is_ready, needs};
