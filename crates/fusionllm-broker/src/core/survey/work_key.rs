//! Which jobs share what was measured of ops.

use std::hash::{DefaultHasher, Hash, Hasher};

use fusionllm_protocol::JobSpec;

use crate::core::StartPoint;

/// Which ops were measured: jobs with the same OP-DAG and micro-batches share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::core) struct WorkKey(u64);

impl WorkKey {
    pub(in crate::core) fn of(spec: &JobSpec, start: &StartPoint) -> Self {
        let mut hasher = DefaultHasher::new();
        (&start.graph, spec.measuring()).hash(&mut hasher);
        Self(hasher.finish())
    }
}
