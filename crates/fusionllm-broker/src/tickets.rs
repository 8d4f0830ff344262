//! Who may come in, and as what: tickets by name, of whose secrets only hashes are kept.
//!
//! A function of secret, key and time; files and connections are for [`crate::server`].

use std::collections::{BTreeMap, BTreeSet};

use fusionllm_protocol::{TicketRole, TicketState, TicketSummary, is_plain_name};
use fusionllm_transport::{PeerId, RelayToken, Secret};
use serde::{Deserialize, Serialize};

use crate::TicketError;

/// Tickets that a broker knows at most.
const MOST_TICKETS: usize = 10_000;
/// Keys that are remembered of one ticket at most.
const MOST_KEYS: usize = 1000;

/// A ticket as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    role: TicketRole,
    /// BLAKE3 of the secret, in hexadecimal.
    hash: String,
    /// When it ends, in seconds since 1970.
    #[serde(default)]
    ends: Option<u64>,
    #[serde(default)]
    once: bool,
    #[serde(default)]
    revoked: bool,
    /// Whether it is one of those in the state folder, whose holder is the broker's own user.
    #[serde(default)]
    own: bool,
    /// Hashes of the tickets by which it was made: of the last one, of that by which this was made, and so on, but for
    /// those in the state folder. Names are given again, and entries go.
    #[serde(default)]
    made_by: BTreeSet<String>,
    /// Keys that came in by it. A CompNode that lost its connection comes back by the same key, even when the ticket
    /// admits nobody else any more.
    #[serde(default)]
    keys: BTreeSet<String>,
}

/// A ticket to make.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewTicket {
    pub(crate) role: TicketRole,
    /// When it ends, in seconds since 1970.
    pub(crate) ends: Option<u64>,
    pub(crate) once: bool,
    /// Whether it is one of those in the state folder.
    pub(crate) own: bool,
}

/// What became of tickets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Revoked {
    /// The one that was named, and those that were made by it.
    pub(crate) names: BTreeSet<String>,
    /// Whether it is one of those in the state folder.
    pub(crate) is_own: bool,
}

/// What somebody may do who was let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    /// Name of the ticket.
    pub(crate) ticket: String,
    /// Whether it is the broker's own user.
    pub(crate) own: bool,
    /// Whether the tickets have changed and must be written before the holder comes in.
    pub(crate) changed: bool,
}

/// All tickets, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tickets(BTreeMap<String, Entry>);

impl Tickets {
    /// Whether `peer`, who shows `secret`, may come in as `role`; if not, why.
    pub(crate) fn admit(
        &mut self,
        secret: &Secret,
        role: TicketRole,
        peer: PeerId,
        now: u64,
    ) -> Result<Grant, TicketError> {
        let shown = blake3::hash(secret.as_bytes());
        // Hashes compare in a time that does not tell how much of them is the same.
        let matches = |entry: &Entry| blake3::Hash::from_hex(&entry.hash).is_ok_and(|hash| hash == shown);
        let found = self.0.iter_mut().find(|(_, entry)| matches(entry));
        let (name, entry) = found.ok_or(TicketError::NotValid)?;
        let refused = name.clone();
        if entry.revoked {
            return Err(TicketError::Revoked { name: refused });
        }
        match (entry.role, role) {
            (TicketRole::Join, TicketRole::Operate) => return Err(TicketError::ForCompNodes { name: refused }),
            (TicketRole::Operate, TicketRole::Join) => return Err(TicketError::ForCommands { name: refused }),
            (TicketRole::Join, TicketRole::Join) | (TicketRole::Operate, TicketRole::Operate) => {}
        }
        let key = hex(peer);
        let is_back = role == TicketRole::Join && entry.keys.contains(&key);
        if !is_back {
            match entry.state(now) {
                TicketState::Valid => {}
                TicketState::Used => return Err(TicketError::Used { name: refused }),
                TicketState::Expired => return Err(TicketError::Expired { name: refused }),
                TicketState::Revoked => return Err(TicketError::Revoked { name: refused }),
            }
        }
        let is_remembered = entry.once || (entry.ends.is_some() && entry.keys.len() < MOST_KEYS);
        let changed = is_remembered && entry.keys.insert(key);
        Ok(Grant { ticket: name.clone(), own: entry.own, changed })
    }

