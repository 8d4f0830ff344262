//! One connection of a command such as `submit` or `status`.

use std::time::Duration;

use fusionllm_protocol::{ClientRequest, ToClient, Welcome, decode, encode};
use fusionllm_transport::{FrameSink, FrameSource, Session};

use tokio::time::sleep;

use super::Handle;
use super::events::{JobEvents, Submitted};
use crate::BrokerError;

/// A client is told this often that its request is worked on; it gives up after 10 s without a word.
const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// Largest request: a job.
const REQUEST_BYTES: u64 = 16 << 20;

/// Answers requests until the client goes.
pub(super) async fn serve(session: Session, mut sink: FrameSink, mut source: FrameSource, handle: Handle) {
    let welcome = Welcome::Accepted { name: session.peer().to_string(), resumed: None };
    if let Ok(frame) = encode(&welcome)
        && sink.send(&frame).await.is_ok()
    {
        while let Ok(Some(frame)) = source.recv_limited(REQUEST_BYTES).await {
            let (answer, events) = match decode(&frame) {
                Ok(request) => match patiently(&mut sink, answer(request, &handle)).await {
                    Some(answered) => answered,
                    None => break,
                },
                Err(error) => (ToClient::Error { reason: error.to_string(), bad_input: true }, None),
            };
            if say(&mut sink, &answer).await.is_none() || follow(&mut sink, events).await.is_none() {
                break;
            }
        }
    }
    session.close(0, "done");
}

/// The answer once it is there; until then the client hears that it is worked on. Nothing if the client has gone: what
/// it asked for is done all the same.
async fn patiently<T>(sink: &mut FrameSink, answer: impl Future<Output = T>) -> Option<T> {
    tokio::pin!(answer);
    let mut is_here = true;
    loop {
        tokio::select! {
            answered = &mut answer => return is_here.then_some(answered),
            () = sleep(KEEP_ALIVE) => is_here = is_here && say(sink, &ToClient::Working).await.is_some(),
        }
    }
}

/// The answer, and the events to send after it.
async fn answer(request: ClientRequest, handle: &Handle) -> (ToClient, Option<JobEvents>) {
    let submitted = |result: Result<Submitted, BrokerError>, follow: bool| match result {
        Ok(Submitted { job, run_dir, events }) => {
            let run_dir = run_dir.display().to_string();
            (ToClient::Submitted { job, run_dir }, follow.then_some(events))
        }
        Err(error) => (refusal(&error), None),
    };
    match request {
        ClientRequest::Submit { spec, follow, tokenizer } => {
            submitted(handle.submit(*spec, None, tokenizer).await, follow)
        }
        ClientRequest::Resume { job, step, overrides, follow } => {
            submitted(handle.resume(job, step, overrides).await, follow)
        }
        ClientRequest::Status => match handle.status().await {
            Ok(report) => (ToClient::Status(report), None),
            Err(error) => (refusal(&error), None),
        },
        ClientRequest::Inventory { max_age_s, spec } => {
            let max_age = max_age_s.map(Duration::from_secs);
            match handle.inventory(max_age, spec.map(|s| *s)).await {
                Ok(inventory) => (ToClient::Inventory(inventory), None),
                Err(error) => (refusal(&error), None),
            }
        }
        ClientRequest::Stop { job } => match handle.stop(job).await {
            Ok(()) => (ToClient::Ok, None),
            Err(error) => (refusal(&error), None),
        },
    }
}

fn refusal(error: &BrokerError) -> ToClient {
    ToClient::Error { reason: error.to_string(), bad_input: error.is_bad_input() }
}

async fn follow(sink: &mut FrameSink, events: Option<JobEvents>) -> Option<()> {
    let Some(mut events) = events else { return Some(()) };
    while let Some(event) = events.next().await {
        say(sink, &ToClient::Event(event)).await?;
    }
    Some(())
}

async fn say(sink: &mut FrameSink, message: &ToClient) -> Option<()> {
    sink.send(&encode(message).ok()?).await.ok()
}
