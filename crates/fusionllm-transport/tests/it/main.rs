//! The transport on real sockets of 127.0.0.1.
#![expect(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod admission;
mod closing;
mod doorway;
mod probe;
mod reach;
mod relay;
mod sessions;

use std::net::SocketAddr;
use std::sync::Arc;

use fusionllm_transport::{Admission, AdmitAll, Endpoint, EndpointConfig, Identity, Session};

fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

async fn endpoint(admission: impl Admission + 'static) -> Endpoint {
    Endpoint::bind(EndpointConfig::new(Identity::generate(), any_port()), Arc::new(admission)).await.unwrap()
}

/// Two endpoints and both ends of a connection between them.
struct Pair {
    dialler: Endpoint,
    acceptor: Endpoint,
    from: Session,
    to: Session,
}

async fn pair() -> Pair {
    let (dialler, acceptor) = (endpoint(AdmitAll).await, endpoint(AdmitAll).await);
    let from = dialler.connect(&acceptor.addr()).await.unwrap();
    let to = acceptor.accept().await.unwrap();
    Pair { dialler, acceptor, from, to }
}
