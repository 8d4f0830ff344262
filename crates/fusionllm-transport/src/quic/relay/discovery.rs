//! Says to each node from where its packets come, which behind a router it cannot know: to the port that it is told there,
//! others can dial it (QUIC address discovery).

use std::net::UdpSocket;
use std::sync::Arc;
use std::time::Duration;

use noq::crypto::rustls::QuicServerConfig;
use noq::{EndpointConfig, Incoming, TokioRuntime};
use tokio::time::timeout;

use super::super::handshakes::{Handshake, Handshakes};

/// As iroh names it.
const ALPN: &[u8] = b"/iroh-qad/0";
/// Connections that are open at once.
const MOST: usize = 4096;
/// Of one network: behind one router there may be a whole site.
const MOST_OF_A_NETWORK: usize = 256;
/// There is nothing to say but where somebody is.
const NO_STREAMS: u32 = 0;
/// Close code of a relay that ends.
const CLOSED: u32 = 1;
/// How long closing may take.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// A socket that answers.
pub(super) fn open(socket: UdpSocket, mut tls: rustls::ServerConfig) -> std::io::Result<noq::Endpoint> {
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let tls = QuicServerConfig::try_from(tls).map_err(std::io::Error::other)?;
    let mut config = noq::ServerConfig::with_crypto(Arc::new(tls));
    let mut transport = noq::TransportConfig::default();
    transport
        .max_concurrent_uni_streams(NO_STREAMS.into())
        .max_concurrent_bidi_streams(NO_STREAMS.into())
        .datagram_receive_buffer_size(None)
        .send_observed_address_reports(true);
    config.transport_config(Arc::new(transport));
    noq::Endpoint::new(EndpointConfig::default(), Some(config), socket, Arc::new(TokioRuntime))
}

/// Answers until the endpoint is closed.
pub(super) async fn run(endpoint: noq::Endpoint) {
    let open = Handshakes::of(MOST, MOST_OF_A_NETWORK);
    while let Some(incoming) = endpoint.accept().await {
        let Some(place) = open.begin(incoming.remote_address().ip()) else {
            incoming.ignore();
            continue;
        };
        if open.are_many() && !incoming.remote_address_validated() {
            // It fails only for addresses that are validated.
            let _ = incoming.retry();
            continue;
        }
        tokio::spawn(answer(incoming, place));
    }
}

/// Sends away those who are connected, without waiting until they know.
pub(super) fn begin_to_close(endpoint: &noq::Endpoint) {
    endpoint.close(CLOSED.into(), b"the relay ends");
}

/// The same, and waits a little.
pub(super) async fn close(endpoints: &[noq::Endpoint]) {
    endpoints.iter().for_each(begin_to_close);
    for endpoint in endpoints {
        let _ = timeout(CLOSE_LIMIT, endpoint.wait_idle()).await;
    }
}

/// Whoever is connected is told where it is, now and when that changes.
async fn answer(incoming: Incoming, place: Handshake) {
    if let Ok(connection) = incoming.await {
        connection.closed().await;
    }
    drop(place);
}
