//! `fusionllm broker`

use fusionllm_broker::{Broker, BrokerConfig, ResumedBy};

use crate::cli;
use crate::exit::bad_input;
use crate::outputs::check_folder;
use crate::paths::state_dir;
use crate::{render, secrets};

pub(super) async fn run(args: cli::Broker) -> anyhow::Result<()> {
    args.state.iter().try_for_each(|dir| check_folder("--state", dir))?;
    check_folder("--runs", &args.runs)?;
    args.checkpoints.iter().try_for_each(|dir| check_folder("--checkpoints", dir))?;
    args.models.iter().try_for_each(|dir| check_folder("--models", dir))?;
    if args.relay.is_some_and(|port| port == args.bind.port()) {
        return Err(bad_input(format!(
            "--relay {0} is the port of --bind {1}: give it another",
            args.bind.port(),
            args.bind
        )));
    }
    let config = BrokerConfig {
        bind: args.bind,
        advertise: args.advertise,
        relay: args.relay,
        state_dir: state_dir(args.state.as_deref())?,
        runs_dir: args.runs,
        checkpoint_dirs: args.checkpoints,
        model_dirs: args.models,
        scratch: None,
        resumed_by: ResumedBy::Broker,
    };
    let mut broker = Broker::start(config).await.map_err(super::train::broker_error)?;
    let mut interrupted = std::pin::pin!(super::follow::interrupted());
    // From here on a signal ends the broker in good order: whoever reads the ticket may send one at once.
    tokio::select! {
        biased;
        () = &mut interrupted => {}
        () = std::future::ready(()) => {}
    }
    let ticket = broker.ticket().to_string();
    let path = broker.ticket_path().display().to_string();
    let ticket = Some(ticket).filter(|_| secrets::may_print(args.show_ticket));
    let shown = if args.json {
        render::json(&serde_json::json!({ "ticket": ticket, "ticket_file": path }), false)
    } else {
        greet(&path, ticket)
    };
    // Who serves others goes on when nobody reads what it says.
    if let Err(error) = shown {
        tracing::warn!("{error:#}");
    }
    let has_failed = tokio::select! {
        () = interrupted => false,
        () = broker.failed() => true,
    };
    broker.shutdown().await;
    if has_failed {
        anyhow::bail!("the broker has ended unexpectedly (internal error; the lines above have more)");
    }
    Ok(())
}

/// Says how CompNodes join.
fn greet(path: &str, ticket: Option<String>) -> anyhow::Result<()> {
    render::line(&format!("The join ticket is in {path}. Copy that file to each machine that shall compute,"))?;
    render::line("readable by you alone (`scp -p` keeps it so), and run there:\n")?;
    render::line("    fusionllm join --ticket-file join.ticket --data DIR\n")?;
    render::line("DIR is what jobs may read there; a machine whose data nobody trains on needs no --data.")?;
    if let Some(ticket) = ticket {
        render::line(&format!("In one word, for `fusionllm join -`: {ticket}\n"))?;
    }
    render::line("The ticket lets CompNodes join: keep it to yourselves. Ctrl-C ends the broker.")
}
