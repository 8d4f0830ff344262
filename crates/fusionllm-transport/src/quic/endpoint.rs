//! The socket from which peers are dialled and on which they are awaited.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use iroh::RelayMode;
use iroh::SecretKey;
use iroh::endpoint::{AfterHandshakeOutcome, BindOpts, Connection, EndpointHooks, PortmapperConfig, Side, presets};
use tokio::sync::{Mutex, mpsc};

use super::addresses::{self, Whereabouts};
use super::connection::QuicConnection;
use super::dial::{self, CONNECT_LIMIT, Failure};
use super::doorway::Doorway;
use super::throttle::Throttle;
use super::{accept, closing, settings};
use crate::endpoint::{CongestionControl, EndpointConfig};
use crate::error::chain;
use crate::wire::{Later, Wire};
use crate::{Admission, Admit, BindError, ConnectError, PeerAddr, PeerId, Session, io_reason, is_shortage};

/// Both ends must speak the same.
pub(crate) const ALPN: &[u8] = b"fusionllm/1";
/// Of a connection that is there to be measured, and for nothing else.
pub(crate) const PROBE_ALPN: &[u8] = b"fusionllm-probe/1";
/// Connections that wait to be accepted.
const ACCEPT_QUEUE: usize = 64;
/// Close code of a refused peer.
pub(crate) const REFUSED: u32 = 403;

/// The sockets of one identity.
#[derive(Debug)]
pub(super) struct Socket {
    inner: iroh::Endpoint,
    secret: SecretKey,
    bind: SocketAddr,
    congestion: CongestionControl,
    #[cfg(test)]
    spares: std::sync::Mutex<Vec<iroh::Endpoint>>,
}

impl Socket {
    pub(super) fn inner(&self) -> &iroh::Endpoint {
        &self.inner
    }

    /// Another one of the same identity, on any port, to dial from.
    pub(super) async fn spare(&self) -> Result<iroh::Endpoint, BindError> {
        let bind = SocketAddr::new(self.bind.ip(), 0);
        let spare = open(bind, builder(self.secret.clone(), self.congestion)).await;
        #[cfg(test)]
        self.spares.lock().unwrap().extend(spare.as_ref().ok().cloned());
        spare
    }

    /// All that there ever were.
    #[cfg(test)]
    pub(crate) fn spares(&self) -> Vec<iroh::Endpoint> {
        self.spares.lock().unwrap().clone()
    }

    /// Where it is bound; nothing once it is closed.
    fn whereabouts(&self) -> Whereabouts {
        Whereabouts { machine: addresses::own(), sockets: self.inner.bound_sockets() }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        closing::close_later(self.inner.clone());
    }
}

/// An open endpoint; dropped, it is closed without waiting until the peers know.
#[derive(Debug)]
pub(crate) struct QuicEndpoint {
    socket: Socket,
    id: PeerId,
    advertise: Vec<SocketAddr>,
    incoming: Mutex<mpsc::Receiver<Session>>,
}

impl QuicEndpoint {
    /// Opens the socket.
    pub(crate) async fn bind(config: EndpointConfig, admission: Arc<dyn Admission>) -> Result<Self, BindError> {
        let EndpointConfig { identity, bind, advertise, congestion } = config;
        let secret = identity.secret_key();
        let builder = builder(secret.clone(), congestion).alpns(vec![ALPN.to_vec(), PROBE_ALPN.to_vec()]);
        let inner = open(bind, builder.hooks(AdmitIncoming::new(admission.clone()))).await?;
        closing::remember(&inner);
        let (sender, receiver) = mpsc::channel(ACCEPT_QUEUE);
        tokio::spawn(accept::run(inner.clone(), admission, Doorway::default(), sender));
        let socket = Socket {
            inner,
            secret,
            bind,
            congestion,
            #[cfg(test)]
            spares: Default::default(),
        };
        Ok(Self { socket, id: identity.id(), advertise, incoming: Mutex::new(receiver) })
    }

