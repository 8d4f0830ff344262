//! What was typed.

mod plan;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use fusionllm_planner::MAX_COMPNODES;

use crate::values;
pub(crate) use plan::Plan;

/// Train one large model on geo-distributed, mismatched GPUs.
#[derive(Debug, Parser)]
#[command(name = "fusionllm", version, about, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train on this machine: a broker, N CompNode processes, and the whole job
    Train(Train),
    /// Run a broker and say how to join it
    Broker(Broker),
    /// Run a CompNode: join a broker and work for it
    Join(Join),
    /// Hand a job to a running broker
    Submit(Submit),
    /// Show a broker's jobs and CompNodes
    Status(Status),
    /// Show what a broker's machines and links can do
    Inventory(Inventory),
    /// Say who may join a broker and who may operate it
    Ticket(Ticket),
    /// Stop a job; its last checkpoint stays, and only that
    Stop(JobCommand),
    /// Move the work of a CompNode to others, after which it leaves
    Drain(DrainCompNode),
    /// Go on with a stopped or failed job from its newest whole checkpoint
    Resume(ResumeJob),
    /// Show the graph and the placement of a job, without training
    Plan(Plan),
    /// Write a checkpoint in Hugging Face layout
    Export(Export),
    /// Write text with a trained model
    Generate(Generate),
}

impl Command {
    /// Whether all that it is for is what it prints: then nothing is lost if nobody reads on.
    pub(crate) fn only_tells(&self) -> bool {
        match self {
            Self::Train(_) | Self::Broker(_) | Self::Join(_) | Self::Export(_) => false,
            Self::Submit(_)
            | Self::Status(_)
            | Self::Inventory(_)
            | Self::Ticket(_)
            | Self::Stop(_)
            | Self::Drain(_)
            | Self::Resume(_)
            | Self::Plan(_)
            | Self::Generate(_) => true,
        }
    }
}

impl Cli {
    /// Log level when FUSIONLLM_LOG says nothing: services tell what they do, commands only what is wrong.
    pub(crate) fn default_log(&self) -> &'static str {
        match &self.command {
            Command::Broker(_) => "warn,fusionllm=info,fusionllm_broker=info,fusionllm_transport=info,iroh_relay=off",
            Command::Join(join) if !join.child => {
                "warn,fusionllm=info,fusionllm_compnode=info,fusionllm_transport=info,iroh_relay=off"
            }
            // What the QUIC library calls an error, such as an endpoint that goes without a farewell, is none of a command's.
            // Notices of a job are printed as such.
            _ => {
                "error,iroh=off,fusionllm::commands=warn,fusionllm::secrets=warn,fusionllm_broker=warn,\
                 fusionllm_broker::notices=off,fusionllm_compnode=warn"
            }
        }
    }
}

/// A job file and changes to it.
#[derive(Debug, Args)]
pub(crate) struct Overrides {
    /// Override a job key, such as --set train.steps=100 (repeatable)
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Train {
    /// Job file (see docs/job.md); not needed with --resume
    #[arg(required_unless_present = "resume")]
    pub(crate) job: Option<PathBuf>,
    /// CompNode processes to start [default: placement.compnodes, or 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MAX_COMPNODES as i64))]
    pub(crate) compnodes: Option<u32>,
    /// Run directory [default: runs/NAME-TIME]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Go on from a checkpoint or from a run directory's newest whole one; with another --out a new run begins there
    #[arg(long, value_name = "DIR", conflicts_with = "job")]
    pub(crate) resume: Option<PathBuf>,
    /// Go on from the checkpoint of this step
    #[arg(long, value_name = "N", requires = "resume", conflicts_with = "job")]
    pub(crate) step: Option<u64>,
    /// Device of every CompNode: auto, cpu, cuda[:N], vulkan[:N], metal, rocm[:N]
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,
    /// Measure the device again, even if it was measured before
    #[arg(long)]
    pub(crate) fresh_profile: bool,
    /// One JSON object a line instead of text
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) overrides: Overrides,
}

