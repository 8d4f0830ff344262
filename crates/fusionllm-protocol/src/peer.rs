//! Who a CompNode is and where.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// A CompNode's identity and where it may be reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRecord {
    /// Its public key (Ed25519), by which it is known.
    pub id: [u8; 32],
    /// Socket addresses, any of which may work.
    pub addrs: Vec<SocketAddr>,
}
