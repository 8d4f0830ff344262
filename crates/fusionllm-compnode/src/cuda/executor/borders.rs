//! What enters and leaves a stage: from other stages, on this device or on the host.

use std::collections::BTreeMap;
use std::sync::Arc;

use fusionllm_codec::Values;
use fusionllm_graph::{DType, OpId, OpKind};

use super::super::gpu::{Buffer, Element, bytes_of_f32};
use super::super::plan::{Entering, Lookup, Place, StagePlan, Value};
use super::super::sum;
use super::super::tensor::CudaTensor;
use super::{CudaExecutor, Live};
use crate::ExecutorError;
use crate::border::{BorderTensor, check_input};
use crate::targets::target_weight;

impl CudaExecutor {
    /// Copies what enters to the slot, all integers in one go. Gives the rows that lookups name.
    pub(super) fn fill(
        &self,
        plan: &StagePlan,
        slot: &Buffer,
        inputs: Vec<(OpId, BorderTensor)>,
    ) -> Result<BTreeMap<OpId, Vec<u32>>, ExecutorError> {
        let mut inputs: BTreeMap<OpId, BorderTensor> = inputs.into_iter().collect();
        let mut integers = vec![0u8; plan.integer_bytes];
        let mut ids: BTreeMap<OpId, Vec<i32>> = BTreeMap::new();
        for &Entering { op, dtype, value } in &plan.entering {
            let missing = || ExecutorError::MissingInput {
                op: self.dag.op(op).name.clone(),
                input: "the tensor itself".to_owned(),
            };
            let tensor = inputs.remove(&op).ok_or_else(missing)?;
            check_input(&self.dag, op, &tensor)?;
            self.check_rows_of(op, &tensor, &value)?;
            match dtype {
                DType::F32 => self.bring(tensor, slot.address() + value.place.offset as u64)?,
                DType::I32 => {
                    let Values::I32(numbers) = tensor.into_host()?.into_parts().1 else { return Err(missing()) };
                    self.check_ids(op, &numbers)?;
                    put(&mut integers, value.place, numbers.iter().map(|n| n.to_ne_bytes()));
                    ids.insert(op, numbers);
                }
            }
        }
        let mut rows = BTreeMap::new();
        for lookup in &plan.lookups {
            let named = ids.get(&lookup.ids).map(Vec::as_slice).unwrap_or_default();
            rows.insert(lookup.op, sort_lookup(&mut integers, lookup, named));
        }
        self.gpu.upload(slot.address(), &integers)?;
        Ok(rows)
    }

    /// Memory is planned for micro-batches of so many rows.
    fn check_rows_of(&self, op: OpId, tensor: &BorderTensor, value: &Value) -> Result<(), ExecutorError> {
        if tensor.shape().iter().product::<usize>() == value.rows * value.columns {
            return Ok(());
        }
        let (op, got) = (self.dag.op(op).name.clone(), tensor.shape().to_vec());
        Err(ExecutorError::Shape { op, expected: vec![value.rows, value.columns], got })
    }

    /// Kernels trust that ids are rows of the table and labels columns of the logits, or none where the last is none.
    fn check_ids(&self, op: OpId, ids: &[i32]) -> Result<(), ExecutorError> {
        for &reader in self.dag.consumers(op) {
            let reader = self.dag.op(reader);
            let below = match (&reader.kind, reader.inputs.first()) {
                (OpKind::Embedding { vocab, .. }, _) => *vocab,
                (OpKind::CrossEntropy, Some(&logits)) => {
                    self.dag.op(logits).output.shape.resolve(1).last().copied().unwrap_or(0)
                }
                _ => continue,
            };
            let may_be_none =
                matches!(reader.kind, OpKind::CrossEntropy) && target_weight(ids.iter().copied()).is_some();
            let is_wrong = |id: i32| usize::try_from(id).map_or(!may_be_none, |id| id >= below);
            if let Some(id) = ids.iter().find(|&&id| is_wrong(id)) {
                let what = format!(
                    "`{}` has {id} for `{}`, which knows 0 to {}",
                    self.dag.op(op).name,
                    reader.name,
                    below.saturating_sub(1)
                );
                return Err(ExecutorError::Internal { what });
            }
        }
        Ok(())
    }

