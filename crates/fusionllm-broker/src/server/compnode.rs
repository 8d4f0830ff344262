//! One connection of a CompNode.

use std::collections::BTreeMap;
use std::time::Duration;

use fusionllm_protocol::{
    FromBroker, FromCompNode, Numbered, ProtocolError, RunKey, Welcome, clean, decode_clean, encode,
};
use fusionllm_transport::{FrameSink, FrameSource, Session, SessionError};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, timeout};

use super::blob;
use super::command::{Command, Control, Joined, ToCompNode, lock};
use super::gate::Admission;
use super::handle::Handle;
use crate::core::{ConnectionId, CoreEvent, FailedBy, Joining};

/// Messages that may wait for a slow CompNode.
const OUTBOX: usize = 256;
/// Largest message of a CompNode: a report with a line for each link.
const MESSAGE_BYTES: u64 = 1 << 20;
/// How long a CompNode may take to confirm the last message.
const GOODBYE_LIMIT: Duration = Duration::from_secs(2);

/// Serves the connection until it ends, and tells the core. `resume` is what the CompNode has received before a break.
pub(super) async fn serve(
    pass: Admission,
    session: Session,
    joining: Joining,
    resume: Option<u64>,
    mut sink: FrameSink,
    source: FrameSource,
    handle: Handle,
) {
    let line = pass.connection();
    let (outbox, queue) = mpsc::channel(OUTBOX);
    let join = handle.ask(|reply| Command::Join { line, joining, resume, outbox, reply });
    let Ok(Joined { connection, name, control, resumed }) = join.await else { return };
    let mut end = End { reason: "it could not be welcomed".to_owned(), for_good: false };
    let (received, again) = resumed.map_or((None, Vec::new()), |(received, again)| (Some(received), again));
    if let Ok(frame) = encode(&Welcome::Accepted { name: name.clone(), resumed: received })
        && sink.send(&frame).await.is_ok()
    {
        end = tokio::select! {
            biased;
            end = write(connection, &session, sink, again, queue, &handle) => end,
            end = read(connection, source, &control, &handle) => end,
            () = blob::receive_all(connection, &session, &handle) => End::broken("its connection is lost"),
        };
        if let Ok(closed) = timeout(Duration::from_millis(100), session.closed()).await {
            end = match closed.code {
                Some(0) => End::left(),
                _ if pass.is_revoked() => End { reason: "its ticket was revoked".to_owned(), for_good: true },
                _ => End { reason: clean(&closed.reason).into_owned(), ..end },
            };
        }
    }
    session.close(0, &end.reason);
    let End { reason, for_good } = end;
    tracing::info!(%name, reason, "a CompNode's connection has ended");
    // If the actor is gone it needs no word.
    let _ = handle.commands.send(Command::Ended { line, connection, reason, for_good }).await;
}

/// Why a connection has ended.
struct End {
    reason: String,
    /// Whether the CompNode will not go on where it was.
    for_good: bool,
}

impl End {
    fn left() -> Self {
        Self { reason: "it left".to_owned(), for_good: true }
    }

    fn broken(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), for_good: false }
    }
}

/// Sends what the CompNode has not received over an earlier connection, and what the core has for it.
async fn write(
    connection: ConnectionId,
    session: &Session,
    mut sink: FrameSink,
    again: Vec<Numbered<FromBroker>>,
    mut queue: mpsc::Receiver<ToCompNode>,
    handle: &Handle,
) -> End {
    for message in again {
        if let Err(error) = send(&mut sink, &message).await {
            return End::broken(error.to_string());
        }
    }
    let mut sends = JoinSet::new();
    let mut by_run: BTreeMap<RunKey, AbortHandle> = BTreeMap::new();
    let end = loop {
        let next = queue.recv().await;
        while sends.try_join_next().is_some() {}
        by_run.retain(|_, sending| !sending.is_finished());
        match next {
            Some(ToCompNode::Message(message)) => {
                // A run that has ended needs no weights.
                if let FromBroker::Abort { key, .. } = message.message
                    && let Some(sending) = by_run.remove(&key)
                {
                    sending.abort();
                }
                if let Err(error) = send(&mut sink, &message).await {
                    break End::broken(error.to_string());
                }
            }
            Some(ToCompNode::Weights { key, params, from }) => {
                let (session, handle) = (session.clone(), handle.clone());
                let sending = sends.spawn(async move {
                    if let Err(reason) = blob::send_weights(&session, key, params, from, &handle).await
                        // After a break they are sent again, or the CompNode is lost.
                        && timeout(Duration::from_millis(100), session.closed()).await.is_err()
                    {
                        // What is said of how the job goes on must be there. If the actor is gone nobody reads it.
                        let _ = handle.ask(|reply| Command::Look { key, reply }).await;
                        let reason = format!("the weights could not be sent: {reason}");
                        let failed = Command::Event(CoreEvent::RunFailed { key, reason, by: FailedBy::Machine });
                        // If the actor is gone it needs no word.
                        let _ = handle.commands.send(failed).await;
                    }
                });
                by_run.insert(key, sending);
            }
            Some(ToCompNode::Disconnect(reason)) => break End { reason, for_good: true },
            None => break End::broken("it does not take its messages"),
        }
    };
    tracing::debug!(?connection, reason = end.reason, "closing");
    // Closing the connection earlier could overtake the last message.
    let _ = timeout(GOODBYE_LIMIT, sink.finish()).await;
    end
}

async fn send(sink: &mut FrameSink, message: &Numbered<FromBroker>) -> Result<(), Unsent> {
    Ok(sink.send(&encode(message)?).await?)
}

/// Why a message did not go out.
#[derive(Debug, thiserror::Error)]
enum Unsent {
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error(transparent)]
    Lost(#[from] SessionError),
}

/// Hands the core what the CompNode says, with the time at which it came.
async fn read(connection: ConnectionId, mut source: FrameSource, control: &Control, handle: &Handle) -> End {
    let wrong = |error: ProtocolError| End { reason: error.to_string(), for_good: true };
    loop {
        let frame = match source.recv_limited(MESSAGE_BYTES).await {
            Ok(Some(frame)) => frame,
            Err(SessionError::Closed { code: 0, .. }) => return End::left(),
            // Whether it leaves or comes back is said by the code with which it closes.
            Ok(None) => return End::broken("it ended its stream"),
            Err(error) => return End::broken(error.to_string()),
        };
        let at = Instant::now();
        let received = decode_clean(&frame).and_then(|frame| lock(control).receive::<FromCompNode>(frame));
        match received {
            Ok(Some(message)) => {
                if handle.commands.send(Command::Said { connection, message, at }).await.is_err() {
                    return End::broken("the broker ends");
                }
            }
            // It came over an earlier connection.
            Ok(None) => {}
            Err(error) => return wrong(error),
        }
    }
}
