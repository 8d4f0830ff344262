//! Does the steps of a plan for a micro-batch.

use fusionllm_graph::OpId;
use fusionllm_planner::StageId;

use super::super::gpu::{Buffer, Operands, Packed};
use super::super::plan::{Argument, Factor, Place, Region, Step};
use super::{Context, CudaExecutor, Live};
use crate::ExecutorError;
use crate::border::BorderTensor;
use crate::executor::MicroBatch;

/// A micro-batch that is measured.
#[derive(Debug)]
pub(in crate::cuda) struct Probe(Live);

impl CudaExecutor {
    pub(super) fn address(&self, place: Place, slot: &Buffer) -> u64 {
        let base = match place.region {
            Region::Slot => slot.address(),
            Region::Scratch => self.scratch.address(),
            region => self.store.address(region),
        };
        base + place.offset as u64
    }

    pub(super) fn run(&self, steps: &[Step], slot: &Buffer, context: &Context) -> Result<(), ExecutorError> {
        for step in steps {
            self.stop.check()?;
            match step {
                Step::Launch { kernel, grid, arguments } => {
                    self.gpu.launch(*kernel, *grid, self.packed(arguments, slot, context).bytes())?;
                }
                Step::LaunchRows { op, kernel, arguments } => {
                    let rows = context.rows.get(op).map_or(0, Vec::len) as u32;
                    self.gpu.launch(*kernel, [rows, 1], self.packed(arguments, slot, context).bytes())?;
                }
                Step::Copy { from, to, bytes } => {
                    self.gpu.copy(self.address(*from, slot), self.address(*to, slot), *bytes)?;
                }
                Step::Multiply { product, a, b, c, d, bias, alpha } => {
                    let [a, b, d] = [a, b, d].map(|place| self.address(*place, slot));
                    let [c, bias] = [c, bias].map(|place| place.map_or(0, |place| self.address(place, slot)));
                    let alpha = value_of(*alpha, context);
                    self.gpu.multiply(product, Operands { a, b, c, d, bias, alpha })?;
                }
            }
        }
        Ok(())
    }

    fn packed(&self, arguments: &[Argument], slot: &Buffer, context: &Context) -> Packed {
        let mut packed = Packed::default();
        for argument in arguments {
            match *argument {
                Argument::At(place) => packed.pointer(self.address(place, slot)),
                Argument::Null => packed.pointer(0),
                Argument::Angles(op) => packed.pointer(self.angles.address(op)),
                Argument::U32(number) => packed.u32(number),
                Argument::F32(number) => packed.f32(number),
                Argument::Factor(factor) => packed.f32(value_of(factor, context)),
                Argument::Key(op) => self.key(op, context.at).into_iter().for_each(|word| packed.u32(word)),
            }
        }
        packed
    }

    /// The key of an op's dropout: the stream that the CPU draws from.
    fn key(&self, op: OpId, at: MicroBatch) -> [u32; 8] {
        let key = self.seeds.of_op(&self.dag, op, at);
        let words = key.as_chunks::<4>().0;
        std::array::from_fn(|i| words.get(i).map_or(0, |&word| u32::from_le_bytes(word)))
    }

    /// A micro-batch whose steps can be done again and again, for measuring. Its gradients are full of zeros.
    ///
    /// # Errors
    /// As [`Executor::forward`].
    pub(in crate::cuda) fn probe(
        &mut self,
        stage: StageId,
        at: MicroBatch,
        inputs: Vec<(OpId, BorderTensor)>,
    ) -> Result<Probe, ExecutorError> {
        let batch = inputs.iter().find_map(|(_, tensor)| tensor.shape().first().copied()).unwrap_or(1);
        let plan = self.plan(stage, batch, at.pass)?;
        let slot = self.slot(plan.slot_bytes)?;
        let rows = self.fill(&plan, &slot, inputs)?;
        self.gpu.zero(self.scratch.address(), self.scratch.bytes())?;
        Ok(Probe(Live { plan, slot, context: Context { at, loss_scale: 1.0, rows } }))
    }

    /// FP of a probe.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    pub(in crate::cuda) fn probe_forward(&self, Probe(live): &Probe) -> Result<(), ExecutorError> {
        self.run(&live.plan.forward, &live.slot, &live.context)
    }

    /// BP of a probe.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    pub(in crate::cuda) fn probe_backward(&self, Probe(live): &Probe) -> Result<(), ExecutorError> {
        self.run(&live.plan.backward, &live.slot, &live.context)
    }
}

fn value_of(factor: Factor, context: &Context) -> f32 {
    match factor {
        Factor::Fixed(factor) => factor,
        Factor::Loss => context.loss_scale,
    }
}
