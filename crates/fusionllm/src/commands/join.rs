//! `fusionllm join`

use fusionllm_compnode::{JoinConfig, ReadableData, join};
use fusionllm_protocol::is_plain_name;
use fusionllm_transport::{Identity, make_private_dir};
use tokio::io::AsyncReadExt;

use super::follow::Interrupts;
use crate::cli;
use crate::exit::{bad_input, started};
use crate::outputs;
use crate::paths::state_dir;
use crate::secrets::given_ticket;

pub(super) async fn run(args: cli::Join) -> anyhow::Result<()> {
    let ticket = given_ticket(args.ticket.as_deref(), args.ticket_file.as_deref())?;
    let ticket = ticket.ok_or_else(|| {
        bad_input("no ticket: give the file with the join ticket that `fusionllm broker` wrote by --ticket-file")
    })?;
    if let Some(name) = args.name.as_deref().filter(|name| !is_plain_name(name) || name.starts_with('-')) {
        let expected = "expected 1 to 100 letters, digits, spaces or punctuation, not beginning with `-`";
        return Err(bad_input(format!("--name is {name:?}, {expected}")));
    }
    if let Some(org) = args.org.as_deref().filter(|org| !is_plain_name(org)) {
        return Err(bad_input(format!("--org is {org:?}, expected 1 to 100 letters, digits, spaces or punctuation")));
    }
    args.state.iter().try_for_each(|dir| outputs::check_folder("--state", dir))?;
    // A machine without a home measures anew each time.
    let state = state_dir(args.state.as_deref()).ok();
    // It may be a broker's, too, which wants it to be its owner's alone.
    let usable = state.clone().filter(|dir| make_private_dir(dir).is_ok());
    // What was asked for and cannot be had is refused by name.
    let scratch = args.scratch.or(usable.clone()).or(args.state).unwrap_or_else(std::env::temp_dir);
    let config = JoinConfig {
        ticket,
        name: args.name.unwrap_or_else(host_name),
        org: args.org,
        device: args.device.parse().map_err(bad_input)?,
        // A new key each time: a CompNode is known by the ticket that it holds.
        identity: Identity::generate(),
        bind: args.bind,
        advertise: args.advertise,
        threads: args.threads.map(|n| n as usize),
        memory_bytes: args.memory_gb.map(|gb| (gb * 1e9) as u64),
        profile_dir: state.filter(|_| !args.fresh_profile),
        seed_dir: usable.unwrap_or_else(|| scratch.clone()),
        snapshot_dir: args.snapshots.unwrap_or_else(|| scratch.join("snapshots")),
        snapshots_stay: !args.child,
        scratch_dir: scratch,
        readable: ReadableData::new(args.data).map_err(|e| bad_input(format!("--data: {e}")))?,
    };
    let child = args.child;
    // Each hears every signal.
    let (mut first, mut second) = (Interrupts::new(), Interrupts::new());
    let leave = async move {
        if child {
            return std::future::pending().await;
        }
        first.next().await;
        tracing::info!("leaving once the work has moved to others; a second signal leaves at once");
    };
    let shutdown = async move {
        if child {
            return input_ended().await;
        }
        second.next().await;
        second.next().await;
    };
    join(config, leave, shutdown).await.map_err(started)
}

/// A child lives as long as its parent holds the other end. Ctrl-C reaches the whole process group, but how a child
/// ends is for its parent to say.
async fn input_ended() {
    let ignored = tokio::spawn(async {
        loop {
            super::follow::interrupted().await;
        }
    });
    let mut input = tokio::io::stdin();
    let mut buffer = [0u8; 64];
    while matches!(input.read(&mut buffer).await, Ok(n) if n > 0) {}
    ignored.abort();
}

fn host_name() -> String {
    let from_file = std::fs::read_to_string("/etc/hostname").ok();
    let name = from_file.map(|n| n.trim().to_owned()).filter(|n| !n.is_empty());
    name.or_else(|| std::env::var("COMPUTERNAME").ok()).unwrap_or_else(|| "compnode".to_owned())
}
