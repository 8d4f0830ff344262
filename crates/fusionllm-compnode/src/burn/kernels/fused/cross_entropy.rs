//! Cross-entropy of logits, without a tensor of log-probabilities.

use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::vector::{exp, max_of, sum_of};
use super::{Fused, dims, rows_per_task, tensor};

/// logits [N, V] → mean over N of -log softmax(logits)[label], in nats, as [1, 1].
#[derive(Clone, Debug)]
pub(crate) struct CrossEntropy {
    /// One of each row, below V; nothing for a row that takes no part.
    pub(crate) labels: Vec<Option<usize>>,
    /// What a row weighs that takes part, if it is not one over their number.
    pub(crate) weight: Option<f32>,
}

/// What BP needs: the logits, and log Σ exp of each row of them.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    logits: FlexTensor,
    log_sums: Vec<f32>,
}

impl Fused<1> for CrossEntropy {
    type Saved = Saved;

    fn forward(&self, [logits]: [FlexTensor; 1]) -> (FlexTensor, Saved) {
        let (rows, columns) = dims(&logits);
        let values = logits.as_slice::<f32>().unwrap_or_default();
        let mut log_sums = vec![0.0; rows];
        let size = rows_per_task(columns);
        let tasks = log_sums.par_chunks_mut(size).zip(values.par_chunks(size * columns));
        tasks.for_each(|(sums, logits)| log_sum_exp(logits, columns, sums));
        let picked = values.chunks_exact(columns).zip(&self.labels).zip(&log_sums);
        let picked = picked.filter_map(|((row, label), sum)| Some((row, (*label)?, sum)));
        let loss: f64 =
            picked.map(|(row, label, sum)| f64::from(sum - row.get(label).copied().unwrap_or(f32::NAN))).sum();
        let loss = match self.weight {
            None => loss / rows as f64,
            Some(weight) => loss * f64::from(weight),
        };
        (tensor(vec![loss as f32], [1, 1]), Saved { logits, log_sums })
    }

    fn backward(&self, saved: Saved, gradient: FlexTensor, _wanted: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let Saved { mut logits, log_sums } = saved;
        let (rows, columns) = dims(&logits);
        let of_loss = gradient.as_slice::<f32>().and_then(|g| g.first()).copied().unwrap_or_default();
        let scale = match self.weight {
            None => of_loss / rows as f32,
            Some(weight) => of_loss * weight,
        };
        let size = rows_per_task(columns);
        logits
            .storage_mut::<f32>()
            .par_chunks_mut(size * columns)
            .zip(log_sums.par_chunks(size))
            .zip(self.labels.par_chunks(size))
            .for_each(|((logits, sums), labels)| {
                softmax_times(logits, columns, sums, scale);
                for (row, label) in logits.chunks_exact_mut(columns).zip(labels) {
                    match label.map(|label| row.get_mut(label)) {
                        Some(Some(of_label)) => *of_label -= scale,
                        Some(None) => {}
                        None => row.fill(0.0),
                    }
                }
            });
        [Some(logits)]
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn log_sum_exp(logits: &[f32], columns: usize, sums: &mut [f32]) {
    for (row, sum) in logits.chunks_exact(columns).zip(sums) {
        let max = max_of(row);
        *sum = max + sum_of(row, |x| exp(x - max)).ln();
    }
}

/// x → e^(x - log Σ e^x) · scale, row by row.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn softmax_times(logits: &mut [f32], columns: usize, sums: &[f32], scale: f32) {
    for (row, &sum) in logits.chunks_exact_mut(columns).zip(sums) {
        for x in row {
            *x = exp(*x - sum) * scale;
        }
    }
}
