//! What was measured of CompNodes that are gone, by their keys. One whose link broke for some seconds, or whose process was
//! started again, is what it was; its job need not wait until that is measured anew.

use std::collections::BTreeMap;
use std::time::Duration;

use fusionllm_planner::Measured;
use fusionllm_protocol::PairProfile;

use super::WorkKey;

/// What is older is measured anew.
const FRESH: Duration = Duration::from_secs(600);

/// A CompNode's public key.
type Key = [u8; 32];

/// Links and ops that were measured, and when.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// From the CompNode with the smaller key to the other.
    pairs: BTreeMap<(Key, Key), (PairProfile, Duration)>,
    ops: BTreeMap<Key, (Vec<(WorkKey, Measured)>, Duration)>,
}

impl Memory {
    /// Keeps what was measured at `at` between two, the first of which dialled; nothing is kept of those that did not reach
    /// each other.
    pub(super) fn keep_pair(&mut self, keys: (Key, Key), result: Option<PairProfile>, at: Duration) {
        self.pairs.retain(|_, (_, of)| at.saturating_sub(*of) < FRESH);
        let Some(pair) = result else { return };
        let (keys, pair) = ordered(keys, pair);
        self.pairs.insert(keys, (pair, at));
    }

    /// What was measured between two, the first of which would dial, and when.
    pub(super) fn pair(&self, keys: (Key, Key), now: Duration) -> Option<(PairProfile, Duration)> {
        let is_turned = keys.0 > keys.1;
        let sorted = if is_turned { (keys.1, keys.0) } else { keys };
        let &(pair, at) = self.pairs.get(&sorted).filter(|(_, at)| now.saturating_sub(*at) < FRESH)?;
        Some((if is_turned { turned(pair) } else { pair }, at))
    }

    /// Keeps the ops that were measured of one that goes now.
    pub(super) fn keep_ops<'a>(
        &mut self,
        key: Key,
        ops: impl Iterator<Item = (WorkKey, &'a Option<Measured>)>,
        now: Duration,
    ) {
        self.ops.retain(|_, (_, of)| now.saturating_sub(*of) < FRESH);
        let known: Vec<_> = ops.filter_map(|(work, measured)| Some((work, measured.clone()?))).collect();
        if !known.is_empty() {
            self.ops.insert(key, (known, now));
        }
    }

    /// The ops that were measured of one that is back.
    pub(super) fn ops_of(&mut self, key: Key, now: Duration) -> impl Iterator<Item = (WorkKey, Measured)> + use<> {
        let known = self.ops.remove(&key).filter(|(_, of)| now.saturating_sub(*of) < FRESH);
        known.map(|(ops, _)| ops).unwrap_or_default().into_iter()
    }
}

/// As seen from the one with the smaller key.
fn ordered((a, b): (Key, Key), pair: PairProfile) -> ((Key, Key), PairProfile) {
    if a <= b { ((a, b), pair) } else { ((b, a), turned(pair)) }
}

/// As seen from the other end.
fn turned(pair: PairProfile) -> PairProfile {
    PairProfile { there: pair.back, back: pair.there, ..pair }
}

#[cfg(test)]
mod tests {
    use fusionllm_planner::LinkProfile;

    use super::*;

    #[test]
    fn a_link_is_remembered_from_either_end_and_for_a_while() {
        let (a, b, at) = ([1; 32], [2; 32], Duration::from_secs(100));
        let link = |bytes_per_s| LinkProfile { latency_s: 0.01, bytes_per_s };
        let (there, back) = (link(1.0), link(2.0));
        let pair = PairProfile { there, back, relayed: false };
        let other = PairProfile { there: back, back: there, relayed: false };
        for (keys, kept) in [((a, b), pair), ((b, a), other)] {
            let mut memory = Memory::default();
            memory.keep_pair(keys, Some(kept), at);
            let soon = at + Duration::from_secs(599);
            assert_eq!(memory.pair((a, b), soon), Some((pair, at)));
            assert_eq!(memory.pair((b, a), soon), Some((other, at)));
            assert_eq!(memory.pair((a, b), at + FRESH), None);
            memory.keep_pair((a, [3; 32]), None, at + FRESH);
            assert!(memory.pairs.is_empty());
        }
    }
}
