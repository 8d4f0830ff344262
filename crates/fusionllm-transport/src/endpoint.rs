//! A socket from which peers are dialled and on which they are awaited.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use iroh::RelayMode;
use iroh::SecretKey;
use iroh::endpoint::{AfterHandshakeOutcome, BindOpts, Connection, EndpointHooks, PortmapperConfig, Side, presets};
use tokio::sync::{Mutex, mpsc};

use crate::addresses::{self, Whereabouts};
use crate::dial::{self, CONNECT_LIMIT, Failure};
use crate::doorway::Doorway;
use crate::error::chain;
use crate::throttle::Throttle;
use crate::{Admission, Admit, BindError, ConnectError, Identity, PeerAddr, PeerId, Session};
use crate::{accept, closing, settings};

/// Both ends must speak the same.
pub(crate) const ALPN: &[u8] = b"fusionllm/1";
/// Of a connection that is there to be measured, and for nothing else.
pub(crate) const PROBE_ALPN: &[u8] = b"fusionllm-probe/1";
/// Connections that wait to be accepted.
const ACCEPT_QUEUE: usize = 64;
/// Close code of a refused peer.
pub(crate) const REFUSED: u32 = 403;

/// How fast a connection may send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CongestionControl {
    /// By the link's measured speed: made for bursts with pauses over long links, with loss or without.
    #[default]
    LinkRate,
    /// BBR version 3, to compare with.
    Bbr3,
    /// CUBIC (RFC 9438): steadier between processes of one machine.
    Cubic,
}

/// What an endpoint is made of.
#[derive(Debug)]
pub struct EndpointConfig {
    /// Who it is.
    pub identity: Identity,
    /// Where it listens; port 0 takes any.
    pub bind: SocketAddr,
    /// Further addresses under which it is reached, such as a forwarded port.
    pub advertise: Vec<SocketAddr>,
    /// How fast its connections send.
    pub congestion: CongestionControl,
}

impl EndpointConfig {
    /// An endpoint that advertises only its own addresses. One that can be reached from this machine alone uses CUBIC.
    pub fn new(identity: Identity, bind: SocketAddr) -> Self {
        let congestion = if bind.ip().is_loopback() { CongestionControl::Cubic } else { CongestionControl::LinkRate };
        Self { identity, bind, advertise: Vec::new(), congestion }
    }
}

/// The sockets of one identity.
#[derive(Debug)]
pub(crate) struct Socket {
    inner: iroh::Endpoint,
    secret: SecretKey,
    bind: SocketAddr,
    congestion: CongestionControl,
    #[cfg(test)]
    spares: std::sync::Mutex<Vec<iroh::Endpoint>>,
}

impl Socket {
    pub(crate) fn inner(&self) -> &iroh::Endpoint {
        &self.inner
    }

    /// Another one of the same identity, on any port, to dial from.
    pub(crate) async fn spare(&self) -> Result<iroh::Endpoint, BindError> {
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

/// An open endpoint. Clones are the same one. When the last one goes it is closed, without waiting until the peers know.
#[derive(Clone, Debug)]
pub struct Endpoint {
    socket: Arc<Socket>,
    id: PeerId,
    advertise: Vec<SocketAddr>,
    incoming: Arc<Mutex<mpsc::Receiver<Session>>>,
}

impl Endpoint {
    /// Opens the socket. `admission` decides on every connection that others open. A wildcard address of either family
    /// opens one of the other, too, where the machine has it.
    ///
    /// # Errors
    /// [`BindError`] if the address cannot be had.
    pub async fn bind(config: EndpointConfig, admission: Arc<dyn Admission>) -> Result<Self, BindError> {
        let EndpointConfig { identity, bind, advertise, congestion } = config;
        let secret = identity.secret_key();
        let builder = builder(secret.clone(), congestion).alpns(vec![ALPN.to_vec(), PROBE_ALPN.to_vec()]);
        let inner = open(bind, builder.hooks(AdmitIncoming::new(admission.clone()))).await?;
        closing::remember(&inner);
        let (sender, receiver) = mpsc::channel(ACCEPT_QUEUE);
        tokio::spawn(accept::run(inner.clone(), admission, Doorway::default(), sender));
        let socket = Arc::new(Socket {
            inner,
            secret,
            bind,
            congestion,
            #[cfg(test)]
            spares: Default::default(),
        });
        Ok(Self { socket, id: identity.id(), advertise, incoming: Arc::new(Mutex::new(receiver)) })
    }

    /// Who this is.
    pub fn id(&self) -> PeerId {
        self.id
    }

    /// Where this may be reached: the bound address, or if that is a wildcard the machine's own, and those
    /// advertised.
    pub fn addr(&self) -> PeerAddr {
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

    /// Opens a connection, at whichever of the peer's addresses the peer answers. Addresses that lead back here, and
    /// loopback where the peer is on another machine, are not tried. Whether the peer admits us shows on the first use
    /// of the connection.
    ///
    /// # Errors
    /// [`ConnectError`] if the peer is not reached within ten seconds or is another than asked for.
    pub async fn connect(&self, peer: &PeerAddr) -> Result<Session, ConnectError> {
        self.connect_for(peer, ALPN).await
    }

    /// Opens a connection to [`probe`](crate::probe) over. The peer knows it from others by [`Session::is_probe`].
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_to_probe(&self, peer: &PeerAddr) -> Result<Session, ConnectError> {
        self.connect_for(peer, PROBE_ALPN).await
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
                let session = Session::new(connection, None);
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

    /// The next connection that an admitted peer has opened; nothing once the endpoint is closed. May be dropped
    /// before it is done without losing a connection.
    pub async fn accept(&self) -> Option<Session> {
        self.incoming.lock().await.recv().await
    }

    /// Closes all connections and the socket. Waits until the peers know, for a few round trips at most.
    pub async fn close(&self) {
        self.socket.inner.close().await;
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
    builder.bind().await.map_err(|error| match io_kind(&error) {
        Some(std::io::ErrorKind::AddrInUse) => BindError::PortInUse { addr: bind },
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
fn io_kind(error: &(dyn std::error::Error + 'static)) -> Option<std::io::ErrorKind> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return Some(io.kind());
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// On any port of this machine.
    pub(crate) async fn socket() -> Socket {
        let (bind, congestion) = ("127.0.0.1:0".parse().unwrap(), CongestionControl::Cubic);
        let secret = Identity::generate().secret_key();
        let inner = open(bind, builder(secret.clone(), congestion).alpns(vec![ALPN.to_vec()])).await.unwrap();
        Socket { inner, secret, bind, congestion, spares: Default::default() }
    }
}
