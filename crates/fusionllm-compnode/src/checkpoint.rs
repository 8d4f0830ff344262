//! Shards of a checkpoint, and the Hugging Face layout.

mod adapters;
mod export_folder;
mod hugging_face;
mod room;
mod shard;
mod shard_file;
mod shard_stream;

pub use adapters::{AdapterOrigin, export_adapters, merge_adapters};
pub use export_folder::ExportFolder;
pub use hugging_face::export_hugging_face;
pub(crate) use room::free_room;
pub use shard::{read_shard, write_shard, write_shard_to};
pub(crate) use shard_file::{CHUNK_BYTES, ShardFile, ShardTensors};
pub(crate) use shard_stream::{StreamError, receive_content, send_content};
