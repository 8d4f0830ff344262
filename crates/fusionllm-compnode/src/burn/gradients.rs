//! The accumulated gradients of one CompNode's parameters.
//!
//! A lookup's gradient has only the rows of its tokens, whatever the size of the table. On the CPU it is kept by rows
//! until something needs the whole table; elsewhere it is added to the table's at once.

mod rows;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use burn_flex::FlexTensor;
use burn_tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};
use fusionllm_graph::ParamId;

use crate::ExecutorError;
use crate::burn::host::to_vec;
use crate::burn::kernels::fused::{self, SetAside};
use crate::executor::Write;
use rows::RowSum;

/// What BP of a micro-batch gives for a table by lookup.
#[derive(Debug)]
pub(crate) struct LookupGradient {
    pub(crate) param: ParamId,
    /// The rows that were looked up, by position.
    pub(crate) ids: Vec<i32>,
    /// What came for each position, [positions, columns].
    pub(crate) gradient: Tensor<2>,
}

/// Sums over the micro-batches of a step, flat and on the device.
#[derive(Debug, Default)]
pub(crate) struct GradientSums {
    dense: BTreeMap<ParamId, Tensor<1>>,
    /// Of tables of which so far only rows were looked up.
    by_rows: BTreeMap<ParamId, RowSum>,
    /// The rows that were looked up in this step.
    touched: BTreeMap<ParamId, BTreeSet<u32>>,
}

impl GradientSums {
    /// Adds what BP of one micro-batch through one stage gave. A parameter that the stage uses both ways has the sum of
    /// its uses added.
    pub(crate) fn add(
        &mut self,
        terms: Vec<(ParamId, Tensor<1>)>,
        lookups: Vec<LookupGradient>,
        asides: &[(ParamId, SetAside)],
        elements: impl Fn(ParamId) -> usize,
    ) {
        let mut terms: BTreeMap<ParamId, Tensor<1>> = terms.into_iter().collect();
        let mut by_rows: BTreeMap<ParamId, RowSum> = BTreeMap::new();
        for (param, aside) in asides {
            by_rows.extend(aside.take().map(|(rows, values)| (*param, RowSum::of_rows(rows, values))));
        }
        for LookupGradient { param, ids, gradient } in lookups {
            self.touched.entry(param).or_default().extend(ids.iter().filter_map(|&id| u32::try_from(id).ok()));
            match fused::into_cpu(gradient) {
                Ok(gradient) => {
                    let gradient = gradient.to_contiguous();
                    let term = RowSum::of(&ids, gradient.as_slice().unwrap_or_default());
                    match by_rows.get_mut(&param) {
                        Some(sum) => sum.add(term),
                        None => drop(by_rows.insert(param, term)),
                    }
                }
                Err(gradient) => add_to(&mut terms, param, scattered(&ids, *gradient, elements(param))),
            }
        }
        for (param, term) in terms {
            let term = match by_rows.remove(&param) {
                Some(rows) => with_rows(term, &rows),
                None => term,
            };
            self.add_term(param, term);
        }
        for (param, rows) in by_rows {
            match (self.dense.remove(&param), self.by_rows.get_mut(&param)) {
                (Some(sum), _) => drop(self.dense.insert(param, with_rows(sum, &rows))),
                (None, Some(sum)) => sum.add(rows),
                (None, None) => drop(self.by_rows.insert(param, rows)),
            }
        }
    }

    /// Takes the sum of a parameter on the CPU, if it is whole.
    pub(crate) fn take_cpu(&mut self, param: ParamId) -> Option<FlexTensor> {
        self.dense.remove(&param).and_then(|sum| fused::into_cpu(sum).ok())
    }

    /// Puts back what [`Self::take_cpu`] gave, with more added or as the first.
    pub(crate) fn put_cpu(&mut self, param: ParamId, sum: Option<FlexTensor>) {
        if let Some(sum) = sum {
            self.add_term(param, fused::from_cpu(sum));
        }
    }

    /// Adds a gradient to its sum.
    pub(crate) fn add_term(&mut self, param: ParamId, term: Tensor<1>) {
        let term = match self.by_rows.remove(&param) {
            Some(rows) => with_rows(term, &rows),
            None => term,
        };
        add_to(&mut self.dense, param, term);
    }

    /// The rows of a table that were looked up in this step, ascending.
    pub(crate) fn touched(&self, param: ParamId) -> Vec<u32> {
        self.touched.get(&param).into_iter().flatten().copied().collect()
    }

    /// The sums that there are; those by rows are made whole first.
    pub(crate) fn whole(&mut self, held: &BTreeMap<ParamId, Tensor<1>>) -> &BTreeMap<ParamId, Tensor<1>> {
        for (param, rows) in std::mem::take(&mut self.by_rows) {
            if let Some(values) = held.get(&param) {
                self.dense.insert(param, with_rows(values.zeros_like(), &rows));
            }
        }
        &self.dense
    }

