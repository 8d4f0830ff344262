//! Which addresses this machine has, and which of a peer's are worth dialling.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// This machine's own addresses under which others may reach it: neither loopback nor of one link only.
pub(crate) fn own() -> BTreeSet<IpAddr> {
    let interfaces = netdev::get_interfaces();
    let up = interfaces.iter().filter(|interface| interface.is_up());
    up.flat_map(netdev::Interface::ip_addrs).map(|ip| ip.to_canonical()).filter(|ip| is_global(*ip)).collect()
}

/// Whether an address means the same machine to everybody on its networks.
fn is_global(ip: IpAddr) -> bool {
    let is_link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || is_link_local)
}

/// Whether an address means the same machine to everybody: it is of no network that many have.
pub(crate) fn is_public(ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    is_global(ip)
        && match ip {
            // 100.64.0.0/10 is for providers that share their addresses among customers (RFC 6598).
            IpAddr::V4(v4) => !v4.is_private() && v4.to_bits() >> 22 != u32::from_be_bytes([100, 64, 0, 0]) >> 22,
            IpAddr::V6(v6) => !v6.is_unique_local(),
        }
}

/// The sockets that an address stands for, and whether each must be there: a wildcard of one family stands for both.
pub(crate) fn families(bind: SocketAddr) -> Vec<(SocketAddr, bool)> {
    let other: IpAddr = match bind.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv6Addr::UNSPECIFIED.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv4Addr::UNSPECIFIED.into(),
        _ => return vec![(bind, true)],
    };
    vec![(bind, true), (SocketAddr::new(other, bind.port()), false)]
}

/// Where an endpoint is, for telling its own addresses and its machine's from those of others.
#[derive(Clone, Debug)]
pub(crate) struct Whereabouts {
    /// Of the machine, without loopback.
    pub(crate) machine: BTreeSet<IpAddr>,
    /// Of the endpoint's sockets; a wildcard stands for all of the machine.
    pub(crate) sockets: Vec<SocketAddr>,
}

impl Whereabouts {
    /// A peer's addresses without those that lead back to this endpoint, and without loopback where the peer is on
    /// another machine: there it names somebody else.
    pub(crate) fn worth_dialling(&self, peer: &[SocketAddr]) -> Vec<SocketAddr> {
        let is_loopback_of_use = self.reaches_only_itself() || self.is_on_this_machine(peer);
        let mut seen = BTreeSet::new();
        let is_of_use = |addr: &SocketAddr| {
            let ip = addr.ip().to_canonical();
            !self.is_own(*addr) && !ip.is_unspecified() && (is_loopback_of_use || !ip.is_loopback())
        };
        peer.iter().copied().filter(is_of_use).filter(|addr| seen.insert(*addr)).collect()
    }

    /// Whether an address is one of this endpoint's sockets.
    fn is_own(&self, addr: SocketAddr) -> bool {
        let ip = addr.ip().to_canonical();
        self.sockets.iter().any(|socket| {
            let is_here = if socket.ip().is_unspecified() {
                socket.is_ipv4() == ip.is_ipv4() && (ip.is_loopback() || self.machine.contains(&ip))
            } else {
                socket.ip().to_canonical() == ip
            };
            is_here && socket.port() == addr.port()
        })
    }

    /// No network, or sockets on loopback only.
    fn reaches_only_itself(&self) -> bool {
        self.machine.is_empty() || self.sockets.iter().all(|socket| socket.ip().to_canonical().is_loopback())
    }

