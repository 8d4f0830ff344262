//! The `k` largest magnitudes of a slice, exactly, in linear time.
//!
//! Magnitudes are compared as the integers of their bits without the sign, so NaN is above infinity and infinity
//! above every finite number; of equal magnitudes the lower position wins.
//!
//! A small sample guesses two bounds between which the `k`-th largest magnitude probably lies. One pass collects
//! all that reaches the lower bound; the exact threshold is then sought only among those between the bounds. If
//! the guess was wrong, a histogram gives bounds that cannot be. The result never depends on the sample.

use multiversion::multiversion;

const MAGNITUDE: u32 = 0x7fff_ffff;
/// Elements that are skipped or looked into together.
const LANES: usize = 16;
/// Elements for which room is made at once.
const CHUNK: usize = 1 << 12;
/// Elements from which the bounds are guessed.
const SAMPLE: usize = 1 << 14;
/// Standard deviations between the expected rank in the sample and each bound.
const SLACK: f64 = 4.0;
/// Buckets of the histogram take the exponent and four bits of the mantissa.
const BUCKET_SHIFT: u32 = 19;

/// Memory that is reused from call to call.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Candidates: the first `count` of each.
    positions: Vec<u32>,
    keys: Vec<u32>,
    count: usize,
    /// Sample, then the keys between the bounds.
    band: Vec<u32>,
    histogram: Vec<u32>,
}

/// Keys from `low` on are candidates, keys from `high` on are certainly kept.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    low: u32,
    high: u32,
}

#[inline(always)]
fn key(value: f32) -> u32 {
    value.to_bits() & MAGNITUDE
}

impl Scratch {
    /// Replaces `into` by the positions of the `k` largest magnitudes, in increasing order.
    ///
    /// `k ≤ values.len() < 2^32`.
    pub(crate) fn largest(&mut self, values: &[f32], k: usize, into: &mut Vec<u32>) {
        into.clear();
        if k >= values.len() {
            into.extend(0..values.len() as u32);
            return;
        }
        if k == 0 {
            return;
        }
        let guess = self.guess(values, k);
        self.collect(values, guess.low);
        if self.count >= k && self.keep(k, guess.high, into) {
            return;
        }
        let bounds = self.count(values, k);
        self.collect(values, bounds.low);
        self.keep(k, bounds.high, into);
    }

    /// Bounds from a sample that is spread over the whole slice.
    fn guess(&mut self, values: &[f32], k: usize) -> Bounds {
        let certain = Bounds { low: 0, high: u32::MAX };
        if values.len() < 2 * SAMPLE {
            return certain;
        }
        let stride = values.len() / SAMPLE;
        self.band.clear();
        // A changing offset within the stride, lest the sample meets the same columns in each row.
        let mut offset = 0u32;
        self.band.extend(values.chunks_exact(stride).take(SAMPLE).map(|chunk| {
            offset = offset.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            key(chunk[(offset >> 7) as usize % stride])
        }));
        let expected = self.band.len() as f64 * k as f64 / values.len() as f64;
        let slack = SLACK * expected.sqrt() + SLACK;
        let low_rank = (expected + slack).ceil() as usize;
        let high_rank = (expected - slack).floor().max(0.0) as usize;
        let descending = |a: &u32, b: &u32| b.cmp(a);
        if low_rank >= self.band.len() {
            return certain;
        }
        let (above, &mut low, _) = self.band.select_nth_unstable_by(low_rank, descending);
        let high = if high_rank == 0 { u32::MAX } else { *above.select_nth_unstable_by(high_rank, descending).1 };
        // `high` itself is not certainly kept: many may be equal to it.
        Bounds { low, high: high.saturating_add(1) }
    }

    /// Bounds from a histogram of all magnitudes: one bucket apart.
    fn count(&mut self, values: &[f32], k: usize) -> Bounds {
        self.histogram.clear();
        self.histogram.resize((MAGNITUDE >> BUCKET_SHIFT) as usize + 1, 0);
        for &value in values {
            self.histogram[(key(value) >> BUCKET_SHIFT) as usize] += 1;
        }
        let mut above = 0;
        for (bucket, &count) in self.histogram.iter().enumerate().rev() {
            above += count as usize;
            if above >= k {
                let low = (bucket as u32) << BUCKET_SHIFT;
                return Bounds { low, high: low + (1 << BUCKET_SHIFT) };
            }
        }
        Bounds { low: 0, high: u32::MAX }
    }