    /// All sums, which are gone then.
    pub(crate) fn take(&mut self, held: &BTreeMap<ParamId, Tensor<1>>) -> BTreeMap<ParamId, Tensor<1>> {
        self.whole(held);
        self.touched.clear();
        std::mem::take(&mut self.dense)
    }

    /// Elements `range` of a sum; zeros if none came.
    pub(crate) fn read(&self, param: ParamId, range: Range<usize>) -> Result<Vec<f32>, ExecutorError> {
        if let Some(rows) = self.by_rows.get(&param) {
            return Ok(rows.range(range));
        }
        let Some(sum) = self.dense.get(&param) else { return Ok(vec![0.0; range.len()]) };
        match fused::into_cpu(sum.clone()) {
            Ok(sum) => Ok(sum.to_contiguous().storage::<f32>()[range].to_vec()),
            Err(sum) => to_vec(sum.slice([range])),
        }
    }

    /// These rows of a sum of rows of `columns` elements, one after the other; zeros if none came.
    pub(crate) fn read_rows(&self, param: ParamId, rows: &[u32], columns: usize) -> Result<Vec<f32>, ExecutorError> {
        let ranges = || rows.iter().map(|&row| row as usize * columns..(row as usize + 1) * columns);
        let Some(sum) = self.dense.get(&param) else {
            let by_rows = self.by_rows.get(&param);
            return Ok(ranges().flat_map(|r| by_rows.map_or_else(|| vec![0.0; columns], |b| b.range(r))).collect());
        };
        match fused::into_cpu(sum.clone()) {
            Ok(sum) => {
                let sum = sum.to_contiguous();
                Ok(ranges().flat_map(|range| sum.storage::<f32>()[range].iter().copied()).collect())
            }
            Err(sum) => {
                let table = sum.reshape([-1, columns as i32]);
                let ids = indices(rows.iter().map(|&row| row as i32).collect(), &table.device());
                to_vec(table.select(0, ids))
            }
        }
    }

    /// Adds `values` to the elements from `start` on, or puts them in their place. `held` is the parameter.
    pub(crate) fn write(&mut self, param: ParamId, held: &Tensor<1>, start: usize, values: Vec<f32>, how: Write) {
        let sum = self.take_whole(param, held);
        let range = start..start + values.len();
        let sum = match fused::into_cpu(sum) {
            Ok(mut sum) => {
                let into = &mut sum.storage_mut::<f32>()[range];
                match how {
                    Write::Add => fused::add_into(into, &values),
                    Write::Replace => into.copy_from_slice(&values),
                }
                fused::from_cpu(sum)
            }
            Err(sum) => {
                let values = Tensor::from_data(TensorData::new(values, [range.len()]), &sum.device());
                let values = match how {
                    Write::Add => sum.clone().slice([range.clone()]) + values,
                    Write::Replace => values,
                };
                sum.slice_assign([range], values)
            }
        };
        self.dense.insert(param, sum);
    }

    /// Adds `values` to these rows, each of which occurs once. `held` is the parameter.
    pub(crate) fn add_rows(&mut self, param: ParamId, held: &Tensor<1>, rows: &[u32], values: Vec<f32>) {
        let columns = values.len() / rows.len().max(1);
        let sum = self.take_whole(param, held);
        let sum = match fused::into_cpu(sum) {
            Ok(mut sum) => {
                let table = sum.storage_mut::<f32>();
                for (&row, values) in rows.iter().zip(values.chunks_exact(columns.max(1))) {
                    let start = row as usize * columns;
                    fused::add_into(&mut table[start..start + columns], values);
                }
                fused::from_cpu(sum)
            }
            Err(sum) => {
                let device = sum.device();
                let values = Tensor::<2>::from_data(TensorData::new(values, [rows.len(), columns]), &device);
                let ids = indices(rows.iter().map(|&row| row as i32).collect(), &device);
                let table = sum.reshape([-1, columns as i32]);
                table.select_assign(0, ids, values, IndexingUpdateOp::Add).reshape([-1])
            }
        };
        self.dense.insert(param, sum);
    }

    fn take_whole(&mut self, param: ParamId, held: &Tensor<1>) -> Tensor<1> {
        let sum = self.dense.remove(&param).unwrap_or_else(|| held.zeros_like());
        match self.by_rows.remove(&param) {
            Some(rows) => with_rows(sum, &rows),
            None => sum,
        }
    }
}

fn add_to(sums: &mut BTreeMap<ParamId, Tensor<1>>, param: ParamId, term: Tensor<1>) {
    let sum = match sums.remove(&param) {
        Some(sum) => fused::accumulate(sum, term),
        None => term,
    };
    sums.insert(param, sum);
}

/// A whole gradient on the CPU with rows added to it, in place.
fn with_rows(dense: Tensor<1>, rows: &RowSum) -> Tensor<1> {
    match fused::into_cpu(dense) {
        Ok(mut dense) => {
            rows.add_into(dense.storage_mut());
            fused::from_cpu(dense)
        }
        Err(dense) => *dense,
    }
}