    async fn connect_for(&self, peer: &PeerAddr, alpn: &'static [u8]) -> Result<Session, ConnectError> {
        let PeerAddr { id, addrs } = peer;
        if addrs.is_empty() {
            return Err(ConnectError::NoAddress { peer: *id });
        }
        let key = iroh::PublicKey::from_bytes(id.as_bytes()).map_err(|_| ConnectError::NotAKey { peer: *id })?;
        let tried = self.socket.whereabouts().worth_dialling(addrs);
        if tried.is_empty() {
            return Err(ConnectError::OnlyOwn { peer: *id, addrs: addrs.clone() });
        }
        match dial::dial(&self.socket, key, &tried, alpn).await {
            Ok(connection) => {
                let session = Session::new(QuicConnection::new(connection, None));
                // Whoever was dialled by key is known.
                session.admitted();
                Ok(session)
            }
            Err(Failure::Answer(error)) => Err(ConnectError::Failed { peer: *id, addrs: tried, reason: chain(&error) }),
            Err(Failure::Silence) => {
                let limit_s = CONNECT_LIMIT.as_secs();
                Err(ConnectError::Unreachable { peer: *id, addrs: tried, limit_s })
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

    fn connect<'a>(&'a self, peer: &'a PeerAddr, is_probe: bool) -> Later<'a, Result<Session, ConnectError>> {
        Box::pin(self.connect_for(peer, if is_probe { PROBE_ALPN } else { ALPN }))
    }

    fn accept(&self) -> Later<'_, Option<Session>> {
        Box::pin(async { self.incoming.lock().await.recv().await })
    }

    fn close(&self) -> Later<'_, ()> {
        Box::pin(self.socket.inner.close())
    }
}

fn loopback(ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
}

fn builder(secret: SecretKey, congestion: CongestionControl) -> iroh::endpoint::Builder {
    iroh::Endpoint::builder(presets::Minimal)
        .secret_key(secret)
        .clear_ip_transports()
        .relay_mode(RelayMode::Disabled)
        .portmapper_config(PortmapperConfig::Disabled)
        .transport_config(settings::transport_config(congestion))
}

/// The sockets for an address, and whether each must be there.
fn sockets(bind: SocketAddr) -> Vec<(SocketAddr, bool)> {
    let other: IpAddr = match bind.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv6Addr::UNSPECIFIED.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv4Addr::UNSPECIFIED.into(),
        _ => return vec![(bind, true)],
    };
    vec![(bind, true), (SocketAddr::new(other, bind.port()), false)]
}

async fn open(bind: SocketAddr, builder: iroh::endpoint::Builder) -> Result<iroh::Endpoint, BindError> {
    let failed = |reason: String| BindError::Address { addr: bind, reason };
    let mut builder = builder;
    for (addr, is_required) in sockets(bind) {
        let options = BindOpts::default().set_is_required(is_required);
        builder = builder.bind_addr_with_opts(addr, options).map_err(|e| failed(e.to_string()))?;
    }
    builder.bind().await.map_err(|error| match io_of(&error) {
        Some(io) if io.kind() == std::io::ErrorKind::AddrInUse => BindError::PortInUse { addr: bind },
        Some(io) if is_shortage(io) => BindError::Shortage { addr: bind, reason: io_reason(io).to_string() },
        _ => failed(chain(&error)),
    })
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

/// What the operating system said, if it did.
fn io_of<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a std::io::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            // One that carries another says itself nothing of the system.
            return io.get_ref().and_then(|inner| io_of(inner)).or(Some(io));
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::Identity;

    /// On any port of this machine.
    pub(crate) async fn socket() -> Socket {
        let (bind, congestion) = ("127.0.0.1:0".parse().unwrap(), CongestionControl::Cubic);
        let secret = Identity::generate().secret_key();
        let inner = open(bind, builder(secret.clone(), congestion).alpns(vec![ALPN.to_vec()])).await.unwrap();
        Socket { inner, secret, bind, congestion, spares: Default::default() }
    }
}
