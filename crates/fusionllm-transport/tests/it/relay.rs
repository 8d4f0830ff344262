//! Peers that reach each other over a relay, and who may use it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fusionllm_transport::{
    AdmitAll, ConnectError, Endpoint, EndpointConfig, Identity, PeerAddr, PeerId, Relay, RelayAccess, RelayListener,
    RelayServer, RelayStanding, RelayState, RelayToken, Secret, Session, answer_probe, probe,
};
use tokio::time::{sleep, timeout};

/// Lets those in who show this.
#[derive(Debug)]
struct ByToken(Mutex<RelayToken>);

impl RelayAccess for ByToken {
    fn standing(&self, _peer: PeerId, token: Option<&RelayToken>) -> RelayStanding {
        match token.is_some_and(|token| *self.0.lock().unwrap() == *token) {
            true => RelayStanding::Guest,
            false => RelayStanding::Stranger,
        }
    }
}

struct Site {
    identity: Identity,
    server: Option<RelayServer>,
    access: Arc<ByToken>,
    relay: Relay,
}

impl Site {
    /// A relay on both families of loopback.
    fn new() -> Self {
        Self::at("0.0.0.0:0")
    }

    fn at(bind: &str) -> Self {
        let (identity, token) = (Identity::generate(), RelayToken::of(&Secret::generate()));
        let listener = RelayListener::bind(&identity, bind.parse().unwrap()).unwrap();
        let ips = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let relay = Relay { key: identity.id(), ips, port: listener.port(), token: token.clone() };
        let access = Arc::new(ByToken(Mutex::new(token)));
        let server = Some(listener.serve(access.clone()).unwrap());
        Self { identity, server, access, relay }
    }

    async fn close(&mut self) {
        self.server.take().unwrap().close().await;
    }

    async fn open_again(&mut self) {
        let bind = (Ipv4Addr::UNSPECIFIED, self.relay.port).into();
        // The sockets of the one before are let go of a moment after it was closed.
        let mut tries = 0..100;
        let listener = loop {
            match RelayListener::bind(&self.identity, bind) {
                Ok(listener) => break listener,
                Err(error) => assert!(tries.next().is_some(), "{error}"),
            }
            sleep(Duration::from_millis(50)).await;
        };
        self.server = Some(listener.serve(self.access.clone()).unwrap());
    }

    async fn endpoint(&self, bind: &str) -> Endpoint {
        endpoint(bind, self.relay.clone()).await
    }
}

async fn endpoint(bind: &str, relay: Relay) -> Endpoint {
    let config =
        EndpointConfig { relay: Some(relay), ..EndpointConfig::new(Identity::generate(), bind.parse().unwrap()) };
    Endpoint::bind(config, Arc::new(AdmitAll)).await.unwrap()
}

fn only_key(endpoint: &Endpoint) -> PeerAddr {
    PeerAddr { id: endpoint.id(), addrs: Vec::new() }
}

