//! What a decoder expects before it has decoded: the running mean of each column.

use serde::{Deserialize, Serialize};

use crate::codecs::topk::finite;

/// Share of each tensor in the running mean.
const WEIGHT: f64 = 0.25;

/// The running mean of the columns of what was decoded. Both ends compute it, in the same order, from the same bits.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct MeanPrediction(Vec<f32>);

/// Column sums, in memory that is reused from tensor to tensor.
pub(super) type Sums = Vec<f64>;

impl MeanPrediction {
    /// The expected row, one value a column.
    pub(super) fn values(&self) -> &[f32] {
        &self.0
    }

    /// Starts anew, from zero, if rows have another length.
    pub(super) fn fit(&mut self, shape: &[usize]) {
        // A tensor without elements must not make its other dimensions cost memory.
        let width = if shape.contains(&0) { 0 } else { shape.last().copied().unwrap_or(1) };
        if self.0.len() != width {
            self.0.clear();
            self.0.resize(width, 0.0);
        }
    }

    pub(super) fn subtract_from(&self, rows: &mut [f32]) {
        for row in rows.chunks_exact_mut(self.0.len().max(1)) {
            row.iter_mut().zip(&self.0).for_each(|(x, mean)| *x -= mean);
        }
    }

    /// Moves the mean by the mean of what was decoded beside it.
    pub(super) fn learn(&mut self, decoded: &[f32], sums: &mut Sums) {
        self.sum(decoded, sums);
        self.add(sums, decoded.len());
    }

    fn sum(&self, decoded: &[f32], sums: &mut Sums) {
        sums.clear();
        sums.resize(self.0.len(), 0.0);
        for row in decoded.chunks_exact(self.0.len().max(1)) {
            sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
        }
    }

    fn add(&mut self, sums: &Sums, elements: usize) {
        let weight = WEIGHT * self.0.len() as f64 / elements as f64;
        for (mean, sum) in self.0.iter_mut().zip(sums) {
            *mean = finite(finite((sum * weight) as f32) + *mean);
        }
    }

    /// Adds the mean to what was decoded, and then learns from it.
    pub(super) fn add_and_learn(&mut self, rows: &mut [f32], sums: &mut Sums) {
        self.sum(rows, sums);
        for row in rows.chunks_exact_mut(self.0.len().max(1)) {
            row.iter_mut().zip(&self.0).for_each(|(x, mean)| *x += mean);
        }
        self.add(sums, rows.len());
    }
}
