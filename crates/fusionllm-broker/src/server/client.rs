//! One connection of a command such as `submit` or `status`.

use std::sync::Arc;
use std::time::Duration;

use fusionllm_protocol::{ClientRequest, ToClient, Welcome, decode, encode};
use fusionllm_transport::{FrameSink, FrameSource, Session};
use tokio::time::{sleep, timeout};

use super::events::{JobEvents, Submitted};
use super::gate::Admission;
use super::handle::{Handle, blocking};
use crate::BrokerError;

/// A client is told this often that its request is worked on; it gives up after 10 s without a word.
const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// How long a client may take to confirm the last answer.
const GOODBYE_LIMIT: Duration = Duration::from_secs(2);
/// Largest request: a job.
const REQUEST_BYTES: u64 = 16 << 20;

/// Answers requests until the client goes.
pub(super) async fn serve(
    pass: Admission,
    session: Session,
    mut sink: FrameSink,
    mut source: FrameSource,
    handle: Handle,
) {
    let welcome = Welcome::Accepted { name: session.peer().to_string(), resumed: None };
    if let Ok(frame) = encode(&welcome)
        && sink.send(&frame).await.is_ok()
    {
        while let Ok(Some(frame)) = source.recv_limited(REQUEST_BYTES).await {
            let (answer, events) = match decode(&frame) {
                Ok(request) => match patiently(&mut sink, KEEP_ALIVE, answer(request, &pass, &handle)).await {
                    Some(answered) => answered,
                    None => break,
                },
                Err(error) => (ToClient::Error { reason: error.to_string(), bad_input: true }, None),
            };
            if say(&mut sink, &answer).await.is_none() || follow(&mut sink, events).await.is_none() {
                break;
            }
            if pass.is_revoked() {
                // Whoever revokes his own ticket hears that it is done; closing earlier could overtake that.
                let _ = timeout(GOODBYE_LIMIT, sink.finish()).await;
                break;
            }
        }
    }
    session.close(0, "done");
}

/// The answer once it is there; until then the client hears `every` so often that it is worked on. Nothing if the client
/// has gone: what it asked for is done all the same.
async fn patiently<T>(sink: &mut FrameSink, every: Duration, answer: impl Future<Output = T>) -> Option<T> {
    tokio::pin!(answer);
    let mut is_here = true;
    loop {
        tokio::select! {
            answered = &mut answer => return is_here.then_some(answered),
            () = sleep(every) => is_here = is_here && say(sink, &ToClient::Working).await.is_some(),
        }
    }
}

/// The answer, and the events to send after it.
async fn answer(request: ClientRequest, pass: &Admission, handle: &Handle) -> (ToClient, Option<JobEvents>) {
    let submitted = |result: Result<Submitted, BrokerError>, follow: bool| match result {
        Ok(Submitted { job, run_dir, events }) => {
            let run_dir = run_dir.display().to_string();
            (ToClient::Submitted { job, run_dir }, follow.then_some(events))
        }
        Err(error) => (refusal(&error), None),
    };
    let plain = |result: Result<ToClient, BrokerError>| (result.unwrap_or_else(|error| refusal(&error)), None);
    match request {
        ClientRequest::Submit { spec, follow, tokenizer } => {
            submitted(handle.submit_for_client(*spec, tokenizer, pass.own).await, follow)
        }
        ClientRequest::Resume { job, step, overrides, follow } => {
            submitted(handle.resume(job, step, overrides, pass.own).await, follow)
        }
        ClientRequest::Status => plain(handle.status().await.map(ToClient::Status)),
        ClientRequest::Inventory { max_age_s, spec } => {
            let max_age = max_age_s.map(Duration::from_secs);
            let inventory = handle.inventory_for_client(max_age, spec.map(|s| *s), pass.own);
            plain(inventory.await.map(ToClient::Inventory))
        }
        ClientRequest::Drain { compnode } => plain(handle.drain(compnode).await.map(|()| ToClient::Ok)),
        ClientRequest::Stop { job } => plain(handle.stop(job).await.map(|()| ToClient::Ok)),
        ClientRequest::TicketNew { .. } | ClientRequest::TicketList | ClientRequest::TicketRevoke { .. } => {
            plain(tickets(request, pass).await)
        }
    }
}

/// Requests about tickets, which concern the gate alone.
async fn tickets(request: ClientRequest, pass: &Admission) -> Result<ToClient, BrokerError> {
    let (gate, asking) = (Arc::clone(&pass.gate), pass.connection());
    let work = move || match request {
        ClientRequest::TicketNew { role, name, valid_s, once } => {
            let (name, ticket) = gate.create(asking, name, role, valid_s, once)?;
            Ok(ToClient::Ticket { name, ticket: ticket.to_string() })
        }
        ClientRequest::TicketRevoke { name } => Ok(ToClient::TicketRevoked { closed: gate.revoke(&name, asking)? }),
        _ => Ok(ToClient::Tickets(gate.summaries())),
    };
    blocking(work).await
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

#[cfg(test)]
mod tests {
    use fusionllm_transport::{AdmitAll, Endpoint, EndpointConfig, Identity};

    use super::*;

    async fn endpoint() -> Endpoint {
        let config = EndpointConfig::new(Identity::generate(), "127.0.0.1:0".parse().unwrap());
        Endpoint::bind(config, Arc::new(AdmitAll)).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn whoever_waits_for_a_long_answer_hears_that_it_is_worked_on() {
        let (broker, caller) = (endpoint().await, endpoint().await);
        let session = caller.connect(&broker.addr()).await.unwrap();
        let (mut request, mut source) = session.open_bi().await.unwrap();
        request.send(b"resume").await.unwrap();
        let theirs = broker.accept().await.unwrap();
        let (mut sink, _request) = theirs.accept_bi().await.unwrap();
        let slow = async {
            sleep(Duration::from_millis(500)).await;
            7
        };
        let answered = patiently(&mut sink, Duration::from_millis(50), slow).await;
        assert_eq!(answered, Some(7));
        say(&mut sink, &ToClient::Ok).await.unwrap();
        let mut heard = 0;
        while let ToClient::Working = decode(&source.recv().await.unwrap().unwrap()).unwrap() {
            heard += 1;
        }
        assert!((1..=10).contains(&heard), "{heard}");
        // What somebody asked for is done though he has gone.
        session.close(0, "gone");
        theirs.closed().await;
        let mut is_done = false;
        let done = async {
            sleep(Duration::from_millis(200)).await;
            is_done = true;
        };
        assert_eq!(patiently(&mut sink, Duration::from_millis(20), done).await, None);
        assert!(is_done);
    }
}