    /// Copies a real tensor to an address, in the type that the job computes in.
    fn bring(&self, tensor: BorderTensor, to: u64) -> Result<(), ExecutorError> {
        if let Some(tensor) = tensor.of_kind::<CudaTensor>().filter(|t| t.is_on(&self.gpu, self.element())) {
            return self.gpu.copy(tensor.address(), to, tensor.bytes());
        }
        let host = tensor.into_host()?;
        let values = host.as_f32().unwrap_or_default();
        let bytes: Vec<u8> = match self.element() {
            Element::F32 => bytes_of_f32(values),
            Element::Bf16 => values.iter().flat_map(|&v| half::bf16::from_f32(v).to_ne_bytes()).collect(),
        };
        self.gpu.upload(to, &bytes)
    }

    /// Copies a value to a tensor of its own.
    pub(super) fn leave(&self, op: OpId, value: Value, slot: &Buffer) -> Result<(OpId, BorderTensor), ExecutorError> {
        let batch_rows = value.rows * value.columns / self.dag.op(op).output.shape.elements(1).max(1) as usize;
        let shape = self.dag.op(op).output.shape.resolve(batch_rows);
        let bytes = value.rows * value.columns * self.element().bytes();
        let buffer = Buffer::take(&self.gpu, bytes)?;
        self.gpu.copy(self.address(value.place, slot), buffer.address(), bytes)?;
        Ok((op, BorderTensor::Device(Arc::new(CudaTensor::new(&self.gpu, buffer, shape, self.element())))))
    }

    /// Puts the sum of the gradients that came for each output where BP expects it.
    pub(super) fn seed(&self, live: &Live, gradients: Vec<(OpId, BorderTensor)>) -> Result<(), ExecutorError> {
        let mut by_op: BTreeMap<OpId, Vec<BorderTensor>> = BTreeMap::new();
        for (op, gradient) in gradients {
            check_input(&self.dag, op, &gradient)?;
            by_op.entry(op).or_default().push(gradient);
        }
        for &(op, value) in &live.plan.seeds {
            let (at, bytes) =
                (self.address(value.place, &live.slot), value.rows * value.columns * self.element().bytes());
            let came = by_op.remove(&op).unwrap_or_default();
            for gradient in &came {
                self.check_rows_of(op, gradient, &value)?;
            }
            let mut came = came.into_iter();
            match came.next() {
                Some(first) => self.bring(first, at)?,
                None => self.gpu.zero(at, bytes)?,
            }
            for more in came {
                let term = Buffer::take(&self.gpu, bytes)?;
                self.bring(more, term.address())?;
                sum::add(&self.gpu, self.element(), [at, term.address(), at], value.rows * value.columns)?;
            }
        }
        match by_op.into_keys().next() {
            None => Ok(()),
            Some(op) => {
                let what = format!("a gradient came for `{}`, which was not sent", self.dag.op(op).name);
                Err(ExecutorError::Internal { what })
            }
        }
    }
}

/// Sorts the ids of a lookup by row, as BP reads them, and gives the different rows.
fn sort_lookup(integers: &mut [u8], lookup: &Lookup, ids: &[i32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&at| (ids[at as usize], at));
    let (mut rows, mut starts): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
    for (at, &position) in order.iter().enumerate() {
        let row = ids[position as usize] as u32;
        if rows.last() != Some(&row) {
            rows.push(row);
            starts.push(at as u32);
        }
    }
    starts.push(order.len() as u32);
    let words = |numbers: &[u32]| numbers.iter().map(|n| n.to_ne_bytes()).collect::<Vec<_>>();
    put(integers, lookup.order, words(&order));
    put(integers, lookup.starts, words(&starts));
    put(integers, lookup.rows, words(&rows));
    rows
}

/// Writes numbers of four bytes where they belong among all integers.
fn put(integers: &mut [u8], place: Place, words: impl IntoIterator<Item = [u8; 4]>) {
    let chunks = integers[place.offset..].as_chunks_mut::<4>().0;
    chunks.iter_mut().zip(words).for_each(|(to, word)| *to = word);
}
