//! What a CompNode is started with.

use std::net::SocketAddr;
use std::path::PathBuf;

use fusionllm_transport::{Identity, Ticket};

use crate::ReadableData;
use crate::device::DeviceChoice;

/// How to join.
#[derive(Debug)]
pub struct JoinConfig {
    /// The broker's ticket.
    pub ticket: Ticket,
    /// Name shown to people; the broker makes it unique.
    pub name: String,
    /// The organisation that this machine belongs to; nothing: it stands for itself alone.
    pub org: Option<String>,
    /// What to compute with.
    pub device: DeviceChoice,
    /// This CompNode's key.
    pub identity: Identity,
    /// Where other CompNodes connect; port 0 is any.
    pub bind: SocketAddr,
    /// Addresses to announce besides those found, such as a forwarded port.
    pub advertise: Vec<SocketAddr>,
    /// Threads of the CPU device; all cores if not given.
    pub threads: Option<usize>,
    /// Bytes of memory that jobs may fill; what is free if not given.
    pub memory_bytes: Option<u64>,
    /// Where the device's measured profile is kept; nothing: nowhere, and it is measured anew.
    pub profile_dir: Option<PathBuf>,
    /// What jobs may read here as data.
    pub readable: ReadableData,
    /// Folder for weights and shards while they come and go: files without a name, as large as the state of a part.
    pub scratch_dir: PathBuf,
    /// Folder for snapshots, which stay there for the next process of this name: two for itself and two for another, each as
    /// large as the state of a part.
    pub snapshot_dir: PathBuf,
    /// Whether they stay there when this process leaves by itself; if it is killed, they do in any case.
    pub snapshots_stay: bool,
    /// Folder for the seeds that only this CompNode has, of private runs whose data it owns: files for its user alone.
    pub seed_dir: PathBuf,
}
