//! What the device can do, by measuring it.

use std::sync::Arc;
use std::time::Instant;

use fusionllm_graph::{OpDag, OpId};
use fusionllm_planner::{FpBp, Measured, StageId};
use fusionllm_protocol::Pass;

use super::executor::CudaExecutor;
use super::gpu::{Buffer, Element, Gpu, Matrix, Operands, Packed, Product, bytes_of_f32, f32_of_bytes};
use super::layout::{CHUNK, DECAY_ELEMENTS};
use super::{kernel, sum};
use crate::ExecutorError;
use crate::backend::{DeviceSpeed, ExecutorSpec, MeasureSpec};
use crate::executor::MicroBatch;
use crate::profile::{each_work, median_of_runs, op_input, pattern};
use crate::stop::StopFlag;

/// The side of the square matrices that are multiplied.
const SIDE: usize = 4096;
/// Elements that memory, UPDATE and copies are measured with: 64 MiB.
const ELEMENTS: usize = 16 << 20;
/// What is timed is done so often in a row, since single launches are shorter than the clock can tell.
const REPEATS: usize = 8;

/// Has a kernel and a matrix product compute something, and compares.
///
/// # Errors
/// [`ExecutorError::Device`] if the device fails or computes something else.
pub(super) fn try_out(gpu: &Arc<dyn Gpu>) -> Result<(), ExecutorError> {
    const SIDE: usize = 32;
    let (ones, result) = (Buffer::take(gpu, SIDE * SIDE * 4)?, Buffer::take(gpu, SIDE * SIDE * 4)?);
    gpu.upload(ones.address(), &bytes_of_f32(&[1.0; SIDE * SIDE]))?;
    let (a, d) = (ones.address(), result.address());
    gpu.multiply(&square(SIDE), Operands { a, b: a, c: 0, d, bias: 0, alpha: 1.0 })?;
    sum::add(gpu, Element::F32, [a, d, d], SIDE * SIDE)?;
    let mut bytes = [0; SIDE * SIDE * 4];
    gpu.download(d, &mut bytes)?;
    if f32_of_bytes(&bytes).iter().all(|&value| value == (SIDE + 1) as f32) {
        return Ok(());
    }
    Err(ExecutorError::Device { reason: "it computes wrong sums".to_owned() })
}

/// A product of square f32 matrices.
fn square(side: usize) -> Product {
    let matrix = Matrix::new(Element::F32, side);
    let [m, n, k] = [side; 3];
    Product { m, n, k, a: matrix, b: matrix, d: matrix, batch: 1, tf32: false, adds: false, bias: false }
}

/// S and the speed of memory.
///
/// # Errors
/// [`ExecutorError`] if the device fails.
pub(super) fn measure_speed(gpu: &Arc<dyn Gpu>) -> Result<DeviceSpeed, ExecutorError> {
    let side = filled(gpu, SIDE * SIDE)?;
    let (other, result) = (filled(gpu, SIDE * SIDE)?, Buffer::take(gpu, SIDE * SIDE * 4)?);
    let product = square(SIDE);
    let (a, b, d) = (side.address(), other.address(), result.address());
    let operands = Operands { a, b, c: 0, d, bias: 0, alpha: 1.0 };
    let [product_s] = median_of_runs(|| Ok([timed(gpu, || gpu.multiply(&product, operands))?]))?;
    let [sum_s] = median_of_runs(|| Ok([timed(gpu, || sum::add(gpu, Element::F32, [a, b, d], SIDE * SIDE))?]))?;
    let flops = 2.0 * (SIDE as f64).powi(3);
    Ok(DeviceSpeed { flop_per_s: flops / product_s, memory_bytes_per_s: (3 * 4 * SIDE * SIDE) as f64 / sum_s })
}

/// Measures all work of `dag`, each kind by itself as a stage of one op.
///
/// # Errors
/// [`ExecutorError`] if the device fails, or `stop` was set.
pub(super) fn measure_ops(
    dag: &Arc<OpDag>,
    spec: &MeasureSpec,
    gpu: &Arc<dyn Gpu>,
    stop: &StopFlag,
) -> Result<Measured, ExecutorError> {
    let ops = each_work(dag, spec.batch, stop, |op| time_op(dag, op, spec, gpu, stop))?;
    Ok(Measured { ops, update_s_per_byte: time_update(gpu)?, copy_s_per_byte: time_copy(gpu)? })
}

