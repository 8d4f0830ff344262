//! The gate: tickets on disk, and the connections that came in by each.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use data_encoding::HEXLOWER;
use fusionllm_protocol::{TicketRole, TicketSummary};
use fusionllm_transport::{
    PeerAddr, PeerId, RelayAccess, RelayStanding, RelayToken, Secret, Session, Ticket, read_private, read_regular,
};

use crate::core::ConnectionId;
use crate::files::{io_error, write_private};
use crate::tickets::{Grant, NewTicket, Revoked, Tickets};
use crate::{BrokerError, TicketError};

/// Close code of a connection whose ticket was revoked.
const REVOKED: u32 = 403;
/// Files of earlier releases, whose one ticket admitted to everything.
const OLD_FILES: [&str; 2] = ["secret", "ticket"];

/// Who may come in, and who has. Nobody comes in by a ticket while it is being revoked.
#[derive(Debug)]
pub(super) struct Gate {
    state_dir: PathBuf,
    broker: PeerAddr,
    /// Port of the broker's relay, if it has one.
    relay: Option<u16>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    tickets: Tickets,
    /// What their holders show to the relay.
    tokens: BTreeMap<RelayToken, String>,
    /// Open connections with the ticket that each came by.
    open: BTreeMap<ConnectionId, (String, Session)>,
}

/// The place of somebody who was let in; given up when it is dropped.
#[derive(Debug)]
pub(super) struct Admission {
    connection: ConnectionId,
    /// Whether the holder is the broker's own user.
    pub(super) own: bool,
    pub(super) gate: Arc<Gate>,
}