async fn state(endpoint: &Endpoint, is: impl Fn(&RelayState) -> bool) -> RelayState {
    let reached = async {
        loop {
            let state = endpoint.relay_state();
            if is(&state) {
                return state;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    let result = timeout(Duration::from_secs(60), reached).await;
    result.map_err(|_| endpoint.relay_state()).unwrap()
}

async fn connected(endpoint: &Endpoint) {
    state(endpoint, |state| *state == RelayState::Connected).await;
}

async fn meet(from: &Endpoint, to: &Endpoint, addr: &PeerAddr) -> (Session, Session) {
    let session = from.connect(addr).await.unwrap();
    let accepted = to.accept().await.unwrap();
    assert_eq!((session.peer(), accepted.peer()), (to.id(), from.id()));
    (session, accepted)
}

/// Says something both ways, much of it.
async fn talk(from: &Session, to: &Session) {
    let said = vec![7u8; 1 << 20];
    let there = async {
        let (mut sink, mut source) = from.open_bi().await.unwrap();
        sink.send(&said).await.unwrap();
        assert_eq!(source.recv().await.unwrap().unwrap(), b"heard");
    };
    let here = async {
        let (mut sink, mut source) = to.accept_bi().await.unwrap();
        assert_eq!(source.recv().await.unwrap().unwrap(), said);
        sink.send(b"heard").await.unwrap();
    };
    timeout(Duration::from_secs(60), async { tokio::join!(there, here) }).await.unwrap();
}

fn has_ipv6() -> bool {
    UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_that_know_only_keys_meet_and_find_the_direct_path() {
    let site = Site::new();
    let (a, b) = (site.endpoint("127.0.0.1:0").await, site.endpoint("127.0.0.1:0").await);
    tokio::join!(connected(&a), connected(&b));
    let (from, to) = meet(&a, &b, &only_key(&b)).await;
    talk(&from, &to).await;
    assert!(from.direct_within(Duration::from_secs(30)).await && to.direct_within(Duration::from_secs(30)).await);
    talk(&to, &from).await;
    let answering = tokio::spawn(async move { answer_probe(&to).await });
    assert!(!probe(&from).await.unwrap().is_relayed);
    drop(from);
    let _ = answering.await.unwrap();
}

/// One of them has IPv4 only, the other IPv6 only.
#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_direct_path_stays_on_the_relay_and_is_known_to() {
    if !has_ipv6() {
        eprintln!("there is no IPv6 here, by which two endpoints would have no direct path");
        return;
    }
    let site = Site::new();
    let (a, b) = (site.endpoint("127.0.0.1:0").await, site.endpoint("[::1]:0").await);
    tokio::join!(connected(&a), connected(&b));
    // What it tells of itself cannot be dialled, and does no harm.
    let (from, to) = meet(&a, &b, &b.addr()).await;
    talk(&from, &to).await;
    assert!(from.stats().is_relayed && to.stats().is_relayed);
    let answering = tokio::spawn(async move { answer_probe(&to).await });
    let measured = probe(&from).await.unwrap();
    assert!(measured.is_relayed && measured.there.bytes_per_s > 1e5, "{measured:?}");
    drop(from);
    // Whether it sees the end of the stream or of the connection first is all the same.
    let _ = answering.await.unwrap();
}

/// A router's network has the addresses that another one's has.
#[tokio::test(flavor = "multi_thread")]
async fn somebody_else_at_a_private_address_is_not_asked() {
    let site = Site::new();
    let (a, b) = (site.endpoint("127.0.0.1:0").await, site.endpoint("127.0.0.1:0").await);
    let somebody = site.endpoint("127.0.0.1:0").await;
    tokio::join!(connected(&a), connected(&b));
    let began = Instant::now();
    let (from, to) = meet(&a, &b, &PeerAddr { id: b.id(), addrs: somebody.addr().addrs }).await;
    talk(&from, &to).await;
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_get_nothing_from_the_relay() {
    let site = Site::new();
    let member = site.endpoint("127.0.0.1:0").await;
    let shown = Relay { token: RelayToken::of(&Secret::generate()), ..site.relay.clone() };
    let stranger = endpoint("127.0.0.1:0", shown).await;
    connected(&member).await;
    let refused = state(&stranger, |s| matches!(s, RelayState::Away { reason } if reason.contains("refuses"))).await;
    assert!(refused.to_string().contains("no valid ticket"), "{refused}");
    let error = stranger.connect(&only_key(&member)).await.unwrap_err();
    assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("the broker's relay is away: it refuses"), "{error}");
    // Nor can it be reached: what is relayed comes only to those who are there.
    let error = member.connect(&only_key(&stranger)).await.unwrap_err().to_string();
    assert!(error.contains("nor over the broker's relay"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_brokers_own_key_is_trusted() {
    let site = Site::new();
    let other = Relay { key: Identity::generate().id(), ..site.relay.clone() };
    let fooled = endpoint("127.0.0.1:0", other).await;
    connected(&site.endpoint("127.0.0.1:0").await).await;
    sleep(Duration::from_secs(4)).await;
    assert!(matches!(fooled.relay_state(), RelayState::Away { .. }), "{:?}", fooled.relay_state());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_use_it_any_more_is_sent_away() {
    let site = Site::new();
    let member = site.endpoint("127.0.0.1:0").await;
    connected(&member).await;
    *site.access.0.lock().unwrap() = RelayToken::of(&Secret::generate());
    state(&member, |state| matches!(state, RelayState::Away { .. })).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_relay_takes_nothing_with_it_that_is_direct_and_is_dialled_until_it_is_back() {
    let mut site = Site::new();
    let (a, b) = (site.endpoint("127.0.0.1:0").await, site.endpoint("127.0.0.1:0").await);
    tokio::join!(connected(&a), connected(&b));
    let (from, to) = meet(&a, &b, &only_key(&b)).await;
    assert!(from.direct_within(Duration::from_secs(30)).await && to.direct_within(Duration::from_secs(30)).await);
    site.close().await;
    let away = |state: &RelayState| matches!(state, RelayState::Away { .. });
    tokio::join!(state(&a, away), state(&b, away));
    // Longer than a silent connection lasts.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(12) {
        talk(&from, &to).await;
        sleep(Duration::from_millis(500)).await;
    }
    site.open_again().await;
    tokio::join!(connected(&a), connected(&b));
    from.close(0, "anew");
    let (from, to) = meet(&b, &a, &only_key(&a)).await;
    talk(&from, &to).await;
}

/// Addresses of the ticket that lead elsewhere, or nowhere, do no harm.
#[tokio::test(flavor = "multi_thread")]
async fn the_relay_is_found_among_addresses_that_mean_somebody_else() {
    let (site, other) = (Site::at("127.0.0.1:0"), Site::new());
    let deaf = std::net::TcpListener::bind(("127.0.0.2", site.relay.port)).unwrap();
    let ips: Vec<IpAddr> = ["127.0.0.2", "192.0.2.1", "127.0.0.1"].map(|ip| ip.parse().unwrap()).into();
    connected(&endpoint("127.0.0.1:0", Relay { ips: ips.clone(), ..site.relay.clone() }).await).await;
    let elsewhere = Relay { port: other.relay.port, ..site.relay.clone() };
    let lost = endpoint("127.0.0.1:0", elsewhere).await;
    sleep(Duration::from_secs(3)).await;
    assert!(matches!(lost.relay_state(), RelayState::Away { .. }));
    drop(deaf);
}
