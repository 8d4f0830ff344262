//! FP and BP of the ops of a job, as its kernels do them on this device.

use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

use burn_tensor::{Device, Tensor, TensorData};
use fusionllm_graph::{Kernels, OpDag, OpId, OpKind, ParamId};
use fusionllm_planner::{FpBp, Measured, StageId};
use fusionllm_protocol::Pass;

use super::{kernels_of, timed};
use crate::backend::{ExecutorSpec, MeasureSpec};
use crate::border::BorderTensor;
use crate::burn::executor::BurnExecutor;
use crate::burn::gradients::{GradientSums, LookupGradient};
use crate::burn::host::{download, upload};
use crate::burn::kernels::{self, AngleTables, Arguments, IntegerValue, KernelContext, RealValue, Value};
use crate::burn::optimizer::{self, ParamState};
use crate::executor::{Executor, MicroBatch, UpdateSpec};
use crate::profile::{each_work, median_of_runs, op_input, pattern, token_ids};
use crate::stop::StopFlag;
use crate::{ExecutorError, OptimizerSpec};

/// Elements that UPDATE and copies are measured with: 16 MiB.
const ELEMENTS: usize = 4 << 20;
/// A piece of the OP-DAG that is run as a whole takes about this long at the most, FP and BP together.
const PIECE_S: f64 = 1.5;
/// A piece that is measured needs at most this share of the memory that is free.
const PIECE_MEMORY: f64 = 0.2;
/// Corrections beyond these bounds say that something disturbed the measurement.
const CORRECTIONS: RangeInclusive<f64> = 0.25..=4.0;

/// Measures all work of `dag`.
///
/// # Errors
/// [`ExecutorError`] if the device fails, or `stop` was set.
pub(super) fn measure_ops(
    dag: &Arc<OpDag>,
    spec: &MeasureSpec,
    device: &Device,
    stop: &StopFlag,
) -> Result<Measured, ExecutorError> {
    let MeasureSpec { batch, ref optimizer, free_bytes, precision: _ } = *spec;
    let ops = each_work(dag, batch, stop, |op| time_op(dag, op, batch, device, stop))?;
    let mut measured =
        Measured { ops, update_s_per_byte: time_update(device, optimizer)?, copy_s_per_byte: time_copy(device)? };
    let piece = piece(dag, batch, kernels_of(device), &measured, free_bytes);
    stop.check()?;
    if !piece.is_empty() {
        correct(dag, batch, device, piece, &mut measured)?;
    }
    Ok(measured)
}

/// FP and BP of one op by itself.
fn time_op(dag: &OpDag, id: OpId, batch: usize, device: &Device, stop: &StopFlag) -> Result<FpBp, ExecutorError> {
    let op = dag.op(id);
    let inputs = op.inputs.iter().map(|&input| input_value(dag, input, id, batch, device));
    let inputs = inputs.collect::<Result<Vec<Value>, _>>()?;
    let leaf = |param: &fusionllm_graph::ParamId| {
        let count = dag.param(*param).shape.iter().product();
        let constant = Tensor::<1>::from_data(TensorData::new(pattern(count), [count]), device).autodiff();
        if dag.param(*param).frozen { constant } else { constant.require_grad() }
    };
    let params: Vec<Tensor<1>> = op.params.iter().map(leaf).collect();
    if let OpKind::Embedding { .. } = op.kind {
        return time_lookup(dag, id, Arguments { op, inputs, params }, device);
    }
    let angles = AngleTables::default();
    let context = KernelContext { device, training: true, seed: [1; 32], angles: &angles };
    let forward = || {
        let arguments = Arguments { op, inputs: inputs.clone(), params: params.clone() };
        match kernels::forward(&arguments, context)? {
            Value::Real(real) => Ok(real.tensor),
            Value::Integer(_) => Err(ExecutorError::Internal { what: format!("op `{}` gave integers", op.name) }),
        }
    };
    let has_bp = dag.carries_gradient(id);
    let dims = forward()?.dims();
    let seed = Tensor::<2>::from_data(TensorData::new(pattern(dims[0] * dims[1]), dims), device).autodiff();
    let [fp_s, bp_s] = median_of_runs(|| {
        stop.check()?;
        let (fp_s, output) = timed(device, forward)?;
        stop.check()?;
        let bp_s = if has_bp { time_backward(device, output, &seed)? } else { 0.0 };
        Ok([fp_s, bp_s])
    })?;
    // BP here begins with a product by the seed and a sum, which within a stage only its end has.
    let [seeding_s] = median_of_runs(|| {
        let leaf = seed.clone().inner().autodiff().require_grad();
        Ok([if has_bp { time_backward(device, leaf, &seed)? } else { 0.0 }])
    })?;
    Ok(FpBp { fp_s, bp_s: (bp_s - seeding_s).max(0.0) })
}