#[derive(Debug, Args)]
pub(crate) struct Broker {
    /// Address to listen on; port 0 takes any
    #[arg(long, default_value = "0.0.0.0:7710", value_parser = values::bind_address)]
    pub(crate) bind: SocketAddr,
    /// Further address under which CompNodes reach this broker, such as a forwarded port (repeatable)
    #[arg(long, value_name = "ADDR", value_parser = values::outer_address)]
    pub(crate) advertise: Vec<SocketAddr>,
    /// Be a relay, too, for CompNodes behind routers: port of TCP and UDP [default: 7712]
    #[arg(long, value_name = "PORT", num_args = 0..=1, default_missing_value = "7712",
          value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) relay: Option<u16>,
    /// Where key, tickets and job records are kept, for you alone [default: the user's state folder]
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// Where run directories are made
    #[arg(long, value_name = "DIR", default_value = "runs")]
    pub(crate) runs: PathBuf,
    /// Folder where a job's checkpoint.to may lie, besides --runs (repeatable)
    #[arg(long, value_name = "DIR")]
    pub(crate) checkpoints: Vec<PathBuf>,
    /// Folder where a job's model.path and placement.cluster may lie if it comes from elsewhere (repeatable)
    #[arg(long, value_name = "DIR")]
    pub(crate) models: Vec<PathBuf>,
    /// Print the join ticket even where output is no terminal
    #[arg(long)]
    pub(crate) show_ticket: bool,
    /// Print where the join ticket is as JSON, with --show-ticket the ticket too
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Join {
    /// The broker's join ticket, or `-` to read it from standard input [default: $FUSIONLLM_TICKET]
    pub(crate) ticket: Option<String>,
    /// File with the ticket, readable by you alone
    #[arg(long, value_name = "FILE", conflicts_with = "ticket")]
    pub(crate) ticket_file: Option<PathBuf>,
    /// Name shown to people [default: the host's name]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Organisation that this machine belongs to: where a job's data is private, its machines are kept apart
    #[arg(long, value_name = "NAME")]
    pub(crate) org: Option<String>,
    /// What to compute with: auto, cpu, cuda[:N], vulkan[:N], metal, rocm[:N]
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,
    /// Address where other CompNodes connect; port 0 takes any
    #[arg(long, default_value = "0.0.0.0:0", value_parser = values::bind_address)]
    pub(crate) bind: SocketAddr,
    /// Further address under which other CompNodes reach this one (repeatable)
    #[arg(long, value_name = "ADDR", value_parser = values::outer_address)]
    pub(crate) advertise: Vec<SocketAddr>,
    /// Threads of the CPU device [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=values::MOST_THREADS))]
    pub(crate) threads: Option<u32>,
    /// Memory that jobs may fill, in GB [default: what is free]
    #[arg(long, value_name = "GB", allow_negative_numbers = true, value_parser = values::memory_gb)]
    pub(crate) memory_gb: Option<f64>,
    /// Measure the device again, even if it was measured before
    #[arg(long)]
    pub(crate) fresh_profile: bool,
    /// File or folder that jobs may read on this machine as data, and tokenizers (repeatable) [default: nothing]
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Vec<PathBuf>,
    /// Folder for the device's measured profile, for weights and checkpoint shards while they come and go, and for snapshots of
    /// the jobs that it works on [default: the user's state folder]
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// Leave when standard input ends, as it does when the parent process dies
    #[arg(long, hide = true)]
    pub(crate) child: bool,
    /// Folder for weights and shards while they come and go.
    #[arg(long, hide = true, requires = "child", value_name = "DIR")]
    pub(crate) scratch: Option<PathBuf>,
    /// Folder for snapshots.
    #[arg(long, hide = true, requires = "child", value_name = "DIR")]
    pub(crate) snapshots: Option<PathBuf>,
}

/// How a command finds its broker.
#[derive(Debug, Args)]
pub(crate) struct BrokerAddress {
    /// File with an operate ticket [default: $FUSIONLLM_TICKET, else that of a broker on this machine]
    #[arg(long, value_name = "FILE", conflicts_with = "ticket")]
    pub(crate) ticket_file: Option<PathBuf>,
    /// The ticket itself, which others on this machine can see, or `-` to read it from standard input
    #[arg(long)]
    pub(crate) ticket: Option<String>,
    /// State folder of a broker on this machine
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Submit {
    /// Job file (see docs/job.md)
    pub(crate) job: PathBuf,
    /// Stay and show progress until the job ends
    #[arg(long)]
    pub(crate) follow: bool,
    /// One JSON object a line instead of text
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) broker: BrokerAddress,
    #[command(flatten)]
    pub(crate) overrides: Overrides,
}

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// One JSON document
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) broker: BrokerAddress,
}

