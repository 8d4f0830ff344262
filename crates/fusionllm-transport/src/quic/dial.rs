//! How a peer is reached at one of several addresses, some of which may be stale, cut off, or somebody else's.

use std::net::SocketAddr;
use std::time::Duration;

use iroh::endpoint::{ConnectError as IrohError, Connection, ConnectionError};
use iroh::{EndpointAddr, PublicKey, RelayUrl, TransportAddr};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use super::addresses::is_public;
use super::closing;
use super::settings::CONNECT_LIMIT;
use super::socket::Socket;
use crate::RelayState;

/// How long each attempt lasts. A handshake that gets no answer asks again ever more rarely, by the end only every few
/// seconds; a new attempt asks at once, so that a link that is back is found. The later ones give a very long way time.
const ATTEMPTS: [Duration; 4] =
    [Duration::from_millis(1_500), Duration::from_millis(2_000), Duration::from_millis(2_500), Duration::from_secs(4)];

/// Why nobody was reached.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Nobody answered in time.
    Silence,
    /// Somebody answered, but not as it should be.
    Answer(IrohError),
}

/// Connects to `key` at whichever address answers first, or over the relay. If somebody else answers there, each address is
/// tried by itself.
///
/// Behind two routers there are the same addresses, and what one of them means here somebody else may have. So where the
/// relay can be used, the first attempt leaves such addresses out: once the peer is reached, both look for the shortest way,
/// and whoever answers there must be the peer.
pub(crate) async fn dial(
    socket: &Socket,
    key: PublicKey,
    addrs: &[SocketAddr],
    alpn: &'static [u8],
) -> Result<Connection, Failure> {
    let deadline = Instant::now() + CONNECT_LIMIT;
    let over = socket.relay();
    let public: Vec<SocketAddr> = addrs.iter().copied().filter(|addr| is_public(addr.ip())).collect();
    let first = if socket.relay_state() == RelayState::Connected { &public } else { addrs };
    let failure = match attempts(socket.inner(), key, [first, addrs], over, alpn, deadline).await {
        Err(Failure::Answer(error)) if !is_refusal(&error) => Failure::Answer(error),
        result => return result,
    };
    tracing::debug!(?failure, ?addrs, "somebody else answers at an address of the peer, trying each by itself");
    each(socket, key, addrs, alpn, deadline).await.ok_or(failure)
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
    [first, all]: [&[SocketAddr]; 2],
    over: Option<&RelayUrl>,
    alpn: &'static [u8],
    deadline: Instant,
) -> Result<Connection, Failure> {
    for (number, limit) in ATTEMPTS.into_iter().enumerate() {
        let addrs = if number == 0 { first } else { all };
        let relay = over.cloned().map(TransportAddr::Relay);
        let target = EndpointAddr::from_parts(key, addrs.iter().map(|a| TransportAddr::Ip(*a)).chain(relay));
        let limit = limit.min(deadline.saturating_duration_since(Instant::now()));
        if let Ok(result) = timeout(limit, endpoint.connect(target, alpn)).await {
            return result.map_err(Failure::Answer);
        }
    }
    Err(Failure::Silence)
}

/// Tries the addresses side by side, each from a socket of its own: one socket sends to all addresses that it has ever
/// heard of for a key, and takes the first answer for the peer's.
async fn each(
    socket: &Socket,
    key: PublicKey,
    addrs: &[SocketAddr],
    alpn: &'static [u8],
    deadline: Instant,
) -> Option<Connection> {
    let mut spares = Spares::default();
    let mut tries = JoinSet::new();
    for &addr in addrs {
        let Ok(spare) = socket.spare().await else { continue };
        let place = spares.add(spare.clone());
        tries.spawn(async move { (place, attempts(&spare, key, [&[addr]; 2], None, alpn, deadline).await) });
    }
    while let Ok(Some(Ok((place, result)))) = timeout_at(deadline, tries.join_next()).await {
        match result {
            Ok(connection) => {
                if let Some(spare) = spares.take(place) {
                    keep(spare, socket.inner(), &connection);
                }
                return Some(connection);
            }
            // Not only when all others have ended.
            Err(_) => spares.take(place).into_iter().for_each(closing::close_later),
        }
    }
    None
}

/// Sockets of tries. Whoever ends the tries, and however, those that are still here are closed: one that is only dropped
/// goes on in the background.
#[derive(Default)]
struct Spares(Vec<Option<iroh::Endpoint>>);

impl Spares {
    fn add(&mut self, spare: iroh::Endpoint) -> usize {
        self.0.push(Some(spare));
        self.0.len() - 1
    }

    fn take(&mut self, place: usize) -> Option<iroh::Endpoint> {
        self.0.get_mut(place)?.take()
    }
}

impl Drop for Spares {
    fn drop(&mut self) {
        self.0.drain(..).flatten().for_each(closing::close_later);
    }
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

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::sync::Arc;

    use tokio::time::sleep;

    use super::*;
    use crate::quic::settings::ALPN;
    use crate::quic::socket::tests::socket;

    async fn all_close(spares: &[iroh::Endpoint]) {
        for spare in spares {
            timeout(Duration::from_secs(20), spare.closed()).await.unwrap();
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn sockets_of_tries_are_closed_however_the_tries_end() {
        let (dialler, peer) = (Arc::new(socket().await), socket().await);
        let (bound, key) = (peer.inner().bound_sockets()[0], peer.inner().id());
        let silent: Vec<UdpSocket> = (0..2).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
        let mut addrs: Vec<SocketAddr> = silent.iter().map(|s| s.local_addr().unwrap()).collect();
        let accepting = peer.inner().clone();
        tokio::spawn(async move {
            while let Some(incoming) = accepting.accept().await {
                tokio::spawn(async move { incoming.accept().unwrap().await.unwrap().closed().await });
            }
        });

        // Cut off by whoever waits for it.
        let (from, to) = (Arc::clone(&dialler), addrs.clone());
        let deadline = Instant::now() + CONNECT_LIMIT;
        let tries = tokio::spawn(async move { each(&from, key, &to, ALPN, deadline).await });
        while dialler.spares().len() < 2 {
            sleep(Duration::from_millis(5)).await;
        }
        tries.abort();
        all_close(&dialler.spares()).await;

        // One wins, the others are given up.
        addrs.insert(1, bound);
        let connection = each(&dialler, key, &addrs, ALPN, Instant::now() + CONNECT_LIMIT).await.unwrap();
        let mut spares = dialler.spares().split_off(2);
        assert_eq!(spares.len(), 3);
        let winner = spares.remove(1);
        all_close(&spares).await;
        assert!(!winner.is_closed());
        drop(connection);
        all_close(&[winner]).await;
    }
}