    /// A peer that has one of this machine's addresses, or tells of none but loopback.
    fn is_on_this_machine(&self, peer: &[SocketAddr]) -> bool {
        let mut elsewhere = peer.iter().map(|addr| addr.ip().to_canonical()).filter(|ip| !ip.is_loopback()).peekable();
        elsewhere.peek().is_none() || elsewhere.any(|ip| self.machine.contains(&ip))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addrs(list: &[&str]) -> Vec<SocketAddr> {
        list.iter().map(|addr| addr.parse().unwrap()).collect()
    }

    fn at(machine: &[&str], sockets: &[&str]) -> Whereabouts {
        Whereabouts { machine: machine.iter().map(|ip| ip.parse().unwrap()).collect(), sockets: addrs(sockets) }
    }

    #[test]
    fn with_one_port_everywhere_the_dialler_does_not_reach_itself() {
        let own = at(&["10.77.0.1", "fd00::1"], &["0.0.0.0:7711", "[::]:7711"]);
        let peer = addrs(&["10.77.0.2:7711", "127.0.0.1:7711", "[fd00::2]:7711", "[::1]:7711"]);
        assert_eq!(own.worth_dialling(&peer), addrs(&["10.77.0.2:7711", "[fd00::2]:7711"]));
    }

    #[test]
    fn loopback_is_for_peers_on_this_machine() {
        let own = at(&["10.77.0.1"], &["0.0.0.0:40000"]);
        let here = addrs(&["10.77.0.1:7711", "127.0.0.1:7711"]);
        assert_eq!(own.worth_dialling(&here), here);
        let elsewhere =
            addrs(&["10.77.0.2:7711", "127.0.0.1:7711", "127.0.0.5:9", "[::1]:7711", "[::ffff:127.0.0.1]:7711"]);
        assert_eq!(own.worth_dialling(&elsewhere), addrs(&["10.77.0.2:7711"]));
        let only_loopback = addrs(&["127.0.0.1:7711", "[::1]:7711"]);
        assert_eq!(own.worth_dialling(&only_loopback), only_loopback);
    }

    #[test]
    fn a_machine_without_a_network_dials_loopback() {
        let peer = addrs(&["203.0.113.9:7710", "127.0.0.1:7710"]);
        assert_eq!(at(&[], &["0.0.0.0:40000"]).worth_dialling(&peer), peer);
        assert_eq!(at(&["10.0.0.1"], &["127.0.0.1:40000"]).worth_dialling(&peer), peer);
    }

    #[test]
    fn own_addresses_are_never_dialled() {
        let own = at(&["10.77.0.1"], &["0.0.0.0:7711"]);
        let peer = addrs(&["127.0.0.1:7711", "10.77.0.1:7711", "127.8.9.10:7711", "[::ffff:10.77.0.1]:7711"]);
        assert_eq!(own.worth_dialling(&peer), Vec::<SocketAddr>::new());
        // The same port at another address of this machine, or of another family, is another socket.
        let own = at(&["10.77.0.1"], &["127.0.0.2:7711"]);
        assert_eq!(own.worth_dialling(&addrs(&["127.0.0.3:7711", "127.0.0.2:7711"])), addrs(&["127.0.0.3:7711"]));
        let own = at(&["10.77.0.1", "fd00::1"], &["0.0.0.0:7711"]);
        assert_eq!(own.worth_dialling(&addrs(&["[fd00::1]:7711"])), addrs(&["[fd00::1]:7711"]));
    }

    #[test]
    fn addresses_that_many_have_are_not_public() {
        let public = ["192.0.2.2", "100.63.255.255", "100.128.0.0", "172.32.0.1", "2001:db8::1", "::ffff:8.8.8.8"];
        assert!(public.iter().all(|ip| is_public(ip.parse().unwrap())));
        let others =
            ["10.0.0.1", "172.16.0.1", "192.168.1.1", "::ffff:192.168.1.1", "100.64.0.1", "127.0.0.1", "fd00::1"];
        assert!(others.iter().all(|ip| !is_public(ip.parse().unwrap())));
    }

    #[test]
    fn addresses_of_one_link_are_not_told() {
        let global = ["10.0.0.1", "192.0.2.2", "fd00::2", "2001:db8::1"];
        assert!(global.iter().all(|ip| is_global(ip.parse().unwrap())));
        let others = ["127.0.0.1", "::1", "0.0.0.0", "::", "169.254.1.1", "fe80::1", "224.0.0.1", "ff02::1"];
        assert!(others.iter().all(|ip| !is_global(ip.parse().unwrap())));
    }
}
