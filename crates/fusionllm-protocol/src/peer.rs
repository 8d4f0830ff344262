//! Who a CompNode is and where.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// A CompNode's identity and where it may be reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRecord {
    /// Public key.
    pub id: [u8; 32],
    /// Socket addresses, any of which may work.
    pub addrs: Vec<SocketAddr>,
}
