//! The relay of a broker, as those see it who use it.

use std::fmt;
use std::net::IpAddr;

use data_encoding::HEXLOWER;

use crate::{PeerId, Secret, Ticket};

/// What a token is made for, and in which form.
const TOKEN: &str = "fusionllm relay token 1";

/// What a ticket's holder shows to the relay: it follows from the ticket's secret, and does not tell it.
///
/// Tokens are compared by their hashes, so that the time it takes tells nothing of them.
#[derive(Clone)]
pub struct RelayToken {
    bytes: [u8; 32],
    hash: [u8; 32],
}

impl RelayToken {
    /// That of a ticket's secret.
    pub fn of(secret: &Secret) -> Self {
        Self::of_hash(blake3::hash(secret.as_bytes()).as_bytes())
    }

    /// That of a secret of which only the BLAKE3 hash is known.
    pub fn of_hash(hash: &[u8; 32]) -> Self {
        Self::new(blake3::derive_key(TOKEN, hash))
    }

    fn new(bytes: [u8; 32]) -> Self {
        Self { bytes, hash: *blake3::hash(&bytes).as_bytes() }
    }

    pub(crate) fn to_text(&self) -> String {
        HEXLOWER.encode(&self.bytes)
    }

    pub(crate) fn from_text(text: &str) -> Option<Self> {
        HEXLOWER.decode(text.as_bytes()).ok()?.try_into().ok().map(Self::new)
    }
}

impl PartialEq for RelayToken {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash
    }
}

impl Eq for RelayToken {}

impl PartialOrd for RelayToken {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for RelayToken {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.hash.cmp(&other.hash)
    }
}

impl fmt::Debug for RelayToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RelayToken(not shown)")
    }
}

/// Where a relay is, whose it is, and what it is shown.
#[derive(Clone, Debug)]
pub struct Relay {
    /// The key that the relay must have: its broker's.
    pub key: PeerId,
    /// Where it may be, in no order; wrong ones may be among them.
    pub ips: Vec<IpAddr>,
    /// Its port, of TCP and of UDP.
    pub port: u16,
    /// What it is shown.
    pub token: RelayToken,
}

impl Relay {
    /// That of the broker that made the ticket, if it has one.
    pub fn by(ticket: &Ticket) -> Option<Self> {
        let mut ips: Vec<IpAddr> = ticket.broker.addrs.iter().map(|addr| addr.ip().to_canonical()).collect();
        ips.sort_unstable();
        ips.dedup();
        let (key, token) = (ticket.broker.id, RelayToken::of(&ticket.secret));
        ticket.relay.map(|port| Self { key, ips, port, token })
    }
}

/// What somebody is to a relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayStanding {
    /// One who was let in by the broker.
    Member,
    /// One who holds a ticket that admits, and was not let in yet.
    Guest,
    /// Anybody else.
    Stranger,
}

/// Decides who may use a relay. Asked on every connection, and again while it lasts.
pub trait RelayAccess: Send + Sync + fmt::Debug {
    /// What the peer is, who has proved its key and shows this, if anything.
    fn standing(&self, peer: PeerId, token: Option<&RelayToken>) -> RelayStanding;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_follows_from_the_secret_and_does_not_tell_it() {
        let secret = Secret::generate();
        let token = RelayToken::of(&secret);
        assert_eq!(token, RelayToken::of_hash(blake3::hash(secret.as_bytes()).as_bytes()));
        assert_ne!(token, RelayToken::of(&Secret::generate()));
        assert_eq!(RelayToken::from_text(&token.to_text()).unwrap(), token);
        assert!(RelayToken::from_text("00ff").is_none() && RelayToken::from_text("x").is_none());
        assert!(!token.to_text().contains(&HEXLOWER.encode(secret.as_bytes())));
        assert_eq!(format!("{token:?}"), "RelayToken(not shown)");
    }
}
