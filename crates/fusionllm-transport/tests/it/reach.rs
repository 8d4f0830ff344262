//! Which of a peer's addresses leads to it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fusionllm_transport::{AdmitAll, ConnectError, Endpoint, EndpointConfig, Identity, PeerAddr};

use crate::{any_port, endpoint};

async fn at(bind: &str) -> Endpoint {
    let config = EndpointConfig::new(Identity::generate(), bind.parse().unwrap());
    Endpoint::bind(config, Arc::new(AdmitAll)).await.unwrap()
}

/// Says something both ways.
async fn talk(from: &Endpoint, to: &Endpoint, addr: &PeerAddr) {
    let session = from.connect(addr).await.unwrap();
    assert_eq!(session.peer(), to.id());
    let accepted = to.accept().await.unwrap();
    assert_eq!(accepted.peer(), from.id());
    let (mut sink, mut source) = session.open_bi().await.unwrap();
    sink.send(b"there").await.unwrap();
    let (mut answer, mut question) = accepted.accept_bi().await.unwrap();
    assert_eq!(question.recv().await.unwrap().unwrap(), b"there");
    answer.send(b"back").await.unwrap();
    assert_eq!(source.recv().await.unwrap().unwrap(), b"back");
}

fn has_ipv6() -> bool {
    UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok()
}

/// Every node on the same port, each telling of loopback, too, where another key answers.
#[tokio::test(flavor = "multi_thread")]
async fn somebody_else_at_one_address_does_not_hide_the_peer_at_another() {
    let somebody = at("127.0.0.1:0").await;
    let port = somebody.addr().addrs[0].port();
    let dialler = at(&format!("127.0.0.2:{port}")).await;
    let peer = at(&format!("127.0.0.3:{port}")).await;
    let told = |ips: &[&str]| PeerAddr {
        id: peer.id(),
        addrs: ips.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), port)).collect(),
    };
    let began = Instant::now();
    talk(&dialler, &peer, &told(&["127.0.0.1", "127.0.0.3"])).await;
    // Also the second time, when the wrong address is known.
    talk(&dialler, &peer, &told(&["127.0.0.3", "127.0.0.1"])).await;
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    // The dialler's own address does no harm.
    talk(&dialler, &peer, &told(&["127.0.0.2", "127.0.0.3"])).await;
    let only_wrong = at("127.0.0.4:0").await.connect(&told(&["127.0.0.1", "127.0.0.1"])).await.unwrap_err();
    assert!(matches!(only_wrong, ConnectError::Failed { .. }), "{only_wrong}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_tells_only_of_our_own_addresses_is_named() {
    let (dialler, peer) = (at("0.0.0.0:0").await, at("127.0.0.1:0").await);
    let addrs: Vec<SocketAddr> = dialler.addr().addrs;
    let error = dialler.connect(&PeerAddr { id: peer.id(), addrs }).await.unwrap_err();
    assert!(matches!(error, ConnectError::OnlyOwn { .. }), "{error}");
    assert!(error.to_string().contains("all this endpoint's own"), "{error}");
}

/// A silent address beside the right one costs no time.
#[tokio::test(flavor = "multi_thread")]
async fn a_stale_address_does_not_delay() {
    let silent = UdpSocket::bind(any_port()).unwrap();
    let mut took = Vec::new();
    // On a machine that is busy with other things one may take longer, but not all of them.
    for _ in 0..10 {
        let (dialler, peer) = (endpoint(AdmitAll).await, endpoint(AdmitAll).await);
        let mut addr = peer.addr();
        addr.addrs.insert(0, silent.local_addr().unwrap());
        let began = Instant::now();
        talk(&dialler, &peer, &addr).await;
        took.push(began.elapsed());
        if began.elapsed() < Duration::from_secs(1) {
            return;
        }
    }
    panic!("{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wildcard_of_either_family_speaks_both() {
    if !has_ipv6() {
        return;
    }
    for wildcard in ["0.0.0.0:0", "[::]:0"] {
        for (loopback, other) in [("127.0.0.1", "[::1]:0"), ("::1", "127.0.0.1:0")] {
            let (broker, client) = (at(wildcard).await, at("0.0.0.0:0").await);
            let ip: IpAddr = loopback.parse().unwrap();
            let is_told = |addr: &&SocketAddr| addr.ip() == ip;
            let told = broker.addr().addrs.iter().find(is_told).copied().unwrap();
            talk(&client, &broker, &PeerAddr { id: broker.id(), addrs: vec![told] }).await;
            // And the other way round: one that listens on one family only is reached from a wildcard.
            let one_family = at(other).await;
            talk(&broker, &one_family, &one_family.addr()).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wildcard_tells_of_all_addresses_of_both_families() {
    let own: Vec<IpAddr> = netdev::get_interfaces().iter().filter(|i| i.is_up()).flat_map(|i| i.ip_addrs()).collect();
    for wildcard in ["0.0.0.0:0", "[::]:0"] {
        if !has_ipv6() && wildcard.starts_with('[') {
            continue;
        }
        let told: Vec<IpAddr> = at(wildcard).await.addr().addrs.iter().map(SocketAddr::ip).collect();
        for ip in &own {
            let is_link_local = match ip {
                IpAddr::V4(ip) => ip.is_link_local(),
                IpAddr::V6(ip) => ip.is_unicast_link_local(),
            };
            let is_other_loopback =
                ip.is_loopback() && ![[127, 0, 0, 1].into(), Ipv6Addr::LOCALHOST.into()].contains(ip);
            assert_eq!(told.contains(ip), !is_link_local && !is_other_loopback, "{wildcard}: {ip} of {told:?}");
        }
    }
}
