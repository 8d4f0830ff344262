//! Messages between a broker and a command such as `submit` or `status`.

use serde::{Deserialize, Serialize};

use crate::{Inventory, JobEvent, JobId, JobSpec, JobState, Standstill};

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
        /// The job that is to stop.
        job: JobId,
    },
    /// Move the work of a CompNode to others, after which it leaves.
    Drain {
        /// Name of the CompNode.
        compnode: String,
    },
    /// Go on with a stopped or failed job.
    Resume {
        /// The job that is to go on.
        job: JobId,
        /// From the checkpoint of this step, 0 being the beginning; if not given, from the newest whole one.
        step: Option<u64>,
        /// Keys of the job to change, as `section.key=value`.
        overrides: Vec<String>,
        /// Stream its events until it ends.
        follow: bool,
    },
    /// Make a ticket.
    TicketNew {
        /// What its holders may do.
        role: TicketRole,
        /// Its name; without one the broker finds one.
        name: Option<String>,
        /// For how many seconds it admits; without end if not given.
        valid_s: Option<u64>,
        /// Whether it admits one key only.
        once: bool,
    },
    /// Every ticket, without secrets.
    TicketList,
    /// Make a ticket worthless, and close the connections that came by it.
    TicketRevoke {
        /// The ticket to revoke, by its name.
        name: String,
    },
}

/// From the broker to a client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToClient {
    /// The job is in.
    Submitted {
        /// The id that the broker gave the job.
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
    /// Answer to [`ClientRequest::TicketNew`].
    Ticket {
        /// Name of the new ticket.
        name: String,
        /// The ticket: what admits its holder. The broker keeps only a hash of its secret.
        ticket: String,
    },
    /// Answer to [`ClientRequest::TicketList`].
    Tickets(Vec<TicketSummary>),
    /// Answer to [`ClientRequest::TicketRevoke`].
    TicketRevoked {
        /// Connections that were closed.
        closed: u64,
    },
    /// Done as asked.
    Ok,
    /// What was asked is not done.
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
    /// Names of each two CompNodes whose link leads over the broker's relay.
    pub relayed: Vec<(String, String)>,
    /// Why the broker takes no jobs at present.
    #[serde(default)]
    pub trouble: Option<String>,
    /// Names of CompNodes that were to leave and gave no sign of life before their work had moved.
    #[serde(default)]
    pub lost_leaving: Vec<String>,
}

/// One job in a status report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobSummary {
    /// The id that the broker gave the job.
    pub job: JobId,
    /// Name of the job.
    pub name: String,
    /// Where the job stands.
    #[serde(with = "crate::wire::as_json")]
    pub state: JobState,
    /// Updates that are done.
    pub step: u64,
    /// Updates asked for.
    pub steps: u64,
    /// Last training loss.
    pub loss: Option<f64>,
    /// Its run directory on the broker's machine.
    pub run_dir: String,
    /// Why it does no step at present, if it should.
    #[serde(with = "crate::wire::as_json", default)]
    pub standstill: Option<Standstill>,
    /// While its data is read: bytes of it that have become tokens, and bytes in all (0 as long as that is not known).
    #[serde(default)]
    pub reading: Option<(u64, u64)>,
}

/// One CompNode in a status report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompNodeSummary {
    /// Name of the CompNode.
    pub name: String,
    /// Its public key in hexadecimal, shortened.
    pub id: String,
    /// Its device, for people: `flex (CPU, 2 threads)`.
    pub device: String,
    /// The organisation that it says it belongs to.
    #[serde(default)]
    pub org: Option<String>,
    /// The job it works on.
    pub job: Option<JobId>,
    /// Whether it is about to leave, and gets no work any more.
    pub is_leaving: bool,
}

/// What the holder of a ticket may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TicketRole {
    /// Join as a CompNode, and nothing else.
    Join,
    /// Submit, stop and resume jobs, see status and inventory, make and revoke tickets.
    Operate,
}

impl std::fmt::Display for TicketRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Join => "join",
            Self::Operate => "operate",
        })
    }
}

/// Whether a ticket admits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TicketState {
    /// The ticket lets its bearer in.
    Valid,
    /// It admitted one key, and lets no other in.
    Used,
    /// Its time is over: it lets nobody in who was not in before.
    Expired,
    /// It was revoked.
    Revoked,
}

/// A ticket in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TicketSummary {
    /// Name of the ticket.
    pub name: String,
    /// What its holders may do.
    pub role: TicketRole,
    /// Whether it admits.
    pub state: TicketState,
    /// Seconds for which it still does, if it has an end.
    pub valid_s: Option<u64>,
    /// Whether it admits one key only.
    pub once: bool,
    /// Connections by it that are open.
    pub connections: u64,
}