impl Gate {
    /// Reads the tickets of a state folder, and makes those that are always there: `join.ticket`, which is given, and
    /// `operate.ticket`. A folder of an earlier release is taken over: its ticket lets CompNodes join.
    pub(super) fn open(
        state_dir: &Path,
        broker: PeerAddr,
        relay: Option<u16>,
    ) -> Result<(Arc<Self>, Ticket), BrokerError> {
        let before = read_tickets(&tickets_path(state_dir))?;
        let mut tickets = before.clone();
        let old = take_over(state_dir, &mut tickets)?;
        let mut own = |role: TicketRole, old: Option<Secret>| {
            let path = ticket_path(state_dir, role);
            let known = read_ticket(&path)?.map(|t| t.secret).filter(|s| tickets.is_own(&role.to_string(), s));
            let secret = match known.or(old) {
                Some(secret) => secret,
                None => {
                    let (secret, new) = (Secret::generate(), NewTicket { role, ends: None, once: false, own: true });
                    let made = tickets.create(Some(role.to_string()), new, None, &secret, now());
                    made.map_err(|e| BrokerError::Tickets { path: path.clone(), reason: e.to_string() })?;
                    secret
                }
            };
            Ok::<_, BrokerError>((path, Ticket { broker: broker.clone(), secret, relay }))
        };
        let (join_path, join) = own(TicketRole::Join, old)?;
        let (operate_path, operate) = own(TicketRole::Operate, None)?;
        // What is there already need not be written, which a full disk would not let us do.
        if tickets != before {
            write_tickets(state_dir, &tickets)?;
        }
        for (path, ticket) in [(&join_path, &join), (&operate_path, &operate)] {
            let text = format!("{ticket}\n");
            if read_private(path)?.is_none_or(|there| there != text) {
                write_private(path, text.as_bytes())?;
            }
        }
        for name in OLD_FILES {
            remove(&state_dir.join(name))?;
        }
        let inner = Mutex::new(Inner { tokens: tickets.relay_tokens(), tickets, open: BTreeMap::new() });
        Ok((Arc::new(Self { state_dir: state_dir.to_owned(), broker, relay, inner }), join))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets somebody in as `role`, or says why not. Writes a file: for a blocking thread.
    ///
    /// # Errors
    /// [`BrokerError::Io`] if that cannot be written, which is not the ticket's fault.
    pub(super) fn admit(
        self: &Arc<Self>,
        connection: ConnectionId,
        session: &Session,
        secret: &Secret,
        role: TicketRole,
    ) -> Result<Result<Admission, TicketError>, BrokerError> {
        let mut inner = self.inner();
        let mut tickets = inner.tickets.clone();
        let Grant { ticket, own, changed } = match tickets.admit(secret, role, session.peer(), now()) {
            Ok(grant) => grant,
            Err(refusal) => return Ok(Err(refusal)),
        };
        if changed {
            // What is not on disk would admit again after a restart.
            write_tickets(&self.state_dir, &tickets)?;
            inner.tickets = tickets;
        }
        inner.open.insert(connection, (ticket, session.clone()));
        Ok(Ok(Admission { connection, own, gate: Arc::clone(self) }))
    }

    /// Makes a ticket for who came in by the connection `by`. Gives its name, and what admits. For a blocking thread.
    pub(super) fn create(
        &self,
        by: ConnectionId,
        name: Option<String>,
        role: TicketRole,
        valid_s: Option<u64>,
        once: bool,
    ) -> Result<(String, Ticket), BrokerError> {
        let now = now();
        let new = NewTicket { role, ends: valid_s.map(|s| now.saturating_add(s)), once, own: false };
        let secret = Secret::generate();
        let mut inner = self.inner();
        let mut tickets = inner.tickets.clone();
        let by = inner.open.get(&by).map(|(ticket, _)| ticket.as_str());
        let name = tickets.create(name, new, by, &secret, now)?;
        write_tickets(&self.state_dir, &tickets)?;
        inner.tokens = tickets.relay_tokens();
        inner.tickets = tickets;
        tracing::info!(name, %role, "a ticket was made");
        Ok((name, Ticket { broker: self.broker.clone(), secret, relay: self.relay }))
    }

    /// Every ticket, without secrets.
    pub(super) fn summaries(&self) -> Vec<TicketSummary> {
        let inner = self.inner();
        let mut connections: BTreeMap<String, u64> = BTreeMap::new();
        for (ticket, _) in inner.open.values() {
            *connections.entry(ticket.clone()).or_default() += 1;
        }
        inner.tickets.summaries(&connections, now())
    }

    /// Makes a ticket and those made by it worthless, and closes the connections that came by them, except `asking`, which
    /// closes itself when it has its answer. Gives how many were closed. For a blocking thread.
    pub(super) fn revoke(&self, name: &str, asking: ConnectionId) -> Result<u64, BrokerError> {
        let mut inner = self.inner();
        let mut tickets = inner.tickets.clone();
        let Revoked { names, is_own } = tickets.revoke(name)?;
        // On a full disk, too, whoever came in by it has to go.
        let written = write_tickets(&self.state_dir, &tickets);
        inner.tokens = tickets.relay_tokens();
        inner.tickets = tickets;
        let gone: Vec<_> = inner.open.extract_if(.., |_, (ticket, _)| names.contains(ticket)).collect();
        drop(inner);
        for (_, (_, session)) in gone.iter().filter(|(connection, _)| *connection != asking) {
            session.close(REVOKED, "the ticket was revoked");
        }
        let path = self.state_dir.join(format!("{name}.ticket"));
        let removed = if is_own { remove(&path) } else { Ok(()) };
        let is_file_gone = is_own && removed.is_ok();
        if let Err(error) = removed {
            // It would only mislead.
            tracing::warn!(%error, "the file of the revoked ticket stays");
        }
        for name in names {
            tracing::info!(name, "a ticket was revoked");
        }
        tracing::info!(closed = gone.len(), "connections by revoked tickets were closed");
        written.map_err(|error| {
            let (name, reason) = (name.to_owned(), error.to_string());
            match is_file_gone {
                true => BrokerError::RevokedByFile { name, path, reason },
                false => BrokerError::RevokedUnwritten { name, reason },
            }
        })?;
        Ok(gone.len() as u64)
    }
}

/// Whoever was let in, and whoever may come in, by the ticket that it shows.
impl RelayAccess for Gate {
    fn standing(&self, peer: PeerId, token: Option<&RelayToken>) -> RelayStanding {
        if peer == self.broker.id {
            return RelayStanding::Member;
        }
        let inner = self.inner();
        let Some(name) = token.and_then(|token| inner.tokens.get(token)) else { return RelayStanding::Stranger };
        if inner.open.values().any(|(ticket, session)| ticket == name && session.peer() == peer) {
            RelayStanding::Member
        } else if inner.tickets.admits(name, peer, now()) {
            RelayStanding::Guest
        } else {
            RelayStanding::Stranger
        }
    }
}

impl Admission {
    /// The connection that came in by it.
    pub(super) fn connection(&self) -> ConnectionId {
        self.connection
    }

