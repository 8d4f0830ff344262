//! Which sample comes when: a function of the seed and of how many came before, so that training goes on with the very
//! sample at which it stopped.

use fusionllm_protocol::SampleOrder;

use crate::params::seed_for;

/// Rounds of the network that permutes; four are enough to look random, see Luby and Rackoff.
const ROUNDS: u64 = 6;

/// Epochs over so many samples.
#[derive(Clone, Copy, Debug)]
pub(super) struct Epochs {
    pub(super) order: SampleOrder,
    pub(super) seed: u64,
    pub(super) samples: u64,
}

impl Epochs {
    /// The sample that comes after `before` others; of drawn ones each is drawn by itself.
    pub(super) fn sample(&self, before: u64) -> u64 {
        let samples = self.samples.max(1);
        let (epoch, at) = (before / samples, before % samples);
        match self.order {
            SampleOrder::Sequential => at,
            SampleOrder::Shuffled => permuted(seed_for(self.seed, &[b"epoch", &epoch.to_le_bytes()]), samples, at),
            SampleOrder::Drawn => seed_for(self.seed, &[b"sample", &before.to_le_bytes()]) % samples,
        }
    }
}

/// Where `at` lies in a permutation of 0 to `count - 1`, which is nowhere written down: a Feistel network permutes the next
/// power of four, and is gone through again until the result is below `count`, fewer than four times on average.
fn permuted(key: u64, count: u64, at: u64) -> u64 {
    let half = (u64::BITS - count.saturating_sub(1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1u64 << half) - 1;
    let mut place = at;
    loop {
        let (mut left, mut right) = (place >> half, place & mask);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ (mixed(key ^ (round << 56) ^ right) & mask));
        }
        place = (left << half) | right;
        if place < count {
            return place;
        }
    }
}

/// The finalizer of `SplitMix64`.
fn mixed(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_sample_comes_once_an_epoch_and_each_epoch_in_an_order_of_its_own() {
        for samples in [1, 2, 3, 4, 5, 17, 64, 65, 1000] {
            let epochs = Epochs { order: SampleOrder::Shuffled, seed: 7, samples };
            let epoch = |number: u64| (0..samples).map(|at| epochs.sample(number * samples + at)).collect::<Vec<_>>();
            for number in [0, 1, 9] {
                let all: BTreeSet<u64> = epoch(number).into_iter().collect();
                assert_eq!(all, (0..samples).collect(), "{samples} samples, epoch {number}");
            }
            if samples > 5 {
                assert_ne!(epoch(0), epoch(1));
                assert_ne!(epoch(0), Epochs { seed: 8, ..epochs }.order_of(samples));
                assert_ne!(epoch(0), (0..samples).collect::<Vec<_>>());
            }
        }
    }

    impl Epochs {
        fn order_of(&self, samples: u64) -> Vec<u64> {
            (0..samples).map(|at| self.sample(at)).collect()
        }
    }

    #[test]
    fn a_shuffle_has_no_pattern_that_shows() {
        let samples = 1000;
        let epochs = Epochs { order: SampleOrder::Shuffled, seed: 1, samples };
        let order = epochs.order_of(samples);
        let neighbours = order.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) == 1).count();
        // Of a random one about two.
        assert!(neighbours < 12, "{neighbours}");
        let first_half = order[..500].iter().filter(|&&sample| sample < 500).count();
        assert!((200..300).contains(&first_half), "{first_half}");
    }

    #[test]
    fn the_other_orders_are_what_they_are_called() {
        let sequential = Epochs { order: SampleOrder::Sequential, seed: 1, samples: 3 };
        assert_eq!((0..7).map(|at| sequential.sample(at)).collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2, 0]);
        let drawn = Epochs { order: SampleOrder::Drawn, ..sequential };
        let many: Vec<u64> = (0..300).map(|at| drawn.sample(at)).collect();
        assert!((0..3).all(|sample| (60..140).contains(&many.iter().filter(|&&s| s == sample).count())), "{many:?}");
    }

    #[test]
    fn the_order_stays_what_it_is() {
        // A run that goes on with a later build must find the samples that it has not had.
        let epochs = Epochs { order: SampleOrder::Shuffled, seed: 0, samples: 10 };
        let two: Vec<u64> = epochs.order_of(20);
        assert_eq!(two, [8, 2, 3, 4, 1, 5, 0, 6, 7, 9, 8, 6, 0, 2, 4, 9, 5, 3, 1, 7]);
    }
}