/// FP and BP of an embedding, whose gradient has only the rows that were looked up.
fn time_lookup(dag: &OpDag, id: OpId, arguments: Arguments<'_>, device: &Device) -> Result<FpBp, ExecutorError> {
    let count = arguments.integer(0)?.shape.iter().product();
    let elements = arguments.param(0)?.dims()[0];
    let [fp_s, bp_s] = median_of_runs(|| {
        let (fp_s, output) = timed(device, || kernels::lookup(&arguments))?;
        let (param, ids, gradient) = (ParamId(0), token_ids(dag, id, count), output.tensor.inner());
        let (bp_s, _) = timed(device, || {
            let mut sums = GradientSums::default();
            sums.add(Vec::new(), vec![LookupGradient { param, ids, gradient }], &[], |_| elements);
            Ok(sums)
        })?;
        Ok([fp_s, bp_s])
    })?;
    Ok(FpBp { fp_s, bp_s })
}

fn time_backward(device: &Device, output: Tensor<2>, seed: &Tensor<2>) -> Result<f64, ExecutorError> {
    let tape = timed(device, || Ok((output * seed.clone()).sum().backward()))?;
    Ok(tape.0)
}

/// An input of an op as it would come from the op before.
fn input_value(dag: &OpDag, input: OpId, reader: OpId, batch: usize, device: &Device) -> Result<Value, ExecutorError> {
    Ok(match upload(op_input(dag, input, reader, batch)?, device) {
        Value::Real(RealValue { tensor, shape }) => {
            let tensor = tensor.autodiff();
            let tensor = if dag.carries_gradient(input) { tensor.require_grad() } else { tensor };
            Value::Real(RealValue { tensor, shape })
        }
        Value::Integer(IntegerValue { tensor, shape }) => {
            Value::Integer(IntegerValue { tensor: tensor.autodiff(), shape })
        }
    })
}

/// Seconds of UPDATE per byte of f32 parameters.
fn time_update(device: &Device, optimizer: &OptimizerSpec) -> Result<f64, ExecutorError> {
    let flat = || Tensor::<1>::from_data(TensorData::new(pattern(ELEMENTS), [ELEMENTS]), device);
    let mut param = flat();
    let gradient = flat();
    let mut state = ParamState::new();
    let update = UpdateSpec { step: 1, lr: 1e-4, gradient_scale: 0.5 };
    let [seconds] = median_of_runs(|| {
        let mine = gradient.clone();
        let (seconds, next) =
            timed(device, || Ok(optimizer::step(optimizer, param.clone(), mine, &mut state, true, update)))?;
        param = next;
        Ok([seconds])
    })?;
    // The norm for clipping is a pass over the gradient.
    let [norm_s] = median_of_runs(|| Ok([timed(device, || Ok(gradient.clone().square().sum()))?.0]))?;
    Ok((seconds + norm_s) / (4 * ELEMENTS) as f64)
}

