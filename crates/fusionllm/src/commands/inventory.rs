//! `fusionllm inventory`: what the joined machines and links can do.

mod table;

use std::time::Duration;

use anyhow::bail;
use fusionllm_planner::ClusterFile;
use fusionllm_protocol::{ClientRequest, Inventory, JobSpec, ToClient};
use tokio::time::sleep;

use crate::cli;
use crate::client::Client;
use crate::exit::bad_input;
use crate::render;

/// Between two questions while measurements are pending.
const LOOK: Duration = Duration::from_millis(300);
/// Between two tables of `--watch`.
const WATCH: Duration = Duration::from_secs(5);
/// Links that were measured longer ago are measured again under `--watch`.
const WATCH_AGE: Duration = Duration::from_secs(60);

pub(super) async fn run(args: cli::Inventory) -> anyhow::Result<()> {
    let spec = args.job.as_deref().map(|path| super::job_file::read(path, &args.overrides.overrides)).transpose()?;
    if args.refresh && args.watch {
        return Err(bad_input("--watch measures again by itself, leave --refresh out"));
    }
    let mut client = Client::connect(&args.broker).await?;
    let result = tokio::select! {
        result = show(&args, &mut client, spec) => result,
        () = super::follow::interrupted() => Ok(()),
    };
    client.close().await;
    result
}

async fn show(args: &cli::Inventory, client: &mut Client, spec: Option<JobSpec>) -> anyhow::Result<()> {
    let mut max_age = args.refresh.then_some(Duration::ZERO);
    loop {
        let inventory = whole(client, max_age, spec.as_ref()).await?;
        if args.toml {
            let file = ClusterFile::of(&inventory.cluster(), "inventory");
            render::line(toml::to_string(&file)?.trim_end())?;
        } else if args.json {
            render::json(&inventory, !args.watch)?;
        } else {
            render::line(&table::inventory(&inventory))?;
        }
        if !args.watch {
            return Ok(());
        }
        sleep(WATCH).await;
        max_age = Some(WATCH_AGE);
        if !args.json && !args.toml {
            render::line("")?;
        }
    }
}

/// Asks until nothing is pending.
async fn whole(client: &mut Client, max_age: Option<Duration>, spec: Option<&JobSpec>) -> anyhow::Result<Inventory> {
    let mut max_age_s = max_age.map(|age| age.as_secs());
    loop {
        let spec = spec.cloned().map(Box::new);
        match client.request(&ClientRequest::Inventory { max_age_s, spec }).await? {
            ToClient::Inventory(inventory) if inventory.pending == 0 => return Ok(inventory),
            ToClient::Inventory(inventory) => {
                tracing::info!(pending = inventory.pending, "measuring");
                // What is measured now is fresh: asking again must not begin anew.
                max_age_s = None;
            }
            other => bail!("the broker answered something else: {other:?}"),
        }
        sleep(LOOK).await;
    }
}