#[derive(Debug, Args)]
pub(crate) struct Inventory {
    /// Measure the ops of this job too, which gives λ and exact predictions
    #[arg(long, value_name = "JOB")]
    pub(crate) job: Option<PathBuf>,
    /// Measure all links again
    #[arg(long)]
    pub(crate) refresh: bool,
    /// Stay, measure links again when they are a minute old, and show the tables anew
    #[arg(long)]
    pub(crate) watch: bool,
    /// A cluster file for `plan --cluster`
    #[arg(long, conflicts_with = "json")]
    pub(crate) toml: bool,
    /// One JSON document, or with --watch one a line
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) broker: BrokerAddress,
    #[command(flatten)]
    pub(crate) overrides: Overrides,
}

#[derive(Debug, Args)]
pub(crate) struct DrainCompNode {
    /// Name of the CompNode, as `status` shows it
    #[arg(value_name = "NAME")]
    pub(crate) compnode: String,
    #[command(flatten)]
    pub(crate) broker: BrokerAddress,
}

#[derive(Debug, Args)]
pub(crate) struct JobCommand {
    /// The job's number, as status shows it
    pub(crate) job: u64,
    #[command(flatten)]
    pub(crate) broker: BrokerAddress,
}

#[derive(Debug, Args)]
pub(crate) struct ResumeJob {
    /// The job's number, as status shows it
    pub(crate) job: u64,
    /// Go on from the checkpoint of this step; 0: from the beginning
    #[arg(long, value_name = "N")]
    pub(crate) step: Option<u64>,
    /// Stay and show progress until the job ends
    #[arg(long)]
    pub(crate) follow: bool,
    /// One JSON object a line instead of text
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) broker: BrokerAddress,
    #[command(flatten)]
    pub(crate) overrides: Overrides,
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// A checkpoint, a run directory for its newest one, or a Hugging Face folder
    pub(crate) checkpoint: PathBuf,
    /// Folder to write config.json, model.safetensors and tokenizer.json to, or of a run with adapters these alone, as PEFT
    /// has them: new, empty, or an earlier export of the same
    pub(crate) dir: PathBuf,
    /// Add a run's adapters to its weights, and write a whole model
    #[arg(long)]
    pub(crate) merge: bool,
    /// The tokenizer's tokenizer.json, where the checkpoint does not carry it
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Generate {
    /// A checkpoint, a run directory, or a Hugging Face folder
    pub(crate) dir: PathBuf,
    /// The tokenizer's tokenizer.json, where the model does not carry it
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Text to continue
    #[arg(long)]
    pub(crate) prompt: String,
    /// Tokens to write
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=values::MOST_TOKENS))]
    pub(crate) tokens: u64,
    /// Divides the logits; 0 takes the likeliest token every time
    #[arg(long, default_value_t = 0.8, allow_negative_numbers = true)]
    pub(crate) temperature: f64,
    /// Draw among this many likeliest tokens; 0: among all
    #[arg(long, default_value_t = 40)]
    pub(crate) top_k: usize,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// What to compute with
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,
    /// One JSON document
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Ticket {
    #[command(subcommand)]
    pub(crate) command: TicketCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TicketCommand {
    /// Make a ticket
    New(NewTicket),
    /// Show all tickets
    List(TicketList),
    /// Make a ticket worthless and close the connections that came by it
    Revoke(RevokeTicket),
}

/// What the holder of a ticket may do.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum RoleName {
    /// Join as a CompNode, and nothing else
    Join,
    /// Submit, stop and resume jobs, see status and inventory, make and revoke tickets
    Operate,
}

#[derive(Debug, Args)]
pub(crate) struct NewTicket {
    /// What its holder may do
    #[arg(long)]
    pub(crate) role: RoleName,
    /// Name to list and revoke it by [default: the role and a number]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// For how long it lets anybody in, such as 7d or 12h [default: until it is revoked]
    #[arg(long, value_name = "TIME")]
    pub(crate) expires: Option<String>,
    /// It lets one CompNode in, or one command
    #[arg(long)]
    pub(crate) once: bool,
    /// File to write it to [default: NAME.ticket in this folder]
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Print it even where output is no terminal
    #[arg(long)]
    pub(crate) show_ticket: bool,
    /// One JSON document with the ticket, and no file unless --out is given
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) broker: BrokerAddress,
}

#[derive(Debug, Args)]
pub(crate) struct TicketList {
    /// One JSON document
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) broker: BrokerAddress,
}

#[derive(Debug, Args)]
pub(crate) struct RevokeTicket {
    /// The ticket's name, as the list shows it
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) broker: BrokerAddress,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }
}
