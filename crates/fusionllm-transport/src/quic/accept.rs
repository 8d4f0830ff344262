//! Connections that others open.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use iroh::endpoint::{ConnectingError, Connection, Incoming, IncomingAddr};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::connection::QuicConnection;
use super::doorway::Doorway;
use super::handshakes::Handshakes;
use super::settings::{CONNECT_LIMIT, REFUSED};
use crate::error::chain;
use crate::wire::SharedConnection;
use crate::{Admission, Admit, PeerId};

/// First byte of what stands for the address of somebody who comes over a relay.
const RELAYED: u64 = 0xfe;

/// Handshakes run side by side, so that a slow or hostile one delays nobody.
pub(crate) async fn run(
    endpoint: iroh::Endpoint,
    admission: Arc<dyn Admission>,
    doorway: Doorway,
    connections: mpsc::Sender<SharedConnection>,
) {
    let handshakes = Handshakes::default();
    while let Some(incoming) = endpoint.accept().await {
        let from = address(&incoming);
        let Some(place) = handshakes.begin(from) else {
            // It will ask again.
            incoming.ignore();
            continue;
        };
        if handshakes.are_many() && !incoming.remote_addr_validated() {
            // It fails only for addresses that are validated.
            let _ = incoming.retry();
            continue;
        }
        let (admission, doorway, connections) = (admission.clone(), doorway.clone(), connections.clone());
        tokio::spawn(async move {
            let result = timeout(CONNECT_LIMIT, handshake(incoming)).await;
            drop(place);
            match result {
                Ok(Ok(connection)) => {
                    if let Some(connection) = enter(connection, from, &*admission, &doorway) {
                        // If nobody accepts any more, it closes as it is dropped.
                        let _ = connections.send(connection).await;
                    }
                }
                Ok(Err(error)) => tracing::debug!(error = chain(&error), "incoming connection failed"),
                Err(_) => tracing::debug!("incoming connection did not complete its handshake"),
            }
        });
    }
}

async fn handshake(incoming: Incoming) -> Result<Connection, ConnectingError> {
    incoming.accept()?.await
}

fn address(incoming: &Incoming) -> IpAddr {
    match incoming.remote_addr() {
        IncomingAddr::Ip(addr) => addr.ip(),
        // The relay has seen it prove its key: each is a place of its own, of a network that nobody has.
        IncomingAddr::Relay { endpoint_id, .. } => {
            let [a, b, c, d, e, f, g, ..] = *endpoint_id.as_bytes();
            let key = u64::from_be_bytes([0, a, b, c, d, e, f, g]);
            Ipv6Addr::from_bits(u128::from(RELAYED << 56 | key) << 64).into()
        }
        // There are no others.
        _ => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Gives a connection the room that its peer may have.
fn enter(
    connection: Connection,
    from: IpAddr,
    admission: &dyn Admission,
    doorway: &Doorway,
) -> Option<SharedConnection> {
    match admission.admit(PeerId::from_bytes(*connection.remote_id().as_bytes())) {
        Admit::Accept => Some(QuicConnection::of_member(connection)),
        Admit::OnTrial => {
            let stay = doorway.enter(from, &connection);
            Some(QuicConnection::on_trial(connection, stay))
        }
        Admit::Refuse { reason } => {
            // It was removed since the handshake.
            connection.close(REFUSED.into(), reason.as_bytes());
            None
        }
    }
}
