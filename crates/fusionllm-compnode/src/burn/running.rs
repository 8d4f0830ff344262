//! Running means and variances of batch norms.
//!
//! A micro-batch moves them once, after all those before it in its step, whatever order FP went in and however often: FP
//! leaves what it found here, by micro-batch, and UPDATE takes it.

use std::collections::BTreeMap;

use fusionllm_graph::{OpDag, OpId, OpKind, ParamId};

use super::kernels::Moments;

/// What the micro-batches of a step have found, by batch norm and micro-batch.
#[derive(Debug, Default)]
pub(super) struct RunningMoments(BTreeMap<(OpId, u32), Moments>);

impl RunningMoments {
    /// What FP of a micro-batch has found; in place of what it found before.
    pub(super) fn found(&mut self, micro_batch: u32, moments: Vec<(OpId, Moments)>) {
        self.0.extend(moments.into_iter().map(|(op, moments)| ((op, micro_batch), moments)));
    }

    /// Nothing has been found.
    pub(super) fn forget(&mut self) {
        self.0.clear();
    }

    /// Moves the running values by all that was found, which is gone then. `values` gives those before; the result is
    /// those after, by parameter.
    pub(super) fn take<E>(
        &mut self,
        dag: &OpDag,
        mut values: impl FnMut(ParamId) -> Result<Vec<f32>, E>,
    ) -> Result<BTreeMap<ParamId, Vec<f32>>, E> {
        let mut moved: BTreeMap<ParamId, Vec<f32>> = BTreeMap::new();
        for ((op, _), moments) in std::mem::take(&mut self.0) {
            let op = dag.op(op);
            let (&OpKind::BatchNorm2d { momentum, .. }, &[_, _, mean, variance]) = (&op.kind, &op.params[..]) else {
                continue;
            };
            for (param, found) in [(mean, &moments.means), (variance, &moments.variances)] {
                let running = match moved.remove(&param) {
                    Some(running) => running,
                    None => values(param)?,
                };
                let step = |(running, &found): (f32, &f32)| {
                    (momentum * f64::from(found) + (1.0 - momentum) * f64::from(running)) as f32
                };
                moved.insert(param, running.into_iter().zip(found).map(step).collect());
            }
        }
        Ok(moved)
    }
}

#[cfg(test)]
mod tests {
    use fusionllm_graph::{ResnetBlock, ResnetConfig, ResnetStem, resnet};

    use super::*;

    #[test]
    fn each_micro_batch_moves_them_once_and_in_its_order() {
        let config = ResnetConfig {
            block: ResnetBlock::Basic,
            depths: vec![1],
            widths: vec![1],
            stem: ResnetStem::Cifar,
            image_size: 4,
            classes: 2,
        };
        let dag = resnet(&config).unwrap();
        let norm = dag.find("bn1").unwrap();
        let moments = |mean: f32| Moments { means: vec![mean], variances: vec![10.0 * mean] };
        let mut running = RunningMoments::default();
        // FP of the second comes first, and that of the first twice.
        for (micro_batch, mean) in [(1, 2.0), (0, 7.0), (0, 1.0)] {
            running.found(micro_batch, vec![(norm, moments(mean))]);
        }
        let mut taken = || running.take(&dag, |_| Ok::<_, ()>(vec![1.0])).unwrap();
        let mean = 0.1 * 2.0 + 0.9 * (0.1 * 1.0 + 0.9 * 1.0);
        let variance = 0.1 * 20.0 + 0.9 * (0.1 * 10.0 + 0.9 * 1.0);
        let of = |name: &str| dag.find_param(name).unwrap();
        let found = taken();
        assert!((found[&of("bn1.running_mean")][0] - mean).abs() < 1e-6, "{found:?}");
        assert!((found[&of("bn1.running_var")][0] - variance).abs() < 1e-6, "{found:?}");
        assert!(taken().is_empty());
    }
}
