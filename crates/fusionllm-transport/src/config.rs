//! What an endpoint is made of.

use std::net::SocketAddr;

use crate::{Identity, Relay};

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
    /// The key by which peers know it.
    pub identity: Identity,
    /// Where it listens; port 0 takes any.
    pub bind: SocketAddr,
    /// Further addresses under which it is reached, such as a forwarded port.
    pub advertise: Vec<SocketAddr>,
    /// Over which it is reached, too, and dials.
    pub relay: Option<Relay>,
    /// How fast its connections send.
    pub congestion: CongestionControl,
}

impl EndpointConfig {
    /// An endpoint that advertises only its own addresses. One that can be reached from this machine alone uses CUBIC.
    pub fn new(identity: Identity, bind: SocketAddr) -> Self {
        let congestion = if bind.ip().is_loopback() { CongestionControl::Cubic } else { CongestionControl::LinkRate };
        Self { identity, bind, advertise: Vec::new(), relay: None, congestion }
    }
}
