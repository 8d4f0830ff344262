//! What an executor takes of the device's memory, before it takes any.

use std::collections::BTreeSet;

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
    let (mut scratch_bytes, mut of_pieces) = (0, BTreeSet::new());
    for stage in &spec.stages {
        let held = load.held.get(&stage.id).copied();
        for (pass, slots) in [(Pass::Train, held), (Pass::Eval, held.map(|_| 1))] {
            let (layout, batch, training) = (&layout, load.batch, pass == Pass::Train);
            let plan = StagePlan::new(PlanSpec { dag, stage, layout, precision, batch, training })?;
            match slots {
                Some(slots) => bytes += plan.slot_bytes as u64 * u64::from(slots),
                // Pieces of one size take turns.
                None => {
                    of_pieces.insert(plan.slot_bytes as u64);
                }
            }
            scratch_bytes = scratch_bytes.max(plan.scratch_bytes as u64);
        }
    }
    Ok(bytes + scratch_bytes + of_pieces.into_iter().sum::<u64>() + load.between_pieces)
}