    /// By its token at the relay, the name of each ticket that was not revoked.
    pub(crate) fn relay_tokens(&self) -> BTreeMap<RelayToken, String> {
        let valid = self.0.iter().filter(|(_, entry)| !entry.revoked);
        let token = |(name, entry): (&String, &Entry)| {
            let hash = blake3::Hash::from_hex(&entry.hash).ok()?;
            Some((RelayToken::of_hash(hash.as_bytes()), name.clone()))
        };
        valid.filter_map(token).collect()
    }

    /// Whether a ticket lets this peer come in now, or back in.
    pub(crate) fn admits(&self, name: &str, peer: PeerId, now: u64) -> bool {
        let admits = |entry: &Entry| {
            let is_back = entry.role == TicketRole::Join && !entry.revoked && entry.keys.contains(&hex(peer));
            entry.state(now) == TicketState::Valid || is_back
        };
        self.0.get(name).is_some_and(admits)
    }

    /// Makes a ticket under `name`, or if it is not given, under a free one, for who came in by the ticket `by`. Gives the
    /// name.
    pub(crate) fn create(
        &mut self,
        name: Option<String>,
        new: NewTicket,
        by: Option<&str>,
        secret: &Secret,
        now: u64,
    ) -> Result<String, TicketError> {
        let NewTicket { role, ends, once, own } = new;
        let numbered = (1..).map(|n: u32| format!("{role}-{n}"));
        let free = |name: &String| !self.0.contains_key(name);
        let name = name.or_else(|| numbered.into_iter().find(free)).unwrap_or_default();
        if !is_plain_name(&name) || name.contains(['/', '\\']) || name.starts_with(['.', '-']) {
            return Err(TicketError::Name);
        }
        let is_reserved = [TicketRole::Join, TicketRole::Operate].iter().any(|role| role.to_string() == name);
        if is_reserved && !own {
            return Err(TicketError::Reserved { name });
        }
        if !own && self.0.get(&name).is_some_and(|entry| entry.state(now) == TicketState::Valid) {
            return Err(TicketError::Exists { name });
        }
        if self.0.len() >= MOST_TICKETS && !self.0.contains_key(&name) {
            self.0.retain(|_, entry| entry.state(now) == TicketState::Valid);
            if self.0.len() >= MOST_TICKETS {
                return Err(TicketError::TooMany { most: MOST_TICKETS });
            }
        }
        let hash = blake3::hash(secret.as_bytes()).to_hex().to_string();
        // The broker's own user makes tickets for others, which must not end with the file in the state folder.
        let maker = by.and_then(|by| self.0.get(by)).filter(|entry| !entry.own);
        let made_by =
            maker.map(|maker| maker.made_by.iter().chain([&maker.hash]).cloned().collect()).unwrap_or_default();
        let entry = Entry { role, hash, ends, once, revoked: false, own, made_by, keys: BTreeSet::new() };
        self.0.insert(name.clone(), entry);
        Ok(name)
    }

    /// Whether `secret` is that of the ticket of this name in the state folder, and admits.
    pub(crate) fn is_own(&self, name: &str, secret: &Secret) -> bool {
        let hash = blake3::hash(secret.as_bytes());
        let fits = |e: &Entry| e.own && !e.revoked && blake3::Hash::from_hex(&e.hash).is_ok_and(|h| h == hash);
        self.0.get(name).is_some_and(fits)
    }

    /// Makes a ticket worthless, and those that were made by it, and by these.
    pub(crate) fn revoke(&mut self, name: &str) -> Result<Revoked, TicketError> {
        let named = self.0.get(name).ok_or_else(|| TicketError::Unknown { name: name.to_owned() })?;
        let (is_own, hash) = (named.own, named.hash.clone());
        let mut names = BTreeSet::new();
        for (other, entry) in &mut self.0 {
            if other == name || entry.made_by.contains(&hash) {
                entry.revoked = true;
                names.insert(other.clone());
            }
        }
        Ok(Revoked { names, is_own })
    }

