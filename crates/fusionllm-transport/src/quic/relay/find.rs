//! At which of its addresses a relay is.
//!
//! A broker's ticket names all addresses of its machine, of which most mean nothing elsewhere, or somebody else's machine.
//! What asks for the relay gets the one at which it has just shown its key. So it takes the place of a name server: the
//! relay's name is known to nobody else, and no name server is ever asked.

use std::fmt;
use std::future::ready;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use iroh::dns::{BoxIter, DnsError, Resolver, TxtRecordData};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;

use super::tls;
use crate::Relay;

/// An answer must be there before those who ask give up, which is after three seconds.
const LIMIT: Duration = Duration::from_millis(2_700);
/// What was found is not looked for again for so long.
const KNOWN_FOR: Duration = Duration::from_secs(30);

type Answer<T> = std::pin::Pin<Box<dyn Future<Output = Result<BoxIter<T>, DnsError>> + Send + 'static>>;

/// Stands in for a name server, for the one name that there is.
pub(super) struct Finder {
    relay: Arc<Relay>,
    /// Of IPv4 and of IPv6.
    known: Arc<[Known; 2]>,
}

/// Where it was found, and when.
type Known = Mutex<Option<(Instant, IpAddr)>>;

impl Finder {
    pub(super) fn new(relay: Relay) -> Self {
        Self { relay: Arc::new(relay), known: Arc::default() }
    }

    fn look_up<T: Send + 'static>(&self, is_of: fn(IpAddr) -> Option<T>, family: usize) -> Answer<T> {
        let (relay, known) = (Arc::clone(&self.relay), Arc::clone(&self.known));
        Box::pin(async move {
            let lock = || known[family].lock().unwrap_or_else(PoisonError::into_inner);
            let fresh = lock().filter(|(at, _)| at.elapsed() < KNOWN_FOR).map(|(_, ip)| ip);
            let found = match fresh {
                Some(ip) => Some(ip),
                None => {
                    find(&relay, |ip| is_of(ip).is_some()).await.inspect(|ip| *lock() = Some((Instant::now(), *ip)))
                }
            };
            Ok(Box::new(found.and_then(is_of).into_iter()) as BoxIter<T>)
        })
    }
}

impl fmt::Debug for Finder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Finder").field("relay", &self.relay).finish_non_exhaustive()
    }
}

impl Resolver for Finder {
    fn lookup_ipv4(&self, _host: String) -> Answer<Ipv4Addr> {
        let v4 = |ip| if let IpAddr::V4(ip) = ip { Some(ip) } else { None };
        self.look_up(v4, 0)
    }

    fn lookup_ipv6(&self, _host: String) -> Answer<Ipv6Addr> {
        let v6 = |ip| if let IpAddr::V6(ip) = ip { Some(ip) } else { None };
        self.look_up(v6, 1)
    }

    fn lookup_txt(&self, _host: String) -> Answer<TxtRecordData> {
        Box::pin(ready(Ok(Box::new(std::iter::empty()) as BoxIter<TxtRecordData>)))
    }

    fn clear_cache(&self) {
        self.known.iter().for_each(|known| *known.lock().unwrap_or_else(PoisonError::into_inner) = None);
    }

    /// The network has changed: another address may be the right one.
    fn reset(&self) -> Box<dyn Resolver> {
        Box::new(Self { relay: Arc::clone(&self.relay), known: Arc::default() })
    }
}

/// The address of those that fit at which the relay is the first to show its key.
async fn find(relay: &Relay, fits: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
    let connector = TlsConnector::from(Arc::new(tls::client_config(relay.key).ok()?));
    let mut tries = JoinSet::new();
    for ip in relay.ips.iter().copied().filter(|ip| fits(*ip)) {
        let (connector, port) = (connector.clone(), relay.port);
        tries.spawn(async move {
            let stream = TcpStream::connect(SocketAddr::new(ip, port)).await.ok()?;
            connector.connect(ServerName::IpAddress(ip.into()), stream).await.ok().map(|_| ip)
        });
    }
    let first = async {
        while let Some(tried) = tries.join_next().await {
            if let Ok(Some(ip)) = tried {
                return Some(ip);
            }
        }
        None
    };
    timeout(LIMIT, first).await.ok().flatten()
}
