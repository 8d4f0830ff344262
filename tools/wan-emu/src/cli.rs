//! The command line's form.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use wan_emu::link::LinkRule;

/// Emulates a wide-area network between namespaces of one Linux machine
///
/// Exit codes: 0 done, 1 failed, 2 bad usage or input; `run` and `exec` otherwise end with their command's own code.
#[derive(Debug, Parser)]
#[command(name = "wan-emu", version)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Bring a network up, in the background
    Up {
        /// Network file
        file: PathBuf,
        /// Name for it, instead of the file's
        #[arg(long)]
        net: Option<String>,
        /// Stay in the foreground, until Ctrl-C or `down`
        #[arg(long)]
        foreground: bool,
        /// As what `up` starts in the background
        #[arg(long, hide = true, conflicts_with = "foreground")]
        background: bool,
    },
    /// Bring a network up, start its nodes' commands, play its steps, run CMD, take it down
    Run {
        /// Network file, with the scenario
        file: PathBuf,
        /// Name for it, instead of the file's
        #[arg(long)]
        net: Option<String>,
        /// Run CMD on this node, not outside of all
        #[arg(long)]
        node: Option<String>,
        /// Write the output of the nodes' commands to NODE.log in this directory
        #[arg(long)]
        logs: Option<PathBuf>,
        /// The command; without it, the run ends with the nodes' commands or after `duration_s`
        #[arg(last = true)]
        cmd: Vec<OsString>,
    },
    /// Run a command on a node of a network that is up
    Exec {
        /// The node
        node: String,
        #[command(flatten)]
        which: Which,
        /// The command
        #[arg(last = true, required = true)]
        cmd: Vec<OsString>,
    },
    /// Change, cut or heal links of a network that is up
    Link(LinkArgs),
    /// Show a network that is up
    Status {
        #[command(flatten)]
        which: Which,
        /// All links, also those that carried nothing
        #[arg(long)]
        all: bool,
        /// As one JSON document
        #[arg(long)]
        json: bool,
    },
    /// Measure a link of a network that is up: round trip, goodput, loss
    Measure {
        /// Sending node
        from: String,
        /// Receiving node
        to: String,
        #[command(flatten)]
        which: Which,
        /// Length of each measurement
        #[arg(long, default_value_t = 4.0, value_parser = seconds)]
        seconds: f64,
        /// As one JSON document
        #[arg(long)]
        json: bool,
    },
    /// Take a network down, or clean up after one whose process was killed
    Down {
        #[command(flatten)]
        which: Which,
        /// All networks
        #[arg(long, conflicts_with = "net")]
        all: bool,
    },
    /// List the named links
    Presets,
}

/// Which network; may be left out while one is up.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// Name of the network
    #[arg(long)]
    pub(crate) net: Option<String>,
}

/// What is left out stays as it is.
#[derive(Debug, Args)]
pub(crate) struct LinkArgs {
    /// A node, a site, or `*`
    from: String,
    /// Node at the other end
    to: String,
    #[command(flatten)]
    pub(crate) which: Which,
    /// Only from FROM to TO, not back
    #[arg(long)]
    one_way: bool,
    /// Numbers to start from
    #[arg(long)]
    preset: Option<String>,
    /// Rate in Mbit/s
    #[arg(long, visible_alias = "mbit-per-s")]
    rate: Option<f64>,
    /// Rate of the way back where it differs
    #[arg(long, visible_alias = "back-mbit-per-s")]
    back_rate: Option<f64>,
    /// Delay one way
    #[arg(long)]
    latency_ms: Option<f64>,
    /// Most that a packet may be early or late
    #[arg(long)]
    jitter_ms: Option<f64>,
    /// Packets lost
    #[arg(long)]
    loss_percent: Option<f64>,
    /// Mean packets in a run of losses
    #[arg(long)]
    loss_burst: Option<f64>,
    /// Queue before the link, as time at its rate
    #[arg(long)]
    queue_ms: Option<f64>,
    /// Queue before the link
    #[arg(long)]
    queue_bytes: Option<u64>,
    /// Depth of the token bucket, as time at the link's rate
    #[arg(long)]
    burst_ms: Option<f64>,
    /// Whether jitter may reorder packets
    #[arg(long)]
    reorder: Option<bool>,
    /// Cut it: nothing passes, and what is under way is lost
    #[arg(long, conflicts_with = "heal")]
    cut: bool,
    /// Heal it
    #[arg(long)]
    heal: bool,
}

impl LinkArgs {
    pub(crate) fn rule(self) -> LinkRule {
        LinkRule {
            from: self.from,
            to: self.to,
            one_way: self.one_way,
            preset: self.preset,
            latency_ms: self.latency_ms,
            mbit_per_s: self.rate,
            back_mbit_per_s: self.back_rate,
            jitter_ms: self.jitter_ms,
            loss_percent: self.loss_percent,
            loss_burst: self.loss_burst,
            queue_ms: self.queue_ms,
            queue_bytes: self.queue_bytes,
            burst_ms: self.burst_ms,
            reorder: self.reorder,
            cut: if self.heal { Some(false) } else { self.cut.then_some(true) },
        }
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.5..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected 0.5 to 600".to_owned()),
    }
}
