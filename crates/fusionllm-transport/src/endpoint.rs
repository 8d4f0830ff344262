//! A socket from which peers are dialled and on which they are awaited.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use iroh::endpoint::{
    AfterHandshakeOutcome, ConnectingError, Connection, EndpointHooks, IdleTimeout, Incoming, PortmapperConfig,
    QuicTransportConfig, Side, VarInt, presets,
};
use iroh::{EndpointAddr, RelayMode, TransportAddr, Watcher};
use noq_proto::congestion::{Bbr3Config, CubicConfig};
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;

use crate::congestion::LinkRateConfig;
use crate::{Admission, Admit, BindError, ConnectError, Identity, PeerAddr, PeerId, Session};

/// Both ends must speak the same.
const ALPN: &[u8] = b"fusionllm/1";
/// A connection that is not made by then fails; a handshake takes two round trips.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// A silent peer is lost after this long.
const IDLE_LIMIT: Duration = Duration::from_secs(10);
/// Well within [`IDLE_LIMIT`] even when one or two are lost.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// A stream's receive window. noq 1.4 ends a connection on which a stream buffers more than 2048 packets unread,
/// so this must stay below 2048 packets of 1150 bytes.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
/// Unconfirmed bytes per connection: 2.5 Gbit/s over 100 ms.
const SEND_WINDOW_BYTES: u64 = 32 << 20;
/// Streams that a peer may have open at once, of each kind. A job has two per boundary edge.
const MAX_STREAMS: u32 = 1024;
/// Connections that wait to be accepted.
const ACCEPT_QUEUE: usize = 64;
/// How long a machine may take to list its own addresses.
const ADDRESS_LIMIT: Duration = Duration::from_secs(3);
/// Close code of a refused peer.
const REFUSED: u32 = 403;

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

/// An open endpoint. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Endpoint {
    inner: iroh::Endpoint,
    id: PeerId,
    bind: SocketAddr,
    advertise: Vec<SocketAddr>,
    incoming: Arc<Mutex<mpsc::Receiver<Session>>>,
}

impl Endpoint {
    /// Opens the socket. `admission` decides on every connection that others open.
    ///
    /// # Errors
    /// [`BindError`] if the address cannot be had.
    pub async fn bind(config: EndpointConfig, admission: Arc<dyn Admission>) -> Result<Self, BindError> {
        let EndpointConfig { identity, bind, advertise, congestion } = config;
        let failed = |reason: String| BindError::Address { addr: bind, reason };
        let builder = iroh::Endpoint::builder(presets::Minimal)
            .secret_key(identity.secret_key())
            .alpns(vec![ALPN.to_vec()])
            .clear_ip_transports()
            .relay_mode(RelayMode::Disabled)
            .portmapper_config(PortmapperConfig::Disabled)
            .transport_config(transport_config(congestion))
            .hooks(AdmitIncoming(admission))
            .bind_addr(bind)
            .map_err(|e| failed(e.to_string()))?;
        let inner = builder.bind().await.map_err(|error| match io_kind(&error) {
            Some(std::io::ErrorKind::AddrInUse) => BindError::PortInUse { addr: bind },
            _ => failed(chain(&error)),
        })?;
        if bind.ip().is_unspecified() {
            // A machine without a network still reaches itself.
            let mut addrs = inner.watch_addr();
            let found = async { while addrs.get().ip_addrs().next().is_none() && addrs.updated().await.is_ok() {} };
            let _ = timeout(ADDRESS_LIMIT, found).await;
        }
        let (sender, receiver) = mpsc::channel(ACCEPT_QUEUE);
        tokio::spawn(accept_all(inner.clone(), sender));
        let id = identity.id();
        Ok(Self { inner, id, bind, advertise, incoming: Arc::new(Mutex::new(receiver)) })
    }

    /// Who this is.
    pub fn id(&self) -> PeerId {
        self.id
    }

    /// Where this may be reached: the bound address, or if that is a wildcard the machine's own, and those
    /// advertised.
    pub fn addr(&self) -> PeerAddr {
        let bound = self.inner.bound_sockets();
        let mut addrs: BTreeSet<SocketAddr> = self.advertise.iter().copied().collect();
        if self.bind.ip().is_unspecified() {
            addrs.extend(self.inner.addr().ip_addrs().copied());
            addrs.extend(bound.iter().map(|addr| SocketAddr::new(loopback(addr.ip()), addr.port())));
        } else {
            addrs.extend(bound);
        }
        PeerAddr { id: self.id, addrs: addrs.into_iter().filter(|a| !a.ip().is_unspecified()).collect() }
    }

