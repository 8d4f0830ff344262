//! What an executor takes of the device's memory, before it takes any.

use fusionllm_protocol::{Pass, Precision};

use super::angles::Angles;
use super::layout::Layout;
use super::plan::{PlanSpec, StagePlan};
use super::store::DeviceParamsBytes;
use crate::ExecutorError;
use crate::backend::{ExecutorSpec, Load};

/// Bytes that an executor of `spec`, which computes in `precision`, takes under this load: parameters with all that belongs
/// to them, the slots of micro-batches, and scratch. What waits between two of its stages is not counted, nor what the
/// driver and its libraries take for themselves.
///
/// # Errors
/// [`ExecutorError::NoKernel`] if an op has none.
pub(super) fn bytes(spec: &ExecutorSpec, precision: Precision, load: &Load) -> Result<u64, ExecutorError> {
    let dag = &*spec.dag;
    let layout = Layout::new(dag, spec.params.iter().copied());
    let mut bytes = DeviceParamsBytes::of(dag, &layout, precision, &spec.optimizer).sum();
    bytes += Angles::bytes(dag, spec.stages.iter().flat_map(|stage| stage.ops.iter().copied())) as u64;
    let mut scratch_bytes = 0;
    for stage in &spec.stages {
        let passes = [(Pass::Train, load.held.get(&stage.id).copied().unwrap_or(1)), (Pass::Eval, 1)];
        for (pass, slots) in passes {
            let (layout, batch, training) = (&layout, load.batch, pass == Pass::Train);
            let plan = StagePlan::new(PlanSpec { dag, stage, layout, precision, batch, training })?;
            bytes += plan.slot_bytes as u64 * u64::from(slots);
            scratch_bytes = scratch_bytes.max(plan.scratch_bytes as u64);
        }
    }
    Ok(bytes + scratch_bytes)
}
