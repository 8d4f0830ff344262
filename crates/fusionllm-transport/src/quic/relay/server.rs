//! The relay: takes packets from those who may use it, and hands them to others who do.
//!
//! It is iroh's, behind sockets of ours, since strangers reach these: who has not shown yet that it may be here is bounded in
//! number and in time. What is relayed is encrypted between those who talk, and comes only to those who are here.

use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{HeaderMap, Method};
use iroh::EndpointId;
use iroh_relay::KeyCache;
use iroh_relay::server::http_server::{BytesBody, Handlers, RelayService};
use iroh_relay::server::{Access, AccessControl, ClientRequest, ConnectionId, Metrics};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_rustls::TlsAcceptor;

use super::super::addresses::families;
use super::super::handshakes::Handshakes;
use super::super::throttle::Throttle;
use super::establish::establish;
use super::{discovery, tls};
use crate::{BindError, Identity, PeerId, RelayAccess, RelayStanding, RelayToken, io_reason, is_shortage};

/// A connection that has not shown by then that it may be here is closed.
const ESTABLISH_LIMIT: Duration = Duration::from_secs(10);
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 256;
/// Who use it at once.
const MOST: usize = 4096;
/// Of which the broker has not let in so many: CompNodes and commands come here before they come in.
const MOST_GUESTS: usize = 512;
/// How often it is asked whether those who are here still may be.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// Where no port is given, one must be free for TCP and for UDP, of both families.
const TRIES: usize = 20;
/// After a failure to accept, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);
/// Keys that need not be unpacked again.
const KEYS: usize = 4096;

/// Sockets of a relay, which nobody serves yet.
#[derive(Debug)]
pub struct RelayListener {
    tcp: Vec<TcpListener>,
    udp: Vec<UdpSocket>,
    port: u16,
    tls: rustls::ServerConfig,
}

/// A relay at work; dropped, it ends.
#[derive(Debug)]
pub struct RelayServer {
    tasks: JoinSet<()>,
    service: RelayService,
    discovery: Vec<noq::Endpoint>,
}

impl RelayListener {
    /// Opens the sockets: TCP and UDP of one port, which is any if it is 0. A wildcard address of either family opens those of
    /// the other, too, where the machine has it. `identity` is the broker's: by its key the relay is known.
    ///
    /// # Errors
    /// [`BindError`] if the address cannot be had.
    pub fn bind(identity: &Identity, bind: SocketAddr) -> Result<Self, BindError> {
        let failed = |reason: String| BindError::Address { addr: bind, reason };
        let tls = tls::server_config(&identity.secret_key()).map_err(|e| failed(e.to_string()))?;
        let mut tries = 0;
        loop {
            tries += 1;
            match sockets(bind) {
                Ok((tcp, udp, port)) => return Ok(Self { tcp, udp, port, tls }),
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                    if bind.port() != 0 || tries == TRIES {
                        return Err(BindError::PortInUse { addr: bind });
                    }
                }
                Err(error) if is_shortage(&error) => {
                    return Err(BindError::Shortage { addr: bind, reason: io_reason(&error).to_string() });
                }
                Err(error) => return Err(failed(io_reason(&error).to_string())),
            }
        }
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Serves those whom `access` lets in.
    ///
    /// # Errors
    /// [`BindError`] if the sockets cannot be used.
    pub fn serve(self, access: Arc<dyn RelayAccess>) -> Result<RelayServer, BindError> {
        let Self { tcp, udp, tls, .. } = self;
        let doorkeeper = Arc::new(Doorkeeper { access, inside: Mutex::default(), log: Throttle::new() });
        let (keys, metrics) = (KeyCache::new(KEYS), Arc::new(Metrics::default()));
        let service =
            RelayService::new(handlers(), HeaderMap::new(), None, keys, Arc::clone(&doorkeeper) as _, metrics);
        let (mut tasks, mut discovery) = (JoinSet::new(), Vec::new());
        for socket in udp {
            let addr = socket.local_addr().unwrap_or_else(|_| SocketAddr::new([0, 0, 0, 0].into(), 0));
            let failed = |e: std::io::Error| BindError::Address { addr, reason: io_reason(&e).to_string() };
            let endpoint = discovery::open(socket, tls.clone()).map_err(failed)?;
            tasks.spawn(discovery::run(endpoint.clone()));
            discovery.push(endpoint);
        }
        let (tls, handshakes) = (TlsAcceptor::from(Arc::new(tls)), Handshakes::default());
        for listener in tcp {
            tasks.spawn(accept(listener, tls.clone(), service.clone(), handshakes.clone()));
        }
        tasks.spawn(ask_again(doorkeeper, service.clone()));
        Ok(RelayServer { tasks, service, discovery })
    }
}

impl RelayServer {
    /// Sends all away, and ends.
    pub async fn close(mut self) {
        self.tasks.shutdown().await;
        self.service.shutdown().await;
        discovery::close(&self.discovery).await;
    }
}

impl Drop for RelayServer {
    fn drop(&mut self) {
        self.discovery.iter().for_each(discovery::begin_to_close);
    }
}

