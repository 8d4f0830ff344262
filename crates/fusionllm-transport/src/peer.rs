//! Who a peer is and where it may be reached.

use std::fmt;
use std::net::SocketAddr;

use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};

/// A peer's public key (Ed25519).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PeerId([u8; 32]);

impl PeerId {
    /// From the key's bytes; whether they are a key is found out on connecting.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The key's bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// The first ten hexadecimal digits: enough to tell machines apart in a log.
impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, ..] = self.0;
        f.write_str(&HEXLOWER.encode(&[a, b, c, d, e]))
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerId({self})")
    }
}

/// A peer and the socket addresses at which it may be reached, any of which may work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerAddr {
    /// Its public key.
    pub id: PeerId,
    /// UDP addresses, in no order; stale ones may be among them.
    pub addrs: Vec<SocketAddr>,
}
