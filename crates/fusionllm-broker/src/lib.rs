//! Admits, plans, watches, records, shows.
//!
//! Decisions live in `core`, a state machine without sockets, files or clock; `server` is the shell around it. The
//! rest reads and writes what a broker keeps: models, checkpoints, run directories, the store of jobs.

mod checkpoint;
mod cluster_file;
mod core;
mod error;
mod files;
mod line_writer;
mod metrics;
mod model;
mod opened_run;
mod plot;
mod reach;
mod report;
mod resume;
mod run_dir;
mod server;
mod store;
#[cfg(test)]
mod testing;
mod tickets;

pub use checkpoint::{Checkpoint, TensorSet, open_checkpoint};
pub use cluster_file::read_cluster;
pub use core::ResumedBy;
pub use error::{BrokerError, CheckpointError, StoreError, TicketError};
pub use files::write_atomic;
pub use model::{LoadedModel, ModelNote, load_model, load_model_dir, model_tokenizer, read_model};
pub use report::RunReport;
pub use resume::{Resumption, find_resumption, holds_run, is_of_a_run, newest_checkpoint, resumed_job};
pub use run_dir::{
    PlacementFile, SNAPSHOT_FOLDER, StageSummary, check_run_folders, default_run_dir, free_run_dir, is_free,
};
pub use server::{Broker, BrokerConfig, JobEvents, Submitted};
