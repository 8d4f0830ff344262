//! Runs a sub-DAG: kernels on Burn, remote automatic differentiation (RAD), the task loop, the optimizer, data,
//! checkpoint shards, and the CompNode process around them.
//!
//! Makes no plans: it executes the placement and task orders that it is given. Compute runs on a thread of its
//! own; the async shell only moves bytes.

mod allocator;
mod backend;
mod border;
mod burn;
mod channel_codec;
mod checkpoint;
mod codec_table;
mod data;
mod device;
mod error;
mod exchange;
mod executor;
mod generate;
mod knock;
mod links;
mod mailbox;
mod node;
mod open_device;
mod optimizer;
mod params;
mod profile;
mod residuals;
mod snapshots;
mod step_log;
mod stop;
mod task_loop;
#[cfg(test)]
mod testing;

pub use allocator::{Allocator, keep_freed_memory};
pub use backend::{Backend, DeviceSpeed, ExecutorSpec, FirstParams, MeasureSpec, StageOps};
pub use border::{BorderTensor, DeviceTensor};
pub use burn::PROBE_THREAD;
pub use checkpoint::{ExportFolder, export_hugging_face, read_shard, write_shard, write_shard_to};
pub use codec_table::CodecTable;
pub use data::{Batches, Corpus, FileTokenizer, ReadableData, TextBatches, Tokenizer, Tokens, is_guarded};
pub use device::DeviceChoice;
pub use error::{CompNodeError, DataError, ExchangeError, ExecutorError, ExportError, ShardError};
pub use exchange::{Exchange, MemoryExchange, Message};
pub use executor::{Executor, LazyTensor, MicroBatch, NamedTensor, StageOutput, TensorSource, UpdateSpec, by_name};
pub use generate::{Generator, SamplingSpec};
pub use knock::{Admitted, knock};
pub use links::{JobLinks, NetworkExchange};
pub use mailbox::{Arrived, Mailbox, Slot};
pub use node::{JoinConfig, check_run_room, join};
pub use open_device::open_device;
pub use optimizer::OptimizerSpec;
pub use stop::StopFlag;
pub use task_loop::{JobSink, TaskLoop, TrainPlan};

/// What a thread said when it panicked, in one line.
fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    let text = text.unwrap_or_else(|| "panic without a message".to_owned());
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

/// Why a task gave no result, in one line.
fn join_message(error: tokio::task::JoinError) -> String {
    match error.try_into_panic() {
        Ok(panic) => panic_message(panic.as_ref()),
        Err(error) => error.to_string(),
    }
}
