//! Snapshots: what a CompNode held after a step, in files that outlive its job and its process.
//!
//! The broker says when one is taken, who else keeps it, and which are not needed any more. A job that has lost a CompNode
//! goes on from the newest step of which every part is still somewhere.

mod fetch;
mod lend;
mod store;

pub(crate) use fetch::{FetchError, fetch};
pub(crate) use lend::{lend, serve};
pub(crate) use store::{NewSnapshot, SnapshotStore};
