//! What this CompNode's device can do, by measuring it.
//!
//! On joining: the speed of a large matrix product and of memory, and free memory. For a job: FP and BP of each kind
//! of work in its OP-DAG, through the kernels that will run it, and then of a piece of the OP-DAG as a whole, by which
//! the single times are corrected. Results are kept in a file and used again while nothing has changed.

mod cache;
mod host;
mod memory;
mod room;

pub(crate) use cache::{ProfileCache, work_of};
pub(crate) use host::host_name;
pub(crate) use memory::host_free;
pub(crate) use room::check_room;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use fusionllm_codec::{HostTensor, Values};
use fusionllm_graph::{DType, OpDag, OpId, OpKind};
use fusionllm_planner::FpBp;

use crate::ExecutorError;
use crate::stop::StopFlag;

/// Runs of one thing that are timed, unless they take long.
const MOST_RUNS: usize = 5;
/// Runs at the least, after one that is not counted.
const LEAST_RUNS: usize = 2;
/// Enough seconds for one thing.
const ENOUGH: Duration = Duration::from_millis(200);

/// Median times of several runs after a first one that warms up. A run gives any number of times.
pub(crate) fn median_of_runs<const N: usize>(
    mut run: impl FnMut() -> Result<[f64; N], ExecutorError>,
) -> Result<[f64; N], ExecutorError> {
    run()?;
    let began = Instant::now();
    let mut runs: Vec<[f64; N]> = Vec::new();
    while runs.len() < LEAST_RUNS || (runs.len() < MOST_RUNS && began.elapsed() < ENOUGH) {
        runs.push(run()?);
    }
    Ok(std::array::from_fn(|i| {
        let mut times: Vec<f64> = runs.iter().map(|times| times[i]).collect();
        times.sort_by(f64::total_cmp);
        // Of two the lower: what disturbs a run only makes it longer.
        times[(times.len() - 1) / 2]
    }))
}

/// Seconds of each kind of work in `dag` in micro-batches of `batch` samples, by an op that does it.
///
/// # Errors
/// Those of `time`, and [`ExecutorError::Stopped`] once `stop` is set.
pub(crate) fn each_work(
    dag: &OpDag,
    batch: usize,
    stop: &StopFlag,
    mut time: impl FnMut(OpId) -> Result<FpBp, ExecutorError>,
) -> Result<BTreeMap<String, FpBp>, ExecutorError> {
    let mut seconds = BTreeMap::new();
    for (work, op) in dag.works(batch) {
        stop.check()?;
        seconds.insert(work, time(op)?);
    }
    Ok(seconds)
}

/// The output of the op `input` as the op `reader` may have it: ids that it knows, or any numbers.
///
/// # Errors
/// [`ExecutorError::Internal`] if no tensor has its shape.
pub(crate) fn op_input(dag: &OpDag, input: OpId, reader: OpId, batch: usize) -> Result<HostTensor, ExecutorError> {
    let output = &dag.op(input).output;
    let shape = output.shape.resolve(batch);
    let count = shape.iter().product();
    let values = match output.dtype {
        DType::F32 => Values::F32(pattern(count)),
        DType::I32 => Values::I32(token_ids(dag, reader, count)),
    };
    HostTensor::new(shape, values).map_err(|e| ExecutorError::Internal { what: e.to_string() })
}

/// Values that are neither all alike nor subnormal.
pub(crate) fn pattern(count: usize) -> Vec<f32> {
    (0..count as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32 - 0.5).collect()
}

/// Ids that the op `reader` takes: rows of its table, or columns of its logits.
pub(crate) fn token_ids(dag: &OpDag, reader: OpId, count: usize) -> Vec<i32> {
    let op = dag.op(reader);
    let below = match &op.kind {
        OpKind::Embedding { vocab, .. } => *vocab,
        _ => op.inputs.first().and_then(|&logits| dag.op(logits).output.shape.resolve(1).last().copied()).unwrap_or(1),
    };
    (0..count).map(|i| (i * 31 % below.max(1)) as i32).collect()
}