/// Seconds per byte between host and device, the mean of both ways.
fn time_copy(device: &Device) -> Result<f64, ExecutorError> {
    let shape = [ELEMENTS / 1024, 1024];
    let tensor = Tensor::<2>::from_data(TensorData::new(pattern(ELEMENTS), shape), device);
    let [down_s, up_s] = median_of_runs(|| {
        let (down_s, host) = timed(device, || download(tensor.clone(), &shape))?;
        let (up_s, _) = timed(device, || Ok(upload(host, device)))?;
        Ok([down_s, up_s])
    })?;
    Ok((down_s + up_s) / 2.0 / (4 * ELEMENTS) as f64)
}

/// The piece that is run as a whole: all ops if that is cheap, else what is cheap from the middle on.
fn piece(dag: &OpDag, batch: usize, kernels: Kernels, measured: &Measured, free_bytes: Option<u64>) -> Range<usize> {
    let ops = dag.ops().len();
    let memory = free_bytes.map_or(f64::INFINITY, |free| free as f64 * PIECE_MEMORY);
    let cost = |index: usize| {
        let op = OpId(index as u32);
        let seconds = measured.ops.get(&dag.work(op, batch)).map_or(0.0, |s| s.fp_s + s.bp_s);
        let params: u64 = dag.op(op).params.iter().map(|&p| dag.param(p).bytes()).sum();
        (seconds, (2 * params + dag.kept_bytes(op, batch, kernels)) as f64)
    };
    let grow = |start: usize| {
        let (mut seconds, mut bytes, mut end) = (0.0, 0.0, start);
        while end < ops {
            let (s, b) = cost(end);
            (seconds, bytes) = (seconds + s, bytes + b);
            if seconds > PIECE_S || bytes > memory {
                break;
            }
            end += 1;
        }
        start..end
    };
    let whole = grow(0);
    if whole.end == ops { whole } else { grow(ops / 2) }
}

