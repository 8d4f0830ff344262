//! Shards of a checkpoint, and the Hugging Face layout.

mod hugging_face;
mod shard;

pub use hugging_face::export_hugging_face;
pub use shard::{read_shard, write_shard};