/// TCP and UDP sockets of one port, for the address, and for that of the other family if it is a wildcard.
fn sockets(bind: SocketAddr) -> std::io::Result<(Vec<TcpListener>, Vec<UdpSocket>, u16)> {
    let (mut tcp, mut udp, mut port) = (Vec::new(), Vec::new(), bind.port());
    for (mut addr, is_required) in families(bind) {
        addr.set_port(port);
        let opened = open(addr, Type::STREAM).and_then(|stream| {
            addr.set_port(stream.local_addr()?.as_socket().map_or(port, |addr| addr.port()));
            Ok((stream, open(addr, Type::DGRAM)?))
        });
        match opened {
            Ok((stream, datagram)) => {
                port = addr.port();
                tcp.push(TcpListener::from_std(stream.into())?);
                udp.push(datagram.into());
            }
            Err(error) if is_required || error.kind() == std::io::ErrorKind::AddrInUse => return Err(error),
            // The machine has no such family.
            Err(_) => {}
        }
    }
    Ok((tcp, udp, port))
}

fn open(addr: SocketAddr, kind: Type) -> std::io::Result<Socket> {
    let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
    let socket = Socket::new(Domain::for_address(addr), kind, Some(protocol))?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if kind == Type::STREAM {
        // Connections of a broker before this one that are still ending are none of ours.
        #[cfg(unix)]
        socket.set_reuse_address(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    if kind == Type::STREAM {
        socket.listen(BACKLOG)?;
    }
    Ok(socket)
}

/// What is answered besides the relay itself: whether it is there.
fn handlers() -> Handlers {
    let mut handlers = Handlers::default();
    let there = (Method::GET, iroh_relay::http::RELAY_PROBE_PATH);
    handlers.insert(
        there,
        Box::new(|_, answer: http::response::Builder| Ok(answer.body(Box::new(String::new()) as BytesBody)?)),
    );
    handlers
}

/// Takes connections in. Each shows first that it may be here.
async fn accept(listener: TcpListener, tls: TlsAcceptor, service: RelayService, handshakes: Handshakes) {
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "the relay cannot accept a connection");
                sleep(PAUSE).await;
                continue;
            }
        };
        // It will dial again.
        let Some(place) = handshakes.begin(from.ip()) else { continue };
        let (service, tls) = (service.clone(), tls.clone());
        tokio::spawn(async move {
            establish(stream, tls, service, ESTABLISH_LIMIT).await;
            drop(place);
        });
    }
}

/// Sends those away who may not be here any more.
async fn ask_again(doorkeeper: Arc<Doorkeeper>, service: RelayService) {
    let mut times = interval(ASK_AGAIN);
    times.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        times.tick().await;
        for (connection, peer) in doorkeeper.strangers() {
            tracing::info!(peer = %peer_id(peer), "may not use the relay any more");
            service.clients().disconnect(peer, Some(connection));
        }
    }
}

fn peer_id(id: EndpointId) -> PeerId {
    PeerId::from_bytes(*id.as_bytes())
}

/// Knows who is here, and by what.
#[derive(Debug)]
struct Doorkeeper {
    access: Arc<dyn RelayAccess>,
    inside: Mutex<HashMap<ConnectionId, (EndpointId, Option<RelayToken>)>>,
    log: Throttle,
}

impl Doorkeeper {
    fn inside(&self) -> MutexGuard<'_, HashMap<ConnectionId, (EndpointId, Option<RelayToken>)>> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn standing(&self, peer: EndpointId, token: Option<&RelayToken>) -> RelayStanding {
        self.access.standing(peer_id(peer), token)
    }

    fn strangers(&self) -> Vec<(ConnectionId, EndpointId)> {
        let inside = self.inside();
        let is_stranger =
            |peer, token: &Option<RelayToken>| self.standing(peer, token.as_ref()) == RelayStanding::Stranger;
        inside
            .iter()
            .filter(|(_, (peer, token))| is_stranger(*peer, token))
            .map(|(at, (peer, _))| (*at, *peer))
            .collect()
    }

    /// Why somebody stays out; nothing if it may come in.
    fn obstacle(&self, peer: EndpointId, token: Option<&RelayToken>) -> Option<&'static str> {
        let standing = self.standing(peer, token);
        let inside = self.inside();
        let guests = || {
            let is_guest = |(peer, token): &&(EndpointId, Option<RelayToken>)| {
                self.standing(*peer, token.as_ref()) == RelayStanding::Guest
            };
            inside.values().filter(is_guest).count()
        };
        match standing {
            RelayStanding::Stranger => Some("no valid ticket of this broker"),
            RelayStanding::Member | RelayStanding::Guest if inside.len() >= MOST => Some("the relay is full"),
            RelayStanding::Guest if guests() >= MOST_GUESTS => Some("too many wait to be let in"),
            RelayStanding::Member | RelayStanding::Guest => None,
        }
    }
}

impl AccessControl for Doorkeeper {
    async fn on_connect(&self, request: &ClientRequest) -> Access {
        let (peer, token) = (request.endpoint_id(), request.auth_token());
        let token = token.as_deref().and_then(RelayToken::from_text);
        if let Some(reason) = self.obstacle(peer, token.as_ref()) {
            if let Some(not_shown) = self.log.pass() {
                tracing::warn!(peer = %peer_id(peer), reason, not_shown, "refused at the relay");
            }
            return Access::Deny { reason: Some(reason.to_owned()) };
        }
        self.inside().insert(request.connection_id(), (peer, token));
        Access::Allow
    }

    fn on_disconnect(&self, _peer: EndpointId, connection: ConnectionId) {
        self.inside().remove(&connection);
    }
}