/// A lookup's gradient as that of the whole table of so many elements.
fn scattered(ids: &[i32], gradient: Tensor<2>, elements: usize) -> Tensor<1> {
    let (device, [_, columns]) = (gradient.device(), gradient.dims());
    let table = Tensor::<2>::zeros([elements / columns.max(1), columns], &device);
    table.select_assign(0, indices(ids.to_vec(), &device), gradient, IndexingUpdateOp::Add).reshape([elements])
}

fn indices(ids: Vec<i32>, device: &Device) -> Tensor<1, Int> {
    let count = ids.len();
    Tensor::from_data(TensorData::new(ids, [count]), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARAM: ParamId = ParamId(3);
    const COLUMNS: usize = 2;

    fn tensor<const D: usize>(values: &[f32], shape: [usize; D]) -> Tensor<D> {
        Tensor::from_data(TensorData::new(values.to_vec(), shape), &Device::flex())
    }

    fn lookup(ids: &[i32], values: &[f32]) -> Vec<LookupGradient> {
        vec![LookupGradient { param: PARAM, ids: ids.to_vec(), gradient: tensor(values, [ids.len(), COLUMNS]) }]
    }

    #[test]
    fn rows_set_aside_are_added_to_the_lookups_before_the_sum() {
        let mut sums = GradientSums::default();
        sums.add(vec![(PARAM, tensor(&[1.0; 8], [8]))], Vec::new(), &[], |_| 8);
        let aside = SetAside::new(vec![1]);
        let big = 1e8;
        aside.take_from(&mut [0.0, 0.0, big, 0.0], 0, COLUMNS);
        sums.add(Vec::new(), lookup(&[1], &[-big, 3.0]), &[(PARAM, aside)], |_| 8);
        assert_eq!(sums.read(PARAM, 0..4).unwrap(), [1.0, 1.0, 1.0, 4.0], "not (1 + 1e8) - 1e8");
    }

    fn held() -> Tensor<1> {
        tensor(&[9.0; 8], [8])
    }

    #[test]
    fn a_table_is_made_whole_only_when_all_of_it_is_needed() {
        let mut sums = GradientSums::default();
        sums.add(Vec::new(), lookup(&[2, 0, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), &[], |_| 8);
        sums.add(Vec::new(), lookup(&[3, 2], &[7.0, 8.0, 0.5, 0.5]), &[], |_| 8);
        assert!(sums.dense.is_empty());
        assert_eq!(sums.touched(PARAM), [0, 2, 3]);
        assert_eq!(sums.read_rows(PARAM, &[2, 3], COLUMNS).unwrap(), [6.5, 8.5, 7.0, 8.0]);
        assert_eq!(sums.read(PARAM, 1..5).unwrap(), [4.0, 0.0, 0.0, 6.5]);
        sums.add_rows(PARAM, &held(), &[1, 3], vec![1.0, 1.0, 2.0, 2.0]);
        sums.write(PARAM, &held(), 0, vec![10.0, 10.0], Write::Add);
        sums.write(PARAM, &held(), 4, vec![0.0], Write::Replace);
        assert_eq!(sums.read(PARAM, 0..8).unwrap(), [13.0, 14.0, 1.0, 1.0, 0.0, 8.5, 9.0, 10.0]);
        assert_eq!(sums.read_rows(PARAM, &[3], COLUMNS).unwrap(), [9.0, 10.0]);
        let all = sums.take(&BTreeMap::from([(PARAM, held())]));
        assert_eq!(all.len(), 1);
        assert!(sums.touched(PARAM).is_empty() && sums.read(PARAM, 0..2).unwrap() == [0.0, 0.0]);
    }

    #[test]
    fn lookups_add_to_what_the_table_gets_otherwise_in_any_order() {
        let dense = || vec![(PARAM, tensor(&[1.0; 8], [8]))];
        let rows = || lookup(&[1, 1], &[1.0, 2.0, 3.0, 4.0]);
        let expected = [1.0, 1.0, 5.0, 7.0, 1.0, 1.0, 1.0, 1.0];
        for order in 0..3 {
            let mut sums = GradientSums::default();
            match order {
                0 => sums.add(dense(), rows(), &[], |_| 8),
                1 => {
                    sums.add(Vec::new(), rows(), &[], |_| 8);
                    sums.add(dense(), Vec::new(), &[], |_| 8);
                }
                _ => {
                    sums.add(dense(), Vec::new(), &[], |_| 8);
                    sums.add(Vec::new(), rows(), &[], |_| 8);
                }
            }
            assert_eq!(sums.read(PARAM, 0..8).unwrap(), expected, "order {order}");
        }
    }

    #[test]
    fn scattering_gives_what_rows_give() {
        let ids = [2, 0, 2];
        let gradient = tensor(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [3, COLUMNS]);
        let whole = to_vec(scattered(&ids, gradient.clone(), 8)).unwrap();
        assert_eq!(whole, RowSum::of(&ids, &to_vec(gradient).unwrap()).range(0..8));
    }
}
