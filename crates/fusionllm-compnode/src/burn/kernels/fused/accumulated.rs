//! A linear op whose BP adds the gradient of the weight to the sum over micro-batches where that lies, some rows after
//! the other, so that no second tensor of the weight's size is made.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn_flex::FlexTensor;

use super::linear::Linear;
use super::matrix::{MatRef, dense, dense_mut, new_product, product_into};
use super::vector::add_into;
use super::{Fused, dims, tensor};

/// Elements of the gradient that are made at once, nearly.
const BLOCK_ELEMENTS: usize = 1 << 20;

/// The sum over micro-batches of one weight's gradient, [inputs · outputs]; nothing before the first.
#[derive(Clone, Debug, Default)]
pub(crate) struct WeightSum(Arc<Mutex<Option<FlexTensor>>>);

impl WeightSum {
    /// Puts a sum there.
    pub(crate) fn put(&self, sum: Option<FlexTensor>) {
        *lock(&self.0) = sum;
    }

    /// Takes the sum.
    pub(crate) fn take(&self) -> Option<FlexTensor> {
        lock(&self.0).take()
    }

    /// Adds `a · b`, which is made as a whole only if it is the first. Rows that are set aside are left out of the sum.
    fn add_product(&self, a: MatRef<'_, f32>, b: MatRef<'_, f32>, aside: Option<&SetAside>) {
        let columns = b.ncols();
        let mut sum = lock(&self.0);
        let Some(sum) = &mut *sum else {
            *sum = Some(tensor(new_product(a, b), [a.nrows() * columns]));
            return;
        };
        let rows_per_block = (BLOCK_ELEMENTS / columns.max(1)).clamp(1, a.nrows().max(1));
        let mut block = vec![0.0; rows_per_block * columns];
        let blocks = sum.storage_mut::<f32>().chunks_mut((rows_per_block * columns).max(1));
        for (index, into) in blocks.enumerate() {
            let (start, rows) = (index * rows_per_block, into.len() / columns);
            let block = &mut block[..into.len()];
            product_into(a.subrows(start, rows), b, dense_mut(block, rows, columns));
            if let Some(aside) = aside {
                aside.take_from(block, start, columns);
            }
            add_into(into, block);
        }
    }
}

/// Rows of a table's gradient that are wanted by themselves, because the micro-batch has also looked them up: its terms
/// are added to each other before they are added to the sum.
#[derive(Clone, Debug)]
pub(crate) struct SetAside {
    /// Indices of the rows, ascending.
    rows: Arc<[u32]>,
    /// The rows' values, one row after the other; nothing if they went into the sum.
    values: Arc<Mutex<Vec<f32>>>,
}

impl SetAside {
    /// Nothing yet of these rows.
    pub(crate) fn new(mut rows: Vec<u32>) -> Self {
        rows.sort_unstable();
        rows.dedup();
        Self { rows: rows.into(), values: Arc::default() }
    }

    /// The rows and their values, if they were set aside.
    pub(crate) fn take(&self) -> Option<(&[u32], Vec<f32>)> {
        let values = std::mem::take(&mut *lock(&self.values));
        (!values.is_empty()).then_some((&self.rows, values))
    }

    /// Takes the rows out of a block that begins at row `start`. Blocks come in their order.
    pub(crate) fn take_from(&self, block: &mut [f32], start: usize, columns: usize) {
        let end = start + block.len() / columns.max(1);
        let below = |end: usize| self.rows.partition_point(|&row| (row as usize) < end);
        let mut values = lock(&self.values);
        for &row in &self.rows[below(start)..below(end)] {
            let at = (row as usize - start) * columns;
            values.extend_from_slice(&block[at..at + columns]);
            block[at..at + columns].fill(0.0);
        }
    }
}

/// A panic elsewhere leaves a sum that nobody will read.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As [`Linear`], with the gradient of the weight added to a sum and kept from the tape.
#[derive(Clone, Debug)]
pub(crate) struct AccumulatedLinear {
    pub(crate) op: Linear,
    pub(crate) sum: WeightSum,
    pub(crate) aside: Option<SetAside>,
}

impl<const N: usize> Fused<N> for AccumulatedLinear {
    /// x and the weight.
    type Saved = (FlexTensor, FlexTensor);

    fn forward(&self, inputs: [FlexTensor; N]) -> (FlexTensor, Self::Saved) {
        Fused::<N>::forward(&self.op, inputs)
    }

    fn backward(&self, saved: Self::Saved, gradient: FlexTensor, mut wanted: [bool; N]) -> [Option<FlexTensor>; N] {
        if wanted.get(1) == Some(&true) {
            wanted[1] = false;
            let (x, values) = (&saved.0, gradient.as_slice::<f32>().unwrap_or_default());
            let (rows, _) = dims(x);
            let x = dense(x.as_slice().unwrap_or_default(), rows, self.op.inputs);
            let (a, b) = self.op.weight_factors(x, dense(values, rows, self.op.outputs));
            self.sum.add_product(a, b, self.aside.as_ref());
        }
        Fused::<N>::backward(&self.op, saved, gradient, wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 37 + seed * 11) % 101) as f32 / 50.0 - 1.0).collect()
    }

    #[test]
    fn a_sum_in_blocks_is_that_of_whole_gradients() {
        // More rows than one block has, and not a multiple of it.
        let (tokens, rows, columns) = (33, 5000, 300);
        let (a, b) = (numbers(tokens * rows, 1), numbers(tokens * columns, 2));
        let (a, b) = (dense(&a, tokens, rows).transpose(), dense(&b, tokens, columns));
        let sum = WeightSum::default();
        sum.add_product(a, b, None);
        let first = new_product(a, b);
        let aside = SetAside::new(vec![4999, 7, 7, 3500]);
        sum.add_product(a, b, Some(&aside));
        let (of_rows, values) = aside.take().unwrap();
        assert_eq!(of_rows, [7, 3500, 4999]);
        let row = |row: usize| row * columns..(row + 1) * columns;
        assert_eq!(values, [7, 3500, 4999].map(|r| first[row(r)].to_vec()).concat());
        assert!(aside.take().is_none());
        let sum = sum.take().unwrap();
        for (index, (sum, first)) in sum.storage::<f32>().iter().zip(&first).enumerate() {
            let times = if of_rows.contains(&((index / columns) as u32)) { 1.0 } else { 2.0 };
            assert_eq!(*sum, times * first, "{index}");
        }
    }
}