    /// Collects position and key of everything that reaches `low`.
    fn collect(&mut self, values: &[f32], low: u32) {
        let Self { positions, keys, .. } = self;
        let mut count = 0;
        for (chunk, start) in values.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
            let room = count + chunk.len();
            if keys.len() < room {
                positions.resize(room + room / 2, 0);
                keys.resize(room + room / 2, 0);
            }
            count += collect_chunk(chunk, start, low, &mut positions[count..room], &mut keys[count..room]);
        }
        self.count = count;
    }

    /// Keeps the `k` best candidates, of which there are at least as many; false if `high` was too low.
    fn keep(&mut self, k: usize, high: u32, into: &mut Vec<u32>) -> bool {
        let keys = &self.keys[..self.count];
        self.band.resize(keys.len(), 0);
        let mut uncertain = 0;
        for &key in keys {
            self.band[uncertain] = key;
            uncertain += usize::from(key < high);
        }
        self.band.truncate(uncertain);
        let certain = keys.len() - uncertain;
        if certain > k {
            return false;
        }
        let wanted = k - certain;
        let (threshold, mut ties) = if wanted == 0 {
            (high - 1, 0)
        } else {
            let (above, &mut threshold, _) = self.band.select_nth_unstable_by(wanted - 1, |a, b| b.cmp(a));
            // Elements equal to the threshold may stand on either side of it.
            let larger = above.iter().filter(|&&key| key > threshold).count();
            (threshold, wanted - larger)
        };
        // One more than are kept: each candidate is written, and overwritten unless it is kept.
        into.resize(k + 1, 0);
        let mut count = 0;
        for (&position, &key) in self.positions.iter().zip(keys) {
            let tie = (key == threshold) & (ties > 0);
            ties -= usize::from(tie);
            into[count] = position;
            count += usize::from((key > threshold) | tie);
        }
        into.truncate(k);
        true
    }
}

/// Writes position and key of everything that reaches `low`, and answers how many do. There is room for all.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn collect_chunk(values: &[f32], start: u32, low: u32, positions: &mut [u32], keys: &mut [u32]) -> usize {
    let mut count = 0;
    for (block, start) in values.chunks(LANES).zip((start..).step_by(LANES)) {
        // Signed, as the oldest vector instructions compare no unsigned integers.
        let hits = block.iter().fold(0, |hits, &x| hits | i32::from(key(x) as i32 >= low as i32));
        if hits != 0 {
            // Without branches: each is written, and overwritten unless it counts.
            for (&value, position) in block.iter().zip(start..) {
                let key = key(value);
                positions[count] = position;
                keys[count] = key;
                count += usize::from(key >= low);
            }
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers from -1 to 1 without pattern.
    fn noise(n: usize) -> Vec<f32> {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    fn sorted(values: &[f32], k: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..values.len() as u32).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(key(values[i as usize])));
        order.truncate(k);
        order.sort_unstable();
        order
    }

    #[test]
    fn long_slices_agree_with_a_stable_sort() {
        let n = 5 * SAMPLE + 13;
        let plain = noise(n);
        let tied = plain.iter().map(|x| (x * 8.0).round()).collect();
        let relu = plain.iter().map(|x| x.max(0.0)).collect();
        let cube = plain.iter().map(|x| x * x * x).collect();
        let ramp = (0..n).map(|i| i as f32).collect();
        let mut scratch = Scratch::default();
        let mut kept = Vec::new();
        for values in [plain, tied, relu, cube, ramp, vec![0.0; n], vec![f32::NAN; n]] {
            for k in [0, 1, 2, 100, n / 100, n / 10, n / 2, n - 2, n - 1, n] {
                scratch.largest(&values, k, &mut kept);
                assert_eq!(kept, sorted(&values, k), "{k} of {:?}…", &values[..4]);
            }
        }
    }

    #[test]
    fn a_sample_that_misleads_changes_nothing() {
        let n = 4 * SAMPLE;
        let mut values = noise(n);
        let mut scratch = Scratch::default();
        let mut kept = Vec::new();
        // Both wrong: too few reach `low`, and too many reach `high`.
        for (low, high) in [(0.9999f32, 1.0f32), (0.0, 0.001)] {
            scratch.collect(&values, key(low));
            let enough = scratch.count >= 1000;
            assert!(!enough || !scratch.keep(1000, key(high), &mut kept));
        }
        let bounds = scratch.count(&values, 1000);
        scratch.collect(&values, bounds.low);
        assert!(scratch.keep(1000, bounds.high, &mut kept));
        assert_eq!(kept, sorted(&values, 1000));
        // The last element, which no stratum of the sample holds, is the largest.
        values.push(9.0);
        scratch.largest(&values, 1, &mut kept);
        assert_eq!(kept, [n as u32]);
    }
}
