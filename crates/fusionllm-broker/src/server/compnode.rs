//! One connection of a CompNode.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fusionllm_protocol::{FromBroker, FromCompNode, Welcome, decode, encode};
use fusionllm_transport::{FrameSink, FrameSource, Session, SessionError};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

use super::actor::Command;
use super::{Handle, blob};
use crate::checkpoint::TensorSet;
use crate::core::{ConnectionId, CoreEvent, Joining, RunKey};

/// Messages that may wait for a slow CompNode.
const OUTBOX: usize = 256;
/// Largest message of a CompNode: a report with a line for each link.
const MESSAGE_BYTES: u64 = 1 << 20;
/// How long a CompNode may take to confirm the last message.
const GOODBYE_LIMIT: Duration = Duration::from_secs(2);

/// What goes to a CompNode.
#[derive(Debug)]
pub(super) enum ToCompNode {
    Message(FromBroker),
    Weights { key: RunKey, params: Vec<String>, from: Arc<TensorSet> },
    Disconnect(String),
}

/// Serves the connection until it ends, and tells the core.
pub(super) async fn serve(
    connection: ConnectionId,
    session: Session,
    joining: Joining,
    mut sink: FrameSink,
    source: FrameSource,
    handle: Handle,
) {
    let (outbox, queue) = mpsc::channel(OUTBOX);
    let join = handle.ask(|reply| Command::Join { connection, joining, outbox, reply });
    let Ok(name) = join.await else { return };
    let mut reason = "it could not be welcomed".to_owned();
    if let Ok(frame) = encode(&Welcome::Accepted { name: name.clone() })
        && sink.send(&frame).await.is_ok()
    {
        let mut blobs = JoinSet::new();
        reason = tokio::select! {
            reason = write(connection, &session, sink, queue, &handle) => reason,
            reason = read(connection, source, &handle) => reason,
            () = blob::receive_all(connection, &session, &handle, &mut blobs) => "its connection is lost".to_owned(),
        };
        if let Ok(closed) = timeout(Duration::from_millis(100), session.closed()).await {
            reason = match closed.code {
                Some(0) => "it left".to_owned(),
                _ => closed.reason,
            };
        }
    }
    session.close(0, &reason);
    tracing::info!(%name, reason, "a CompNode has gone");
    // If the actor is gone it needs no word.
    let _ = handle.commands.send(Command::Event(CoreEvent::Left { connection, reason })).await;
}

/// Sends what the core has for the CompNode. Gives the reason why it ended.
async fn write(
    connection: ConnectionId,
    session: &Session,
    mut sink: FrameSink,
    mut queue: mpsc::Receiver<ToCompNode>,
    handle: &Handle,
) -> String {
    let mut sends = JoinSet::new();
    let mut by_run: BTreeMap<RunKey, AbortHandle> = BTreeMap::new();
    let reason = loop {
        let next = queue.recv().await;
        while sends.try_join_next().is_some() {}
        by_run.retain(|_, sending| !sending.is_finished());
        match next {
            Some(ToCompNode::Message(message)) => {
                // A run that has ended needs no weights.
                if let FromBroker::Abort { job, generation, .. } = message
                    && let Some(sending) = by_run.remove(&RunKey { job, generation })
                {
                    sending.abort();
                }
                if let Err(error) = send(&mut sink, &message).await {
                    break error;
                }
            }
            Some(ToCompNode::Weights { key, params, from }) => {
                let (session, handle) = (session.clone(), handle.clone());
                let sending = sends.spawn(async move {
                    if let Err(reason) = blob::send_weights(&session, key, params, from, &handle).await {
                        let reason = format!("the weights could not be sent: {reason}");
                        let failed = Command::Event(CoreEvent::RunFailed { key, reason });
                        // If the actor is gone it needs no word.
                        let _ = handle.commands.send(failed).await;
                    }
                });
                by_run.insert(key, sending);
            }
            Some(ToCompNode::Disconnect(reason)) => break reason,
            None => break "it does not take its messages".to_owned(),
        }
    };
    tracing::debug!(?connection, reason, "closing");
    // Closing the connection earlier could overtake the last message.
    let _ = timeout(GOODBYE_LIMIT, sink.finish()).await;
    reason
}

async fn send(sink: &mut FrameSink, message: &FromBroker) -> Result<(), String> {
    let frame = encode(message).map_err(|e| e.to_string())?;
    sink.send(&frame).await.map_err(|e| e.to_string())
}

/// Hands the core what the CompNode says. Gives the reason why it ended.
async fn read(connection: ConnectionId, mut source: FrameSource, handle: &Handle) -> String {
    loop {
        let message: FromCompNode = match source.recv_limited(MESSAGE_BYTES).await {
            Ok(Some(frame)) => match decode(&frame) {
                Ok(message) => message,
                Err(error) => return error.to_string(),
            },
            Ok(None) => return "it left".to_owned(),
            Err(SessionError::Closed { code: 0, .. }) => return "it left".to_owned(),
            Err(error) => return error.to_string(),
        };
        if handle.commands.send(Command::Event(CoreEvent::Said { connection, message })).await.is_err() {
            return "the broker ends".to_owned();
        }
    }
}
