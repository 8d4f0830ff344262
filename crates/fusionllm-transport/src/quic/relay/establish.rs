//! How somebody comes in at the relay: TLS, a request for its protocol, and the proof of a key.
//!
//! iroh's own limit ends with the request, after which it would wait for the proof without end.

use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use iroh_relay::server::http_server::{RelayService, RelayServiceWithNotify};
use iroh_relay::server::streams::MaybeTlsStream;
use socket2::{SockRef, Socket};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

/// Between two looks at whether somebody who has shown no key yet is still there.
const LOOK: Duration = Duration::from_millis(250);

/// Takes a connection in. Resolves once the relay has it, or it is closed: because the other end closed it, or since it had
/// not shown within `limit` that it may be here.
pub(super) async fn establish(stream: TcpStream, tls: TlsAcceptor, service: RelayService, limit: Duration) {
    // The stream goes to a task of the relay's, which cannot be ended; the connection can, by this.
    let Ok(socket) = SockRef::from(&stream).try_clone() else { return };
    let established = Arc::new(Notify::new());
    let service = RelayServiceWithNotify::new(service, Arc::clone(&established));
    let mut is_established = pin!(established.notified());
    is_established.as_mut().enable();
    let comes_in = async {
        let Ok(stream) = tls.accept(stream).await else { return };
        let stream = TokioIo::new(MaybeTlsStream::Tls(stream));
        if let Err(error) = http1::Builder::new().serve_connection(stream, service).with_upgrades().await {
            tracing::debug!(%error, "a connection to the relay broke off");
            return;
        }
        while is_open(&socket) {
            sleep(LOOK).await;
        }
    };
    let shown = timeout(limit, async {
        tokio::select! {
            () = is_established => {}
            () = comes_in => {}
        }
    });
    if shown.await.is_err() {
        // One that is closed already has nothing to shut.
        let _ = socket.shutdown(Shutdown::Both);
    }
}

/// Whether the other end has not closed it yet.
fn is_open(socket: &Socket) -> bool {
    match socket.peek(&mut [MaybeUninit::uninit()]) {
        Ok(bytes) => bytes > 0,
        Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use iroh_relay::KeyCache;
    use iroh_relay::http::{ProtocolVersion, RELAY_PATH};
    use iroh_relay::server::http_server::Handlers;
    use iroh_relay::server::{AllowAll, Metrics};
    use rustls::pki_types::ServerName;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsConnector;

    use super::super::tls::{client_config, server_config};
    use super::*;
    use crate::Identity;

    /// What whoever dials the relay sends after TLS, and where it then stands still.
    async fn stands_still(says: &str) -> Vec<u8> {
        let identity = Identity::generate();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(server_config(&identity.secret_key()).unwrap()));
        let (keys, metrics) = (KeyCache::new(8), Arc::new(Metrics::default()));
        let service = RelayService::new(Handlers::default(), HeaderMap::new(), None, keys, Arc::new(AllowAll), metrics);
        let serves = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            establish(stream, acceptor, service, Duration::from_millis(300)).await;
        });
        let connector = TlsConnector::from(Arc::new(client_config(identity.id()).unwrap()));
        let stream = TcpStream::connect(addr).await.unwrap();
        let name = ServerName::try_from("relay.invalid").unwrap();
        let mut stream = connector.connect(name, stream).await.unwrap();
        stream.write_all(says.as_bytes()).await.unwrap();
        let mut heard = Vec::new();
        // Whether it ends in order does not matter.
        let ends = timeout(Duration::from_secs(30), stream.read_to_end(&mut heard)).await;
        assert!(ends.is_ok(), "nobody closes it");
        serves.await.unwrap();
        heard
    }

    #[tokio::test]
    async fn who_asks_for_nothing_is_sent_away() {
        assert!(stands_still("").await.is_empty());
    }

    #[tokio::test]
    async fn who_asks_for_the_relay_and_shows_no_key_is_sent_away() {
        let versions = ProtocolVersion::all_joined();
        let request = format!(
            "GET {RELAY_PATH} HTTP/1.1\r\nHost: relay\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Protocol: {versions}\r\n\r\n"
        );
        let heard = stands_still(&request).await;
        assert!(heard.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&heard));
    }

    #[tokio::test]
    async fn who_goes_before_its_time_leaves_no_place_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let socket = SockRef::from(&accepted).try_clone().unwrap();
        assert!(is_open(&socket));
        drop(stream);
        while is_open(&socket) {
            sleep(Duration::from_millis(5)).await;
        }
    }
}