    /// Opens a connection. Whether the peer admits us shows on the first use of it.
    ///
    /// # Errors
    /// [`ConnectError`] if the peer is not reached within ten seconds or is another than asked for.
    pub async fn connect(&self, peer: &PeerAddr) -> Result<Session, ConnectError> {
        let PeerAddr { id, addrs } = peer;
        if addrs.is_empty() {
            return Err(ConnectError::NoAddress { peer: *id });
        }
        let key = iroh::PublicKey::from_bytes(id.as_bytes()).map_err(|_| ConnectError::NotAKey { peer: *id })?;
        let target = EndpointAddr::from_parts(key, addrs.iter().map(|a| TransportAddr::Ip(*a)));
        match timeout(CONNECT_LIMIT, self.inner.connect(target, ALPN)).await {
            Ok(Ok(connection)) => Ok(Session::new(connection)),
            Ok(Err(error)) => Err(ConnectError::Failed { peer: *id, addrs: addrs.clone(), reason: chain(&error) }),
            Err(_) => {
                let limit_s = CONNECT_LIMIT.as_secs();
                Err(ConnectError::Unreachable { peer: *id, addrs: addrs.clone(), limit_s })
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
        self.inner.close().await;
    }
}

fn loopback(ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
}

fn transport_config(congestion: CongestionControl) -> QuicTransportConfig {
    let builder = QuicTransportConfig::builder()
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(VarInt::MAX)
        .send_window(SEND_WINDOW_BYTES)
        .max_concurrent_uni_streams(MAX_STREAMS.into())
        .max_concurrent_bidi_streams(MAX_STREAMS.into())
        .max_idle_timeout(IdleTimeout::try_from(IDLE_LIMIT).ok())
        .keep_alive_interval(KEEP_ALIVE);
    match congestion {
        CongestionControl::LinkRate => builder.congestion_controller_factory(Arc::new(LinkRateConfig)),
        CongestionControl::Bbr3 => builder.congestion_controller_factory(Arc::new(Bbr3Config::default())),
        CongestionControl::Cubic => builder.congestion_controller_factory(Arc::new(CubicConfig::default())),
    }
    .build()
}

/// Handshakes run side by side, so that a slow or hostile one delays nobody.
async fn accept_all(endpoint: iroh::Endpoint, sessions: mpsc::Sender<Session>) {
    while let Some(incoming) = endpoint.accept().await {
        let sessions = sessions.clone();
        tokio::spawn(async move {
            match timeout(CONNECT_LIMIT, handshake(incoming)).await {
                // If nobody accepts any more, the connection closes with the session.
                Ok(Ok(connection)) => drop(sessions.send(Session::new(connection)).await),
                Ok(Err(error)) => tracing::debug!(error = chain(&error), "incoming connection failed"),
                Err(_) => tracing::debug!("incoming connection did not complete its handshake"),
            }
        });
    }
}

async fn handshake(incoming: Incoming) -> Result<Connection, ConnectingError> {
    incoming.accept()?.await
}

/// Asks [`Admission`] on connections that others open.
#[derive(Debug)]
struct AdmitIncoming(Arc<dyn Admission>);

impl EndpointHooks for AdmitIncoming {
    async fn after_handshake<'a>(&'a self, connection: &'a Connection) -> AfterHandshakeOutcome {
        if connection.side() == Side::Client {
            return AfterHandshakeOutcome::Accept;
        }
        let peer = PeerId::from_bytes(*connection.remote_id().as_bytes());
        match self.0.admit(peer) {
            Admit::Accept => AfterHandshakeOutcome::Accept,
            Admit::Refuse { reason } => {
                tracing::warn!(%peer, reason, "refused a connection");
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

/// An error with its causes, in one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut words = vec![error.to_string()];
    let mut next = error.source();
    while let Some(error) = next {
        let text = error.to_string();
        if words.last().is_none_or(|last| !last.contains(&text)) {
            words.push(text);
        }
        next = error.source();
    }
    words.join(": ")
}
