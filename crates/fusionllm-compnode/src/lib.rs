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
mod cuda;
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
mod panics;
mod params;
mod profile;
mod recompute;
mod residuals;
mod seeds;
mod snapshots;
mod step_log;
mod stop;
mod targets;
mod task_loop;
#[cfg(test)]
mod testing;

pub use allocator::{Allocator, keep_freed_memory};
pub use backend::{Backend, DeviceSpeed, ExecutorSpec, FirstParams, Load, MeasureSpec, StageOps};
pub use border::{BorderTensor, DeviceTensor};
pub use burn::PROBE_THREAD;
pub use checkpoint::{
    AdapterOrigin, ExportFolder, export_adapters, export_hugging_face, merge_adapters, read_shard, write_shard,
    write_shard_to,
};
pub use codec_table::CodecTable;
pub use data::{
    Batches, ChatTemplate, Corpus, FileTokenizer, ImageBatches, ImageSet, ReadableData, Reading, Split, TextBatches,
    Tokenizer, Tokenizing, Tokens, is_guarded,
};
pub use device::DeviceChoice;
pub use error::{CompNodeError, DataError, ExchangeError, ExecutorError, ExportError, ShardError};
pub use exchange::{Exchange, MemoryExchange, Message};
pub use executor::{
    Executor, Gradients, LazyTensor, MicroBatch, NamedTensor, Params, StageOutput, TensorSource, UpdateSpec, by_name,
};
pub use generate::{Generator, SamplingSpec};
pub use knock::{Admitted, knock};
pub use links::{JobLinks, NetworkExchange};
pub use mailbox::{Arrived, Mailbox, Slot};
pub use node::{JoinConfig, check_run_room, join};
pub use open_device::open_device;
pub use optimizer::OptimizerSpec;
pub use seeds::{OwnSeed, Seeds};
pub use stop::StopFlag;
pub use task_loop::{HeldState, JobSink, TaskLoop, TrainPlan};

use panics::{join_message, panic_message};
