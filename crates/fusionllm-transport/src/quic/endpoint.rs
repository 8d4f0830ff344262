//! The endpoint from which peers are dialled and on which they are awaited.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use iroh::endpoint::{AfterHandshakeOutcome, Connection, EndpointHooks, Side};
use tokio::sync::{Mutex, mpsc};

use super::accept;
use super::addresses::Whereabouts;
use super::connection::QuicConnection;
use super::dial::{self, Failure};
use super::doorway::Doorway;
use super::settings::{CONNECT_LIMIT, REFUSED, alpn};
use super::socket::Socket;
use super::throttle::Throttle;
use crate::error::chain;
use crate::wire::{Later, SharedConnection, Wire};
use crate::{Admission, Admit, BindError, ConnectError, EndpointConfig, PeerAddr, PeerId, Purpose, RelayState};

/// Connections that wait to be accepted.
const ACCEPT_QUEUE: usize = 64;

/// An open endpoint; dropped, it is closed without waiting until the peers know.
#[derive(Debug)]
pub(crate) struct QuicEndpoint {
    socket: Socket,
    id: PeerId,
    advertise: Vec<SocketAddr>,
    incoming: Mutex<mpsc::Receiver<SharedConnection>>,
}

impl QuicEndpoint {
    /// Opens the socket.
    pub(crate) async fn bind(config: EndpointConfig, admission: Arc<dyn Admission>) -> Result<Self, BindError> {
        let EndpointConfig { identity, bind, advertise, relay, congestion } = config;
        let hooks = AdmitIncoming::new(admission.clone());
        let socket = Socket::open(identity.secret_key(), bind, congestion, hooks, relay, &advertise).await?;
        let (sender, receiver) = mpsc::channel(ACCEPT_QUEUE);
        tokio::spawn(accept::run(socket.inner().clone(), admission, Doorway::default(), sender));
        Ok(Self { socket, id: identity.id(), advertise, incoming: Mutex::new(receiver) })
    }

    async fn connect_for(&self, peer: &PeerAddr, alpn: &'static [u8]) -> Result<SharedConnection, ConnectError> {
        let PeerAddr { id, addrs } = peer;
        let is_relayed = self.socket.relay().is_some();
        if addrs.is_empty() && !is_relayed {
            return Err(ConnectError::NoAddress { peer: *id });
        }
        let key = iroh::PublicKey::from_bytes(id.as_bytes()).map_err(|_| ConnectError::NotAKey { peer: *id })?;
        let tried = self.socket.whereabouts().worth_dialling(addrs);
        if tried.is_empty() && !is_relayed {
            return Err(ConnectError::OnlyOwn { peer: *id, addrs: addrs.clone() });
        }
        match dial::dial(&self.socket, key, &tried, alpn).await {
            // Whoever was dialled by key is known.
            Ok(connection) => Ok(QuicConnection::of_member(connection)),
            Err(Failure::Answer(error)) => Err(ConnectError::Failed { peer: *id, addrs: tried, reason: chain(&error) }),
            Err(Failure::Silence) => {
                let (limit_s, relay) = (CONNECT_LIMIT.as_secs(), self.socket.relay_state());
                Err(ConnectError::Unreachable { peer: *id, addrs: tried, limit_s, relay })
            }
        }
    }
}

impl Wire for QuicEndpoint {
    fn id(&self) -> PeerId {
        self.id
    }

    fn addr(&self) -> PeerAddr {
        let Whereabouts { machine, sockets } = self.socket.whereabouts();
        let mut addrs: BTreeSet<SocketAddr> = self.advertise.iter().copied().collect();
        for bound in sockets {
            if bound.ip().is_unspecified() {
                let own = machine.iter().copied().chain([loopback(bound.ip())]);
                addrs.extend(
                    own.filter(|ip| ip.is_ipv4() == bound.is_ipv4()).map(|ip| SocketAddr::new(ip, bound.port())),
                );
            } else {
                addrs.insert(bound);
            }
        }
        PeerAddr { id: self.id, addrs: addrs.into_iter().filter(|a| !a.ip().is_unspecified()).collect() }
    }

    fn relay_state(&self) -> RelayState {
        self.socket.relay_state()
    }

    fn connect<'a>(
        &'a self,
        peer: &'a PeerAddr,
        purpose: Purpose,
    ) -> Later<'a, Result<SharedConnection, ConnectError>> {
        Box::pin(self.connect_for(peer, alpn(purpose)))
    }

    fn accept(&self) -> Later<'_, Option<SharedConnection>> {
        Box::pin(async { self.incoming.lock().await.recv().await })
    }

    fn close(&self) -> Later<'_, ()> {
        Box::pin(self.socket.inner().close())
    }
}

fn loopback(ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
}

/// Asks [`Admission`] on connections that others open.
#[derive(Debug)]
struct AdmitIncoming {
    admission: Arc<dyn Admission>,
    log: Throttle,
}

impl AdmitIncoming {
    fn new(admission: Arc<dyn Admission>) -> Self {
        Self { admission, log: Throttle::new() }
    }
}

impl EndpointHooks for AdmitIncoming {
    async fn after_handshake<'a>(&'a self, connection: &'a Connection) -> AfterHandshakeOutcome {
        if connection.side() == Side::Client {
            return AfterHandshakeOutcome::Accept;
        }
        let peer = PeerId::from_bytes(*connection.remote_id().as_bytes());
        match self.admission.admit(peer) {
            Admit::Accept | Admit::OnTrial => AfterHandshakeOutcome::Accept,
            Admit::Refuse { reason } => {
                if let Some(not_shown) = self.log.pass() {
                    tracing::warn!(%peer, reason, not_shown, "refused a connection");
                }
                AfterHandshakeOutcome::Reject { error_code: REFUSED.into(), reason: reason.into_bytes() }
            }
        }
    }
}