    /// Every ticket, for people; `connections` says how many came by each.
    pub(crate) fn summaries(&self, connections: &BTreeMap<String, u64>, now: u64) -> Vec<TicketSummary> {
        let summary = |(name, entry): (&String, &Entry)| TicketSummary {
            name: name.clone(),
            role: entry.role,
            state: entry.state(now),
            valid_s: entry.ends.map(|ends| ends.saturating_sub(now)),
            once: entry.once,
            connections: connections.get(name).copied().unwrap_or(0),
        };
        self.0.iter().map(summary).collect()
    }
}

impl Entry {
    fn state(&self, now: u64) -> TicketState {
        if self.revoked {
            TicketState::Revoked
        } else if self.once && !self.keys.is_empty() {
            TicketState::Used
        } else if self.ends.is_some_and(|ends| ends <= now) {
            TicketState::Expired
        } else {
            TicketState::Valid
        }
    }
}

fn hex(peer: PeerId) -> String {
    data_encoding::HEXLOWER.encode(peer.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn new(role: TicketRole) -> NewTicket {
        NewTicket { role, ends: None, once: false, own: false }
    }

    /// A ticket of that form, and its secret.
    fn ticket(tickets: &mut Tickets, name: &str, new: NewTicket) -> Secret {
        let secret = Secret::generate();
        assert_eq!(tickets.create(Some(name.to_owned()), new, None, &secret, NOW).unwrap(), name);
        secret
    }

    #[test]
    fn a_ticket_admits_to_its_role_alone() {
        let mut tickets = Tickets::default();
        let join = ticket(&mut tickets, "gpu", new(TicketRole::Join));
        let operate = ticket(&mut tickets, "ann", new(TicketRole::Operate));
        let grant = tickets.admit(&join, TicketRole::Join, peer(1), NOW).unwrap();
        assert_eq!(grant, Grant { ticket: "gpu".to_owned(), own: false, changed: false });
        assert!(tickets.admit(&operate, TicketRole::Operate, peer(1), NOW).is_ok());
        let mut refused = |secret, role| tickets.admit(secret, role, peer(1), NOW).unwrap_err().to_string();
        assert!(refused(&join, TicketRole::Operate).contains("--role operate"));
        assert!(refused(&operate, TicketRole::Join).contains("--role join"));
        assert_eq!(refused(&Secret::generate(), TicketRole::Join), "the ticket is not valid for this broker");
    }

    #[test]
    fn a_revoked_ticket_admits_nobody_not_even_who_was_in() {
        let mut tickets = Tickets::default();
        let secret = ticket(&mut tickets, "gpu", NewTicket { once: true, ..new(TicketRole::Join) });
        tickets.admit(&secret, TicketRole::Join, peer(1), NOW).unwrap();
        let revoked = Revoked { names: ["gpu".to_owned()].into(), is_own: false };
        assert_eq!(tickets.revoke("gpu"), Ok(revoked));
        let refused = tickets.admit(&secret, TicketRole::Join, peer(1), NOW).unwrap_err().to_string();
        assert_eq!(refused, "the ticket `gpu` was revoked");
        assert!(tickets.revoke("cpu").unwrap_err().to_string().contains("no ticket `cpu`"));
        // The name is free for another one, and the old secret stays worthless.
        let again = ticket(&mut tickets, "gpu", new(TicketRole::Join));
        assert!(tickets.admit(&secret, TicketRole::Join, peer(1), NOW).is_err());
        assert!(tickets.admit(&again, TicketRole::Join, peer(1), NOW).is_ok());
    }

    #[test]
    fn what_was_made_by_a_revoked_ticket_goes_with_it() {
        let mut tickets = Tickets::default();
        let own = NewTicket { own: true, ..new(TicketRole::Operate) };
        tickets.create(Some("operate".to_owned()), own, None, &Secret::generate(), NOW).unwrap();
        let secret = Secret::generate();
        let mut make = |name: &str, role, by: &str, secret: &Secret| {
            tickets.create(Some(name.to_owned()), new(role), Some(by), secret, NOW).unwrap();
        };
        make("ann", TicketRole::Operate, "operate", &Secret::generate());
        make("bob", TicketRole::Operate, "ann", &Secret::generate());
        make("gpu", TicketRole::Join, "bob", &secret);
        make("other", TicketRole::Join, "operate", &Secret::generate());
        assert!(tickets.admit(&secret, TicketRole::Join, peer(1), NOW).is_ok());
        let names = ["ann", "bob", "gpu"].map(str::to_owned).into();
        // Its maker's name is given to another one meanwhile.
        tickets.0.remove("bob");
        tickets.create(Some("bob".to_owned()), new(TicketRole::Join), Some("gpu"), &Secret::generate(), NOW).unwrap();
        assert_eq!(tickets.revoke("ann"), Ok(Revoked { names, is_own: false }));
        let refused = tickets.admit(&secret, TicketRole::Join, peer(1), NOW).unwrap_err().to_string();
        assert_eq!(refused, "the ticket `gpu` was revoked");
        // What the broker's own user made outlives the file by which it was made.
        let names = ["operate".to_owned()].into();
        assert_eq!(tickets.revoke("operate"), Ok(Revoked { names, is_own: true }));
    }

    #[test]
    fn a_ticket_for_one_use_lets_the_same_compnode_back_in_and_nobody_else() {
        let mut tickets = Tickets::default();
        let secret = ticket(&mut tickets, "gpu", NewTicket { once: true, ..new(TicketRole::Join) });
        assert!(tickets.admit(&secret, TicketRole::Join, peer(1), NOW).unwrap().changed);
        assert!(!tickets.admit(&secret, TicketRole::Join, peer(1), NOW).unwrap().changed);
        assert!(tickets.admit(&secret, TicketRole::Join, peer(2), NOW).unwrap_err().to_string().contains("one use"));
        let once = ticket(&mut tickets, "ann", NewTicket { once: true, ..new(TicketRole::Operate) });
        assert!(tickets.admit(&once, TicketRole::Operate, peer(1), NOW).is_ok());
        assert!(tickets.admit(&once, TicketRole::Operate, peer(1), NOW).is_err(), "a command is one use");
    }

    #[test]
    fn an_expired_ticket_admits_only_compnodes_that_were_in() {
        let mut tickets = Tickets::default();
        let ends = Some(NOW + 10);
        let join = ticket(&mut tickets, "gpu", NewTicket { ends, ..new(TicketRole::Join) });
        let operate = ticket(&mut tickets, "ann", NewTicket { ends, ..new(TicketRole::Operate) });
        tickets.admit(&join, TicketRole::Join, peer(1), NOW + 9).unwrap();
        tickets.admit(&operate, TicketRole::Operate, peer(1), NOW + 9).unwrap();
        assert!(tickets.admit(&join, TicketRole::Join, peer(1), NOW + 10).is_ok());
        assert!(tickets.admit(&join, TicketRole::Join, peer(2), NOW + 10).unwrap_err().to_string().contains("expired"));
        assert!(
            tickets
                .admit(&operate, TicketRole::Operate, peer(1), NOW + 10)
                .unwrap_err()
                .to_string()
                .contains("expired")
        );
    }

    #[test]
    fn names_are_plain_and_those_of_the_state_folder_are_not_given_away() {
        let mut tickets = Tickets::default();
        let secret = Secret::generate();
        let mut make =
            |name: Option<&str>| tickets.create(name.map(str::to_owned), new(TicketRole::Join), None, &secret, NOW);
        assert_eq!(make(None).as_deref(), Ok("join-1"));
        assert_eq!(make(None).as_deref(), Ok("join-2"));
        for name in ["", "a/b", "../x", ".x", "-x", "a\nb", "join", "operate", "join-1"] {
            assert!(make(Some(name)).is_err(), "{name:?}");
        }
    }

    #[test]
    fn what_is_kept_does_not_tell_the_secret() {
        let mut tickets = Tickets::default();
        let secret = ticket(&mut tickets, "gpu", new(TicketRole::Join));
        let text = serde_json::to_string(&tickets).unwrap();
        assert!(!text.contains(&data_encoding::HEXLOWER.encode(secret.as_bytes())));
        assert_eq!(serde_json::from_str::<Tickets>(&text).unwrap(), tickets);
    }
}
