//! Where peers are dialled and awaited.

use std::sync::Arc;

use crate::quic::QuicEndpoint;
use crate::wire::Wire;
use crate::{Admission, BindError, ConnectError, EndpointConfig, PeerAddr, PeerId, Purpose, RelayState, Session};

/// An open endpoint. Clones are the same one. When the last one goes it is closed, without waiting until the peers know.
#[derive(Clone, Debug)]
pub struct Endpoint(Arc<dyn Wire>);

impl Endpoint {
    pub(crate) fn new(wire: impl Wire + 'static) -> Self {
        Self(Arc::new(wire))
    }

    /// Opens the socket. `admission` decides on every connection that others open. A wildcard address of either family
    /// opens one of the other, too, where the machine has it.
    ///
    /// # Errors
    /// [`BindError`] if the address cannot be had.
    pub async fn bind(config: EndpointConfig, admission: Arc<dyn Admission>) -> Result<Self, BindError> {
        Ok(Self::new(QuicEndpoint::bind(config, admission).await?))
    }

    /// Who this is.
    pub fn id(&self) -> PeerId {
        self.0.id()
    }

    /// Where this may be reached: the bound address, or if that is a wildcard the machine's own, and those
    /// advertised.
    pub fn addr(&self) -> PeerAddr {
        self.0.addr()
    }

    /// How this stands to the relay of its broker.
    pub fn relay_state(&self) -> RelayState {
        self.0.relay_state()
    }

    /// Opens a connection, at whichever of the peer's addresses the peer answers, or over the relay. Addresses that lead back here, and
    /// loopback where the peer is on another machine, are not tried. Whether the peer admits us shows on the first use
    /// of the connection.
    ///
    /// # Errors
    /// [`ConnectError`] if the peer is not reached within ten seconds or is another than asked for.
    pub async fn connect(&self, peer: &PeerAddr) -> Result<Session, ConnectError> {
        self.connect_for(peer, Purpose::Work).await
    }

    /// Opens a connection for something else than work. The peer sees what for by [`Session::purpose`].
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_for(&self, peer: &PeerAddr, purpose: Purpose) -> Result<Session, ConnectError> {
        self.0.connect(peer, purpose).await.map(Session::new)
    }

    /// The next connection that an admitted peer has opened; nothing once the endpoint is closed. May be dropped
    /// before it is done without losing a connection.
    pub async fn accept(&self) -> Option<Session> {
        self.0.accept().await.map(Session::new)
    }

    /// Closes all connections and the socket. Waits until the peers know, for a few round trips at most.
    pub async fn close(&self) {
        self.0.close().await;
    }
}