/// Runs the piece and scales all times by how long it really takes.
fn correct(
    dag: &Arc<OpDag>,
    batch: usize,
    device: &Device,
    piece: Range<usize>,
    measured: &mut Measured,
) -> Result<(), ExecutorError> {
    let ids: Vec<OpId> = piece.map(|i| OpId(i as u32)).collect();
    let spec = ExecutorSpec::of_ops(Arc::clone(dag), ids.clone());
    let mut executor = BurnExecutor::new(spec, device.clone(), StopFlag::default())?;
    let (entering, leaving) = executor.borders(StageId(0))?;
    let tensor = |&op: &OpId| -> Result<(OpId, BorderTensor), ExecutorError> {
        let reader = dag.consumers(op).iter().copied().find(|c| ids.contains(c)).unwrap_or(op);
        Ok((op, op_input(dag, op, reader, batch)?.into()))
    };
    let inputs = entering.iter().map(tensor).collect::<Result<Vec<_>, _>>()?;
    let carries = |op: &&OpId| dag.carries_gradient(**op);
    let gradients = leaving.iter().filter(carries).map(tensor).collect::<Result<Vec<_>, _>>()?;
    let at = MicroBatch { step: 0, pass: Pass::Train, index: 0 };
    let [fp_s, bp_s] = median_of_runs(|| {
        let (given, seeds) = (inputs.clone(), gradients.clone());
        let (fp_s, _) = timed(device, || executor.forward(StageId(0), at, given))?;
        let (bp_s, _) = timed(device, || executor.backward(StageId(0), at, seeds, 1.0))?;
        Ok([fp_s, bp_s])
    })?;
    let bytes = |ops: &[OpId]| ops.iter().map(|&op| dag.op(op).output.bytes(batch) as f64).sum::<f64>();
    let copied = measured.copy_s_per_byte * (bytes(&entering) + bytes(&leaving));
    let expected = ids.iter().filter_map(|&op| measured.ops.get(&dag.work(op, batch)));
    let none = FpBp { fp_s: 0.0, bp_s: 0.0 };
    let expected = expected.fold(none, |sum, s| FpBp { fp_s: sum.fp_s + s.fp_s, bp_s: sum.bp_s + s.bp_s });
    let factor = |took: f64, expected: f64| {
        if expected > 0.0 {
            ((took - copied).max(0.0) / expected).clamp(*CORRECTIONS.start(), *CORRECTIONS.end())
        } else {
            1.0
        }
    };
    let (fp, bp) = (factor(fp_s, expected.fp_s), factor(bp_s, expected.bp_s));
    tracing::debug!(fp, bp, ops = ids.len(), "single ops corrected by a piece of the OP-DAG");
    for seconds in measured.ops.values_mut() {
        *seconds = FpBp { fp_s: seconds.fp_s * fp, bp_s: seconds.bp_s * bp };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use fusionllm_graph::{Gpt2Config, OpClass, gpt2};
    use fusionllm_protocol::Precision;

    use super::*;

    #[test]
    fn every_kind_of_work_of_a_gpt2_is_measured() {
        let mut config = Gpt2Config::named("gpt2").unwrap();
        (config.n_layer, config.n_embd, config.n_head, config.vocab_size) = (2, 32, 2, 64);
        config.dropout = 0.1;
        let dag = Arc::new(gpt2(&config, 16).unwrap());
        let optimizer = OptimizerSpec::AdamW { betas: [0.9, 0.95], epsilon: 1e-8, weight_decay: 0.1 };
        let spec = MeasureSpec { batch: 2, optimizer, free_bytes: None, precision: Precision::F32 };
        let measured = measure_ops(&dag, &spec, &Device::flex(), &StopFlag::default()).unwrap();
        for op in dag.op_ids().filter(|&op| dag.op(op).kind.class() != OpClass::Placeholder) {
            let seconds = measured.ops[&dag.work(op, 2)];
            assert!(seconds.fp_s > 0.0 && seconds.fp_s < 60.0, "{} {seconds:?}", dag.op(op).name);
            assert!(seconds.bp_s >= 0.0 && seconds.bp_s < 60.0, "{} {seconds:?}", dag.op(op).name);
        }
        assert!(measured.update_s_per_byte > 0.0 && measured.copy_s_per_byte > 0.0);
    }

    #[test]
    fn measuring_ends_soon_after_it_is_cancelled() {
        let dag = Arc::new(gpt2(&Gpt2Config::named("gpt2").unwrap(), 1024).unwrap());
        let optimizer = OptimizerSpec::Sgd { momentum: 0.0, weight_decay: 0.0 };
        let (spec, stop) =
            (MeasureSpec { batch: 1, optimizer, free_bytes: None, precision: Precision::F32 }, StopFlag::default());
        stop.set();
        let began = std::time::Instant::now();
        let error = measure_ops(&dag, &spec, &Device::flex(), &stop).unwrap_err();
        assert!(matches!(error, ExecutorError::Stopped), "{error}");
        assert!(began.elapsed().as_secs_f64() < 10.0);
    }

    #[test]
    fn the_piece_is_all_of_a_small_graph_and_a_part_of_a_large_one() {
        let dag = gpt2(&Gpt2Config::named("gpt2").unwrap(), 8).unwrap();
        let ops = dag.ops().len();
        let mut measured = Measured::default();
        assert_eq!(piece(&dag, 1, Kernels::Fused, &measured, None), 0..ops);
        measured.ops = dag.op_ids().map(|op| (dag.work(op, 1), FpBp { fp_s: 0.25, bp_s: 0.25 })).collect();
        assert_eq!(piece(&dag, 1, Kernels::Fused, &measured, None), ops / 2..ops / 2 + 3);
        assert!(piece(&dag, 1, Kernels::Fused, &measured, Some(1)).len() < 3, "only what keeps nothing");
    }
}
