//! `fusionllm submit`, `stop` and `resume`

use fusionllm_protocol::{ClientRequest, JobEvent, JobId, ToClient};

use super::follow::Interrupts;
use crate::cli;
use crate::client::Client;
use crate::progress::Progress;
use crate::render;

pub(super) async fn submit(args: cli::Submit) -> anyhow::Result<()> {
    let spec = super::job_file::read(&args.job, &args.overrides.overrides)?;
    let steps = spec.train.steps;
    let mut client = Client::connect(&args.broker).await?;
    let tokenizer = super::job_file::tokenizer_source(&spec);
    let request = ClientRequest::Submit { spec: Box::new(spec), follow: args.follow, tokenizer };
    accepted(&mut client, &request, args.json).await?;
    finish(client, args.follow, args.json, steps, &args.broker.typed()).await
}

pub(super) async fn resume(args: cli::ResumeJob) -> anyhow::Result<()> {
    let mut client = Client::connect(&args.broker).await?;
    let job = JobId(args.job);
    let known = match client.request(&ClientRequest::Status).await? {
        ToClient::Status(report) => report.jobs.iter().find(|j| j.job == job).map_or(0, |j| j.steps),
        _ => 0,
    };
    let (follow, step, overrides) = (args.follow, args.step, args.overrides.overrides);
    let asked =
        |given: &String| given.split_once('=').filter(|(key, _)| key.trim() == "train.steps")?.1.trim().parse().ok();
    let steps = overrides.iter().rev().find_map(asked).unwrap_or(known);
    accepted(&mut client, &ClientRequest::Resume { job, step, overrides, follow }, args.json).await?;
    finish(client, args.follow, args.json, steps, &args.broker.typed()).await
}

pub(super) async fn stop(args: cli::JobCommand) -> anyhow::Result<()> {
    let mut client = Client::connect(&args.broker).await?;
    let job = JobId(args.job);
    client.request(&ClientRequest::Stop { job }).await?;
    let state = match client.request(&ClientRequest::Status).await? {
        ToClient::Status(report) => report.jobs.into_iter().find(|known| known.job == job).map(|known| known.state),
        _ => None,
    };
    client.close().await;
    let (number, typed) = (args.job, args.broker.typed());
    if state.is_some_and(|state| !state.is_final()) {
        return render::line(&format!(
            "all steps of {job} are done, and its last checkpoint is being written: it ends when that is there. \
             `fusionllm stop {number}{typed}` once more ends it without"
        ));
    }
    render::line(&format!(
        "{job} stopped; `fusionllm resume {number}{typed}` goes on from its last checkpoint, or begins anew if it has none"
    ))
}

/// Hands it in and says under which number.
async fn accepted(client: &mut Client, request: &ClientRequest, json: bool) -> anyhow::Result<()> {
    if let ToClient::Submitted { job, run_dir } = client.request(request).await? {
        if json {
            render::json(&serde_json::json!({ "job": job, "run_dir": run_dir }), false)?;
        } else {
            render::line(&format!("{job}, run directory {run_dir} on the broker's machine"))?;
        }
    }
    Ok(())
}

/// Follows the job to its end, if asked to.
async fn finish(mut client: Client, follow: bool, json: bool, steps: u64, typed: &str) -> anyhow::Result<()> {
    let result = if follow { followed(&mut client, json, steps, typed).await } else { Ok(()) };
    client.close().await;
    result
}

/// Shows how the job goes, to its end. Ctrl-C ends the following, not the job; and so does the end of the broker.
async fn followed(client: &mut Client, json: bool, steps: u64, typed: &str) -> anyhow::Result<()> {
    let mut progress = Progress::new(json, steps);
    let mut interrupts = Interrupts::new();
    let back = format!("the job goes on by itself once the broker is back, `fusionllm status{typed}` shows it then");
    loop {
        let message = tokio::select! {
            message = client.next() => message.map_err(|error| anyhow::anyhow!("{error:#}; {back}"))?,
            () = interrupts.next() => {
                if !json {
                    render::line(&format!("the job goes on at the broker, `fusionllm status{typed}` shows it"))?;
                }
                return Ok(());
            }
        };
        let event = match message {
            Some(ToClient::Event(event)) => event,
            Some(other) => anyhow::bail!("the broker answered something else: {other:?}"),
            None => anyhow::bail!("the broker has ended; {back}"),
        };
        if let Err(error) = progress.event(&event) {
            let job = event.job();
            anyhow::bail!("{error:#}; {job} goes on at the broker, `fusionllm status{typed}` shows it");
        }
        if let JobEvent::State { state, .. } = &event
            && state.is_final()
        {
            return super::follow::outcome_at(state, typed);
        }
    }
}