fn time_op(
    dag: &Arc<OpDag>,
    op: OpId,
    spec: &MeasureSpec,
    gpu: &Arc<dyn Gpu>,
    stop: &StopFlag,
) -> Result<FpBp, ExecutorError> {
    let of_op = ExecutorSpec::of_ops(Arc::clone(dag), vec![op]).computing_in(spec.precision);
    let mut executor = CudaExecutor::new(of_op, gpu, stop.clone())?;
    let at = MicroBatch { step: 0, pass: Pass::Train, index: 0 };
    let tensor = |&input: &OpId| Ok((input, op_input(dag, input, op, spec.batch)?.into()));
    let inputs = dag.op(op).inputs.iter().map(tensor).collect::<Result<_, ExecutorError>>()?;
    let probe = executor.probe(StageId(0), at, inputs)?;
    let [fp_s, bp_s] = median_of_runs(|| {
        stop.check()?;
        let fp_s = timed(gpu, || executor.probe_forward(&probe))?;
        Ok([fp_s, timed(gpu, || executor.probe_backward(&probe))?])
    })?;
    Ok(FpBp { fp_s, bp_s: if dag.carries_gradient(op) { bp_s } else { 0.0 } })
}

/// Seconds of UPDATE by AdamW, the optimizer that does most, per byte of f32 parameters, with the norm for clipping.
fn time_update(gpu: &Arc<dyn Gpu>) -> Result<f64, ExecutorError> {
    let [param, gradient, first, second] = [(); 4].map(|()| filled(gpu, ELEMENTS));
    let (param, gradient, first, second) = (param?, gradient?, first?, second?);
    let (decay, chunks) = (Buffer::zeros(gpu, ELEMENTS / DECAY_ELEMENTS)?, (ELEMENTS / CHUNK) as u32);
    let partial = Buffer::take(gpu, chunks as usize * 8)?;
    let [seconds] = median_of_runs(|| {
        Ok([timed(gpu, || {
            let mut arguments = Packed::default();
            [&gradient, &partial].into_iter().for_each(|buffer| arguments.pointer(buffer.address()));
            arguments.u32(chunks);
            gpu.launch(kernel::CHUNK_SQUARES, [chunks.div_ceil(8), 1], arguments.bytes())?;
            let mut arguments = Packed::default();
            [&param, &gradient, &first, &second].into_iter().for_each(|buffer| arguments.pointer(buffer.address()));
            arguments.pointer(0);
            arguments.pointer(decay.address());
            arguments.u32(chunks);
            [0.9, 0.1, 0.95, 0.05, 1e-8, 1e-4, 1.0, 1.0, 1.0].into_iter().for_each(|number| arguments.f32(number));
            gpu.launch(kernel::ADAMW, [chunks, 1], arguments.bytes())
        })?])
    })?;
    Ok(seconds / (4 * ELEMENTS) as f64)
}

/// Seconds per byte between host and device, the mean of both ways.
fn time_copy(gpu: &Arc<dyn Gpu>) -> Result<f64, ExecutorError> {
    let (buffer, mut bytes) = (Buffer::take(gpu, 4 * ELEMENTS)?, vec![0u8; 4 * ELEMENTS]);
    let [both_s] = median_of_runs(|| {
        let began = Instant::now();
        gpu.upload(buffer.address(), &bytes)?;
        gpu.download(buffer.address(), &mut bytes)?;
        Ok([began.elapsed().as_secs_f64()])
    })?;
    Ok(both_s / 2.0 / (4 * ELEMENTS) as f64)
}

fn filled(gpu: &Arc<dyn Gpu>, elements: usize) -> Result<Buffer, ExecutorError> {
    let buffer = Buffer::take(gpu, elements * 4)?;
    gpu.upload(buffer.address(), &bytes_of_f32(&pattern(elements)))?;
    Ok(buffer)
}

/// Seconds of what `work` has the device do.
fn timed(gpu: &Arc<dyn Gpu>, mut work: impl FnMut() -> Result<(), ExecutorError>) -> Result<f64, ExecutorError> {
    gpu.sync()?;
    let began = Instant::now();
    for _ in 0..REPEATS {
        work()?;
    }
    gpu.sync()?;
    Ok(began.elapsed().as_secs_f64() / REPEATS as f64)
}
