//! Messages between a broker and a command such as `submit` or `status`.

use serde::{Deserialize, Serialize};

use super::JobState;
use crate::{Inventory, JobEvent, JobId, JobSpec};

/// From a client to the broker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ClientRequest {
    /// Run a job.
    Submit {
        /// The job, paths absolute.
        spec: Box<JobSpec>,
        /// Stream its events until it ends.
        follow: bool,
        /// Content of the job's tokenizer file, where the command could read it: the job's checkpoints carry it.
        tokenizer: Option<String>,
    },
    /// What is going on.
    Status,
    /// What the joined machines and links can do.
    Inventory {
        /// Links that were measured longer ago are measured again, in seconds.
        max_age_s: Option<u64>,
        /// A job whose ops the machines measure.
        spec: Option<Box<JobSpec>>,
    },
    /// Stop a job; its last checkpoint stays.
    Stop {
        /// Which.
        job: JobId,
    },
    /// Go on with a stopped or failed job.
    Resume {
        /// Which.
        job: JobId,
        /// From the checkpoint of this step, 0 being the beginning; if not given, from the newest whole one.
        step: Option<u64>,
        /// Keys of the job to change, as `section.key=value`.
        overrides: Vec<String>,
        /// Stream its events until it ends.
        follow: bool,
    },
}

/// From the broker to a client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToClient {
    /// The job is in.
    Submitted {
        /// Its id.
        job: JobId,
        /// Its run directory on the broker's machine.
        run_dir: String,
    },
    /// Answer to [`ClientRequest::Status`].
    Status(StatusReport),
    /// Answer to [`ClientRequest::Inventory`].
    Inventory(Inventory),
    /// An event of the job that is followed.
    Event(#[serde(with = "crate::wire::as_json")] JobEvent),
    /// Done as asked.
    Ok,
    /// Not done.
    Error {
        /// Why, in one line.
        reason: String,
        /// Whether the request is at fault.
        bad_input: bool,
    },
    /// The answer takes longer; it is still to come.
    Working,
}

/// Jobs and CompNodes of a broker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// Every job, oldest first.
    pub jobs: Vec<JobSummary>,
    /// Every CompNode that is connected.
    pub compnodes: Vec<CompNodeSummary>,
    /// Why the broker takes no jobs at present.
    #[serde(default)]
    pub trouble: Option<String>,
}

/// One job in a status report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobSummary {
    /// Its id.
    pub job: JobId,
    /// Its name.
    pub name: String,
    /// Its state.
    #[serde(with = "crate::wire::as_json")]
    pub state: JobState,
    /// Updates done.
    pub step: u64,
    /// Updates asked for.
    pub steps: u64,
    /// Last training loss.
    pub loss: Option<f64>,
    /// Its run directory on the broker's machine.
    pub run_dir: String,
}

/// One CompNode in a status report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompNodeSummary {
    /// Its name.
    pub name: String,
    /// Its public key in hexadecimal, shortened.
    pub id: String,
    /// Its device.
    pub device: String,
    /// The job it works on.
    pub job: Option<JobId>,
}
