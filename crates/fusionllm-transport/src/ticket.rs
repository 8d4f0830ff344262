//! Tickets: where the broker is and the secret that admits.

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE32_NOPAD;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use crate::{PeerAddr, TicketError};

const PREFIX: &str = "fusionllm";
/// Of a ticket that names a relay.
const FORM: u8 = 2;
/// Of any other, which earlier releases read, too.
const FORM_WITHOUT_RELAY: u8 = 1;
const CHECKSUM_BYTES: usize = 4;

/// What a ticket holder shows to be let in.
#[derive(Clone, Serialize, Deserialize)]
pub struct Secret([u8; 32]);

impl Secret {
    /// A new secret, drawn at random.
    pub fn generate() -> Self {
        Self(rand::random())
    }

    /// The secret of these bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes that a ticket holds.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Whether both are the same, in a time that does not tell how much of them is.
    pub fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(not shown)")
    }
}

/// What a broker prints for those who may join it: one word to copy.
#[derive(Clone, Debug)]
pub struct Ticket {
    /// The broker's key, and the addresses at which it may be reached.
    pub broker: PeerAddr,
    /// What its holder shows to be let in.
    pub secret: Secret,
    /// Port of the broker's relay, of TCP and UDP, at the broker's addresses; nothing if it has none.
    pub relay: Option<u16>,
}

/// `fusionllm`, then base32 of form, content and CRC-32.
impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let content = match self.relay {
            Some(port) => postcard::to_stdvec(&(FORM, &self.broker, &self.secret, port)),
            None => postcard::to_stdvec(&(FORM_WITHOUT_RELAY, &self.broker, &self.secret)),
        };
        let mut bytes = content.map_err(|_| fmt::Error)?;
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        write!(f, "{PREFIX}{}", BASE32_NOPAD.encode(&bytes).to_ascii_lowercase())
    }
}

impl FromStr for Ticket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, TicketError> {
        let code = text.strip_prefix(PREFIX).ok_or(TicketError::Prefix { prefix: PREFIX })?;
        let strange = |c: char| !matches!(c, 'a'..='z' | '2'..='7');
        if let Some((before, _)) = code.split_once(strange) {
            return Err(TicketError::Character { position: PREFIX.len() + before.chars().count() + 1 });
        }
        let decoded = BASE32_NOPAD.decode(code.to_ascii_uppercase().as_bytes());
        let bytes = decoded.map_err(|_| TicketError::Damaged)?;
        let content = bytes.len().checked_sub(CHECKSUM_BYTES).and_then(|end| bytes.split_at_checked(end));
        let (content, checksum) = content.ok_or(TicketError::Damaged)?;
        if crc32fast::hash(content).to_le_bytes() != checksum {
            return Err(TicketError::Damaged);
        }
        let (&form, content) = content.split_first().ok_or(TicketError::Damaged)?;
        if ![FORM, FORM_WITHOUT_RELAY].contains(&form) {
            return Err(TicketError::Version { version: form, known: FORM });
        }
        let damaged = |_| TicketError::Damaged;
        let ((broker, secret), rest): ((PeerAddr, Secret), _) = postcard::take_from_bytes(content).map_err(damaged)?;
        let relay = if form == FORM { Some(postcard::from_bytes(rest).map_err(damaged)?) } else { None };
        Ok(Self { broker, secret, relay })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Identity;

    fn ticket() -> Ticket {
        let addrs = vec!["192.0.2.7:7710".parse().unwrap(), "[2001:db8::7]:7710".parse().unwrap()];
        let relay = rand::random::<bool>().then(rand::random);
        Ticket { broker: PeerAddr { id: Identity::generate().id(), addrs }, secret: Secret::generate(), relay }
    }

    /// Of release 0.1, which knew no relays.
    #[test]
    fn a_ticket_without_a_relay_is_as_before() {
        let before = "fusionllmaeaqcaibaeaqcaibaeaqcaibaeaqcaibaeaqcaibaeaqcaibaeaqcaiayaaaeb46hqbaeaqcaibaeaqcaibaeaqcaibaea\
                      qcaibaeaqcaibaeaqcaibafs2jwkka";
        let broker =
            PeerAddr { id: crate::PeerId::from_bytes([1; 32]), addrs: vec!["192.0.2.7:7710".parse().unwrap()] };
        let ticket = Ticket { broker, secret: Secret::from_bytes([2; 32]), relay: None };
        assert_eq!(ticket.to_string(), before);
    }

    #[test]
    fn a_ticket_survives_the_way_through_text() {
        for _ in 0..50 {
            let ticket = ticket();
            let read: Ticket = ticket.to_string().parse().unwrap();
            assert_eq!((&read.broker, read.relay), (&ticket.broker, ticket.relay));
            assert!(read.secret.matches(&ticket.secret));
            assert!(!read.secret.matches(&Secret::generate()));
        }
    }

    #[test]
    fn every_damage_is_found() {
        let text = ticket().to_string();
        for at in 0..text.len() {
            for other in ['a', 'q', '3', '-', 'A'] {
                let mut damaged: Vec<char> = text.chars().collect();
                if damaged[at] == other {
                    continue;
                }
                damaged[at] = other;
                let damaged: String = damaged.into_iter().collect();
                assert!(damaged.parse::<Ticket>().is_err(), "`{other}` at {at}");
            }
            assert!(text[..at].parse::<Ticket>().is_err(), "cut at {at}");
        }
    }

    #[test]
    fn errors_say_what_would_be_right() {
        let error = |text: &str| text.parse::<Ticket>().unwrap_err().to_string();
        assert!(error("hello").starts_with("not a ticket: it should begin with `fusionllm`"));
        assert!(error("fusionllmab1").contains("position 12"));
        let mut bytes = vec![9u8];
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        let newer = format!("{PREFIX}{}", BASE32_NOPAD.encode(&bytes).to_ascii_lowercase());
        assert_eq!(error(&newer), "the ticket has form 9, this build reads form 2: use the broker's release");
    }

    #[test]
    fn a_secret_is_not_shown() {
        let ticket = ticket();
        let shown = format!("{ticket:?}");
        assert!(shown.contains("not shown") && !shown.contains(&format!("{:?}", ticket.secret.as_bytes())));
    }
}