    /// Whether the ticket was revoked since.
    pub(super) fn is_revoked(&self) -> bool {
        !self.gate.inner().open.contains_key(&self.connection)
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.gate.inner().open.remove(&self.connection);
    }
}

/// Where the ticket of a role lies that is always there.
pub(super) fn ticket_path(state_dir: &Path, role: TicketRole) -> PathBuf {
    state_dir.join(format!("{role}.ticket"))
}

pub(super) fn tickets_path(state_dir: &Path) -> PathBuf {
    state_dir.join("tickets.json")
}

/// Seconds since 1970.
fn now() -> u64 {
    // A clock before 1970 lets every ticket be valid.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn read_tickets(path: &Path) -> Result<Tickets, BrokerError> {
    let Some(text) = read_regular(path).map(Some).or_else(not_found).map_err(|e| io_error(path, e))? else {
        return Ok(Tickets::default());
    };
    let damaged = |e: serde_json::Error| BrokerError::Tickets {
        path: path.to_owned(),
        reason: format!(
            "line {}, column {} is not as it was written; move it away to begin without tickets",
            e.line(),
            e.column()
        ),
    };
    serde_json::from_slice(&text).map_err(damaged)
}

fn not_found<T>(error: std::io::Error) -> std::io::Result<Option<T>> {
    if error.kind() == std::io::ErrorKind::NotFound { Ok(None) } else { Err(error) }
}

fn write_tickets(state_dir: &Path, tickets: &Tickets) -> Result<(), BrokerError> {
    let path = tickets_path(state_dir);
    let text = serde_json::to_vec_pretty(tickets).map_err(|e| io_error(&path, e.into()))?;
    write_private(&path, &text)
}

fn read_ticket(path: &Path) -> Result<Option<Ticket>, BrokerError> {
    let Some(text) = read_private(path)? else { return Ok(None) };
    let damaged = |e| BrokerError::Tickets {
        path: path.to_owned(),
        reason: format!("{e}; remove it to have a new one made (copies of this one will admit nobody)"),
    };
    text.trim().parse().map(Some).map_err(damaged)
}

fn remove(path: &Path) -> Result<(), BrokerError> {
    std::fs::remove_file(path).map(Some).or_else(not_found).map(drop).map_err(|e| io_error(path, e))
}

/// Makes the one secret of an earlier release that of the join ticket, so that CompNodes which hold it can come back.
fn take_over(state_dir: &Path, tickets: &mut Tickets) -> Result<Option<Secret>, BrokerError> {
    let path = state_dir.join("secret");
    let Some(text) = read_private(&path)? else { return Ok(None) };
    let bytes = HEXLOWER.decode(text.trim().as_bytes()).ok().and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    let secret = bytes.map(Secret::from_bytes).ok_or(BrokerError::Secret { path: path.clone() })?;
    let new = NewTicket { role: TicketRole::Join, ends: None, once: false, own: true };
    let made = tickets.create(Some(TicketRole::Join.to_string()), new, None, &secret, now());
    made.map_err(|e| BrokerError::Tickets { path, reason: e.to_string() })?;
    tracing::warn!(
        "the ticket that an earlier release made lets CompNodes join from now on, and nothing else; commands on this \
         machine use operate.ticket in the state folder, others need `fusionllm ticket new --role operate`"
    );
    Ok(Some(secret))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_relay_serves_holders_of_tickets_that_admit() {
        let folder = tempfile::tempdir().unwrap();
        let peer = |n: u8| PeerId::from_bytes([n; 32]);
        let broker = PeerAddr { id: peer(1), addrs: Vec::new() };
        let (gate, join) = Gate::open(folder.path(), broker, Some(7712)).unwrap();
        assert_eq!(join.relay, Some(7712));
        let (_, later) =
            gate.create(ConnectionId(0), Some("later".to_owned()), TicketRole::Operate, Some(0), false).unwrap();
        let standing = |ticket: &Ticket, n: u8| gate.standing(peer(n), Some(&RelayToken::of(&ticket.secret)));
        assert_eq!(standing(&join, 2), RelayStanding::Guest);
        assert_eq!(standing(&later, 2), RelayStanding::Stranger, "it has expired");
        assert_eq!(gate.standing(peer(2), None), RelayStanding::Stranger);
        assert_eq!(gate.standing(peer(1), None), RelayStanding::Member, "the broker itself");
        let other = Ticket { secret: Secret::generate(), ..join.clone() };
        assert_eq!(standing(&other, 2), RelayStanding::Stranger);
        gate.revoke("join", ConnectionId(1)).unwrap();
        assert_eq!(standing(&join, 2), RelayStanding::Stranger, "it was revoked");
    }

    /// What is said holds after a restart, whatever could be written before it.
    #[test]
    fn a_ticket_of_the_state_folder_is_revoked_where_nothing_can_be_written() {
        let revoked = |is_file_kept: bool| {
            let folder = tempfile::tempdir().unwrap();
            let broker = PeerAddr { id: fusionllm_transport::PeerId::from_bytes([1; 32]), addrs: Vec::new() };
            let (gate, ticket) = Gate::open(folder.path(), broker.clone(), None).unwrap();
            let (tickets, file) = (tickets_path(folder.path()), ticket_path(folder.path(), TicketRole::Join));
            let before = std::fs::read(&tickets).unwrap();
            // Folders can be neither replaced nor removed like files.
            std::fs::remove_file(&tickets).unwrap();
            std::fs::create_dir(&tickets).unwrap();
            let text = std::fs::read(&file).unwrap();
            if is_file_kept {
                std::fs::remove_file(&file).unwrap();
                std::fs::create_dir(&file).unwrap();
            }
            let error = gate.revoke("join", ConnectionId(1)).unwrap_err().to_string();
            std::fs::remove_dir(&tickets).unwrap();
            std::fs::write(&tickets, before).unwrap();
            if is_file_kept {
                std::fs::remove_dir(&file).unwrap();
                write_private(&file, &text).unwrap();
            }
            let (_, next) = Gate::open(folder.path(), broker, None).unwrap();
            (error, next.secret.as_bytes() == ticket.secret.as_bytes())
        };
        let (error, admits_again) = revoked(false);
        assert!(error.contains("`join` is revoked") && error.contains("makes a new one"), "{error}");
        assert!(!admits_again);
        let (error, admits_again) = revoked(true);
        assert!(error.contains("`join` is revoked") && error.contains("only as long as this broker runs"), "{error}");
        assert!(admits_again);
    }
}
