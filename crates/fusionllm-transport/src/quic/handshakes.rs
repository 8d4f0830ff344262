//! How many handshakes may run at once, together and from one network.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::doorway::network;

/// Handshakes that run at once.
const MOST: usize = 256;
/// Of one network: a quarter, so that one that begins many and ends none leaves room for others. More than [`MANY`], up to
/// which senders may lie about where they are, so that nobody can take all of somebody else's.
const MOST_OF_A_NETWORK: usize = 64;
/// With so many running, who asks must first show that the address is theirs: it costs them a round trip, and us nothing.
const MANY: usize = 32;

/// Those that run at one endpoint. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Handshakes(Arc<Mutex<Running>>);

#[derive(Debug)]
struct Running {
    most: usize,
    of_a_network: usize,
    count: usize,
    by_network: BTreeMap<IpAddr, usize>,
}

impl Default for Running {
    fn default() -> Self {
        Self { most: MOST, of_a_network: MOST_OF_A_NETWORK, count: 0, by_network: BTreeMap::new() }
    }
}

/// One that runs, until this is dropped.
#[derive(Debug)]
pub(crate) struct Handshake {
    all: Handshakes,
    network: IpAddr,
}

impl Handshakes {
    /// Of something else that lasts for a while: so many together, and of one network.
    pub(crate) fn of(most: usize, of_a_network: usize) -> Self {
        Self(Arc::new(Mutex::new(Running { most, of_a_network, ..Running::default() })))
    }

    /// Begins one with somebody at `from`, if there is room.
    pub(crate) fn begin(&self, from: IpAddr) -> Option<Handshake> {
        let network = network(from);
        let mut running = self.running();
        let of_network = running.by_network.get(&network).copied().unwrap_or_default();
        if running.count >= running.most || of_network >= running.of_a_network {
            return None;
        }
        running.count += 1;
        running.by_network.insert(network, of_network + 1);
        Some(Handshake { all: self.clone(), network })
    }

    /// Whether so many run that addresses must be shown to be their senders'.
    pub(crate) fn are_many(&self) -> bool {
        self.running().count > MANY
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let mut running = self.all.running();
        running.count -= 1;
        if let Some(count) = running.by_network.get_mut(&self.network) {
            *count -= 1;
        }
        running.by_network.retain(|_, count| *count > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_that_ends_no_handshake_leaves_room_for_others() {
        let handshakes = Handshakes::default();
        let begin = |ip: String| handshakes.begin(ip.parse().unwrap());
        let mut stalled: Vec<Handshake> = (0..1000).filter_map(|_| begin("10.0.0.1".to_owned())).collect();
        // All addresses of an IPv6 network are one place.
        stalled.extend((0..1000).filter_map(|n| begin(format!("2001:db8::{n:x}"))));
        assert_eq!(stalled.len(), 2 * MOST_OF_A_NETWORK);
        assert!(handshakes.are_many());
        assert!(begin("10.0.0.2".to_owned()).is_some() && begin("2001:db8:0:1::1".to_owned()).is_some());
        stalled.extend((0..1000).filter_map(|n| begin(format!("10.0.{}.{}", 1 + n / 250, n % 250))));
        assert_eq!(stalled.len(), MOST);
        stalled.pop();
        assert!(begin("10.0.0.3".to_owned()).is_some());
        drop(stalled);
        assert!(!handshakes.are_many() && begin("10.0.0.1".to_owned()).is_some());
        assert!(handshakes.running().by_network.is_empty());
    }

    #[test]
    fn who_lies_about_addresses_takes_not_all_of_a_networks() {
        let handshakes = Handshakes::default();
        let mut lies = Vec::new();
        while !handshakes.are_many() {
            lies.push(handshakes.begin("10.0.0.1".parse().unwrap()).unwrap());
        }
        assert!(handshakes.begin("10.0.0.1".parse().unwrap()).is_some());
    }
}
