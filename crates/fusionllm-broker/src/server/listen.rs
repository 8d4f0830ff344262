//! New connections: hello, ticket, welcome.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fusionllm_protocol::{Hello, PROTOCOL_VERSION, Role, Welcome, decode, encode};
use fusionllm_transport::{Endpoint, FrameSink, FrameSource, Secret, Session};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Handle, client, compnode};
use crate::core::ConnectionId;

/// Who says nothing for this long is sent away.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// Largest hello: nobody needs more memory of ours before being let in.
const HELLO_BYTES: u64 = 64 << 10;
/// Close code of a peer without a valid ticket.
const REFUSED: u32 = 403;

/// Serves every connection until the endpoint closes.
pub(super) async fn run(endpoint: Endpoint, secret: Secret, handle: Handle) {
    let next = AtomicU64::new(1);
    let mut connections = JoinSet::new();
    while let Some(session) = endpoint.accept().await {
        while connections.try_join_next().is_some() {}
        let connection = ConnectionId(next.fetch_add(1, Ordering::Relaxed));
        let (secret, handle) = (secret.clone(), handle.clone());
        connections.spawn(async move { serve(connection, session, &secret, handle).await });
    }
}

async fn serve(connection: ConnectionId, session: Session, secret: &Secret, handle: Handle) {
    let Ok(Some((hello, mut sink, source))) = timeout(HELLO_LIMIT, hello(&session)).await else {
        session.close(REFUSED, "no hello");
        return;
    };
    if let Some(reason) = objection(&hello, secret) {
        tracing::warn!(peer = %session.peer(), role = ?hello.role, reason, "refused");
        let refused = Welcome::Refused { reason };
        if let Ok(frame) = encode(&refused)
            && sink.send(&frame).await.is_ok()
        {
            // Closing earlier could overtake the answer.
            let _ = timeout(HELLO_LIMIT, sink.finish()).await;
        }
        session.close(REFUSED, "refused");
        return;
    }
    match hello.role {
        Role::CompNode { name, device, addr, profile } => {
            let joining = crate::core::Joining { name, id: session.peer().to_string(), device, addr, profile };
            compnode::serve(connection, session, joining, sink, source, handle).await;
        }
        Role::Client => client::serve(session, sink, source, handle).await,
    }
}

async fn hello(session: &Session) -> Option<(Hello, FrameSink, FrameSource)> {
    let (sink, mut source) = session.accept_bi().await.ok()?;
    let frame = source.recv_limited(HELLO_BYTES).await.ok()??;
    Some((decode(&frame).ok()?, sink, source))
}

/// Why somebody may not come in.
fn objection(hello: &Hello, secret: &Secret) -> Option<String> {
    if !Secret::from_bytes(hello.secret).matches(secret) {
        return Some("the ticket is not valid for this broker".to_owned());
    }
    if hello.version != PROTOCOL_VERSION {
        let (theirs, ours) = (hello.version, PROTOCOL_VERSION);
        return Some(format!("protocol version {theirs}, this broker speaks {ours}: use the same release"));
    }
    match &hello.role {
        Role::CompNode { name, .. } if name.is_empty() || name.len() > 100 || name.chars().any(char::is_control) => {
            Some("a CompNode's name has 1 to 100 printable characters".to_owned())
        }
        Role::CompNode { .. } | Role::Client => None,
    }
}
