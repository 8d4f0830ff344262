//! Connections that have not shown yet that they may be here: few, and with little room.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iroh::endpoint::{Connection, WeakConnectionHandle};

/// So many may wait at once. Beyond that one is sent away for each that comes.
const MOST_GUESTS: usize = 128;
/// Close code of a connection that had to make room.
const NO_ROOM: u32 = 503;

/// All that wait at one endpoint. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Doorway(Arc<Mutex<Guests>>);

#[derive(Debug, Default)]
struct Guests {
    next: u64,
    /// The oldest first.
    waiting: VecDeque<Guest>,
}

#[derive(Debug)]
struct Guest {
    number: u64,
    from: IpAddr,
    connection: WeakConnectionHandle,
}

/// A connection's stay in the doorway; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Stay {
    doorway: Doorway,
    number: u64,
}

impl Doorway {
    /// Takes a connection in, and sends another away if there are too many.
    pub(crate) fn enter(&self, from: IpAddr, connection: &Connection) -> Stay {
        let mut guests = self.guests();
        let number = guests.next;
        guests.next += 1;
        guests.waiting.push_back(Guest { number, from: network(from), connection: connection.weak_handle() });
        let goes = if guests.waiting.len() > MOST_GUESTS { guests.oldest_of_the_many() } else { None };
        // Not while others wait for the lock.
        drop(guests);
        if let Some(connection) = goes.and_then(|goes| goes.connection.upgrade()) {
            connection.close(NO_ROOM.into(), b"too many connections wait to be let in");
        }
        Stay { doorway: self.clone(), number }
    }

    fn guests(&self) -> MutexGuard<'_, Guests> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Guests {
    /// Of the network that most are from, so that one that floods does not push out others.
    fn oldest_of_the_many(&mut self) -> Option<Guest> {
        let at = oldest_of_the_many(self.waiting.iter().map(|guest| guest.from))?;
        self.waiting.remove(at)
    }
}

fn oldest_of_the_many(from: impl Iterator<Item = IpAddr> + Clone) -> Option<usize> {
    let mut counts = BTreeMap::<IpAddr, usize>::new();
    from.clone().for_each(|ip| *counts.entry(ip).or_default() += 1);
    let (&many, _) = counts.iter().max_by_key(|(_, count)| **count)?;
    from.into_iter().position(|ip| ip == many)
}

impl Stay {
    /// The connection was let in.
    pub(crate) fn end(&self) {
        self.doorway.guests().waiting.retain(|guest| guest.number != self.number);
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        self.end();
    }
}

/// What counts as one place: of IPv6, where everybody has billions of addresses, the network.
pub(crate) fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
        ip @ IpAddr::V4(_) => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_of_those_who_come_in_numbers_goes() {
        let ips = |list: &[&str]| list.iter().map(|ip| network(ip.parse().unwrap())).collect::<Vec<_>>();
        let goes = |list: &[&str]| oldest_of_the_many(ips(list).into_iter());
        assert_eq!(goes(&[]), None);
        assert_eq!(goes(&["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.2"]), Some(1));
        assert_eq!(goes(&["10.0.0.1", "2001:db8::1", "2001:db8::2:3", "2001:db8:1::1"]), Some(1));
        assert_eq!(goes(&["10.0.0.1", "::ffff:10.0.0.1", "10.0.0.2"]), Some(0));
    }
}
