//! `fusionllm drain`

use std::time::Duration;

use anyhow::bail;
use fusionllm_protocol::{ClientRequest, JobState, StatusReport, ToClient};
use tokio::time::sleep;

use super::follow::Interrupts;
use crate::cli;
use crate::client::Client;
use crate::render;

/// Between two looks at whether it has left.
const LOOK: Duration = Duration::from_millis(500);

pub(super) async fn run(args: cli::DrainCompNode) -> anyhow::Result<()> {
    let name = args.compnode;
    let mut client = Client::connect(&args.broker).await?;
    client.request(&ClientRequest::Drain { compnode: name.clone() }).await?;
    let mut interrupts = Interrupts::new();
    let mut jobs = Vec::new();
    let (mut told, mut worked_on, mut is_lost) = (String::new(), None, false);
    loop {
        let ToClient::Status(report) = client.request(&ClientRequest::Status).await? else { break };
        let Some(waits) = still_here(&report, &name) else {
            is_lost = report.lost_leaving.contains(&name);
            jobs = report.jobs;
            break;
        };
        let here = report.compnodes.iter().find(|compnode| compnode.name == name);
        worked_on = here.and_then(|compnode| compnode.job).or(worked_on);
        if waits != told {
            render::line(&waits)?;
            told = waits;
        }
        tokio::select! {
            () = sleep(LOOK) => {}
            () = interrupts.next() => {
                client.close().await;
                return render::line(&format!("`{name}` leaves once its work has moved, whether or not this waits for it"));
            }
        }
    }
    client.close().await;
    if is_lost {
        bail!(
            "`{name}` gives no sign of life and counts as lost; its work was not moved before, so others do again what it had \
             done since the last snapshots. It leaves if it comes back"
        );
    }
    render::line(&format!("`{name}` has left"))?;
    // Where nobody is there to take the work, it stands still.
    let its = jobs.iter().find(|job| Some(job.job) == worked_on);
    match its.filter(|job| matches!(job.state, JobState::Waiting { .. })) {
        Some(job) => render::line(&format!("{} {}", job.job, render::state(&job.state))),
        None => Ok(()),
    }
}

/// What a CompNode that is to leave still waits for; nothing once it has left.
fn still_here(report: &StatusReport, name: &str) -> Option<String> {
    let compnode = report.compnodes.iter().find(|compnode| compnode.name == name && compnode.is_leaving)?;
    Some(match compnode.job {
        Some(job) if report.jobs.iter().any(|known| known.job == job && known.step == known.steps) => {
            format!("`{name}` still has its part of {job}, whose steps are done: its last checkpoint is being written")
        }
        Some(job) => format!("`{name}` still works on {job}, whose work moves to others"),
        None => format!("`{name}` has no work any more and lends what it holds until others are at work"),
    })
}
