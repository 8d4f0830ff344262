//! How a peer is reached at one of several addresses, some of which may be stale, cut off, or somebody else's.

use std::net::SocketAddr;
use std::time::Duration;

use iroh::endpoint::{ConnectError as IrohError, Connection, ConnectionError};
use iroh::{EndpointAddr, PublicKey, TransportAddr};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use crate::endpoint::{ALPN, Socket};

/// How long each attempt lasts. A handshake that gets no answer asks again ever more rarely, by the end only every few
/// seconds; a new attempt asks at once, so that a link that is back is found. The later ones give a very long way time.
const ATTEMPTS: [Duration; 4] =
    [Duration::from_millis(1_500), Duration::from_millis(2_000), Duration::from_millis(2_500), Duration::from_secs(4)];
/// A connection that is not made by then fails.
pub(crate) const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Why nobody was reached.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Nobody answered in time.
    Silence,
    /// Somebody answered, but not as it should be.
    Answer(IrohError),
}

/// Connects to `key` at whichever address answers first. If somebody else answers there, each address is tried by itself.
pub(crate) async fn dial(socket: &Socket, key: PublicKey, addrs: &[SocketAddr]) -> Result<Connection, Failure> {
    let deadline = Instant::now() + CONNECT_LIMIT;
    let failure = match attempts(socket.inner(), key, addrs, deadline).await {
        Err(Failure::Answer(error)) if !is_refusal(&error) => Failure::Answer(error),
        result => return result,
    };
    tracing::debug!(?failure, ?addrs, "somebody else answers at an address of the peer, trying each by itself");
    each(socket, key, addrs, deadline).await.ok_or(failure)
}

/// Whether the peer itself, and not somebody else at its address, ended the connection.
fn is_refusal(error: &IrohError) -> bool {
    let ended = match error {
        IrohError::Connection { source, .. } => Some(source),
        _ => None,
    };
    matches!(ended, Some(ConnectionError::ApplicationClosed(_)))
}

async fn attempts(
    endpoint: &iroh::Endpoint,
    key: PublicKey,
    addrs: &[SocketAddr],
    deadline: Instant,
) -> Result<Connection, Failure> {
    for limit in ATTEMPTS {
        let target = EndpointAddr::from_parts(key, addrs.iter().map(|a| TransportAddr::Ip(*a)));
        let limit = limit.min(deadline.saturating_duration_since(Instant::now()));
        if let Ok(result) = timeout(limit, endpoint.connect(target, ALPN)).await {
            return result.map_err(Failure::Answer);
        }
    }
    Err(Failure::Silence)
}

/// Tries the addresses side by side, each from a socket of its own: one socket sends to all addresses that it has ever
/// heard of for a key, and takes the first answer for the peer's.
async fn each(socket: &Socket, key: PublicKey, addrs: &[SocketAddr], deadline: Instant) -> Option<Connection> {
    let mut tries = JoinSet::new();
    for &addr in addrs {
        let Ok(spare) = socket.spare().await else { continue };
        tries.spawn(async move {
            let result = attempts(&spare, key, &[addr], deadline).await;
            (spare, result)
        });
    }
    let mut found = None;
    while let Ok(Some(Ok((spare, result)))) = timeout_at(deadline, tries.join_next()).await {
        match result {
            Ok(connection) => {
                keep(spare, socket.inner(), &connection);
                found = Some(connection);
                break;
            }
            Err(_) => _ = tokio::spawn(async move { spare.close().await }),
        }
    }
    found
}

/// Closes a spare socket when its connection has ended, or the endpoint that it belongs to is closed.
fn keep(spare: iroh::Endpoint, of: &iroh::Endpoint, connection: &Connection) {
    let (ended, closed) = (connection.weak_handle().closed(), of.closed());
    tokio::spawn(async move {
        tokio::select! {
            _ = ended => {}
            () = closed => {}
        }
        spare.close().await;
    });
}
