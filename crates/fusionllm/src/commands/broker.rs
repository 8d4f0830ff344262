//! `fusionllm broker`

use fusionllm_broker::{Broker, BrokerConfig, ResumedBy};

use crate::cli;
use crate::paths::state_dir;
use crate::render;

pub(super) async fn run(args: cli::Broker) -> anyhow::Result<()> {
    let config = BrokerConfig {
        bind: args.bind,
        advertise: args.advertise,
        state_dir: state_dir(args.state.as_deref())?,
        runs_dir: args.runs,
        resumed_by: ResumedBy::Broker,
    };
    let broker = Broker::start(config).await.map_err(super::train::broker_error)?;
    let mut interrupted = std::pin::pin!(super::follow::interrupted());
    // From here on a signal ends the broker in good order: whoever reads the ticket may send one at once.
    tokio::select! {
        biased;
        () = &mut interrupted => {}
        () = std::future::ready(()) => {}
    }
    let ticket = broker.ticket().to_string();
    if args.json {
        render::json(&serde_json::json!({ "ticket": ticket }), false)?;
    } else {
        render::line("On each machine that shall compute, run:\n")?;
        render::line(&format!("    fusionllm join {ticket}\n"))?;
        render::line("The ticket lets its holder in: keep it to yourselves. Ctrl-C ends the broker.")?;
    }
    interrupted.await;
    broker.shutdown().await;
    Ok(())
}
