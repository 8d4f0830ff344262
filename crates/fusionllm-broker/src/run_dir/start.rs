//! Which run begins or goes on in a directory.

use fusionllm_protocol::RunId;
use serde::{Deserialize, Serialize};

use super::Parent;

/// Which run begins or goes on, and from where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RunStart {
    /// The run's id.
    pub(crate) run: RunId,
    /// Runs of whose directory its own is a copy.
    pub(crate) copy_of: Vec<RunId>,
    /// Another run's checkpoint that it begins with.
    pub(crate) from: Option<Parent>,
    /// What its user must know from the start.
    #[serde(skip)]
    pub(crate) notices: Vec<String>,
}

impl RunStart {
    /// A run that begins now.
    pub(crate) fn new() -> Self {
        let run = RunId::from_bytes(rand::random());
        Self { run, copy_of: Vec::new(), from: None, notices: Vec::new() }
    }
}
