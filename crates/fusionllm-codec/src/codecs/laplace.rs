//! Entropy coding of integers that are spread around zero like a Laplace distribution, each group by its own scale.
//!
//! A group's scale is a byte. 0 says that all are zero, and nothing of the group is coded. From 1 to [`MODELS`] it names
//! a model of mean magnitude 2^((scale − 41) / 4), so from 2^-10 to 4. Above, the last four models repeat, with one more
//! of the lowest bits of each integer sent as they are from octave to octave. A range coder (the crate constriction)
//! writes the symbols: in each group, one after the other, the integer without those low bits, and then the low bits.
//!
//! A model's probabilities are integers out of 2^16, computed by additions, multiplications, divisions and square roots
//! alone, which IEEE 754 makes the same on every machine.

use std::borrow::Borrow;
use std::num::NonZeroU32;
use std::sync::OnceLock;

use constriction::UnwrapInfallible;
use constriction::stream::model::{DecoderModel, EncoderModel, EntropyModel};
use constriction::stream::queue::{DefaultRangeDecoder, DefaultRangeEncoder};
use constriction::stream::{Decode, Encode};

/// Models, and the scales that need no low bits.
const MODELS: usize = 49;
/// Models of an octave.
const OCTAVE: usize = 4;
/// 2^(1/4).
const QUARTER_OCTAVE: f64 = 1.189_207_115_002_721;
/// Mean magnitude of the first model.
const LEAST_MEAN: f64 = 1.0 / 1024.0;
/// Low bits of an integer at the most, and bits of what is beyond a model's range.
const MOST_BITS: u32 = 24;
/// Largest magnitude that is coded.
pub(crate) const MOST: i32 = (1 << (MOST_BITS - 1)) - 1;
const PRECISION: usize = 16;
const TOTAL: u32 = 1 << PRECISION;
/// Low bits that are written at a time.
const CHUNK: u32 = 12;
/// Magnitudes less likely than this have no symbol of their own.
const LEAST_PROBABILITY: f64 = 1.0 / 8192.0;
/// Costs are counted in this many parts of a bit.
pub(crate) const COST_OF_A_BIT: u64 = 1 << 12;

/// Probabilities of 0, 1, -1, 2, -2 and so on, and of everything beyond.
#[derive(Debug)]
struct Model {
    /// Where each symbol begins, and [`TOTAL`].
    starts: Vec<u32>,
    /// Costs of zero, of a magnitude of 1, and of each further one.
    costs: [u64; 3],
}

impl Model {
    /// Of integers whose magnitude is `mean` on average: 0 with probability 1 − s, and ±k with s^(2k−1)·(1 − s²) / 2.
    fn of_mean(mean: f64) -> Self {
        let s = ((1.0 + 4.0 * mean * mean).sqrt() - 1.0) / (2.0 * mean);
        let (ratio, mut either) = (s * s, s * (1.0 - s * s) / 2.0);
        let costs = [1.0 - s, either, ratio].map(|p| (-p.log2() * COST_OF_A_BIT as f64).round() as u64);
        let mut shares = Vec::new();
        while either > LEAST_PROBABILITY || shares.is_empty() {
            shares.extend([either, either]);
            either *= ratio;
        }
        // All magnitudes from here on, of both signs.
        shares.push(2.0 * either / (1.0 - ratio));
        let counts: Vec<u32> = shares.iter().map(|share| ((share * f64::from(TOTAL)) as u32).max(1)).collect();
        let mut starts = vec![0, TOTAL - counts.iter().sum::<u32>()];
        for count in counts {
            starts.push(starts[starts.len() - 1] + count);
        }
        Self { starts, costs }
    }

    /// The symbol of all that has none of its own.
    fn beyond(&self) -> u32 {
        self.starts.len() as u32 - 2
    }

    fn place(&self, symbol: u32) -> Option<(u32, NonZeroU32)> {
        let symbol = symbol as usize;
        let (start, end) = (*self.starts.get(symbol)?, *self.starts.get(symbol + 1)?);
        Some((start, NonZeroU32::new(end - start)?))
    }
}

impl EntropyModel<PRECISION> for &Model {
    type Symbol = u32;
    type Probability = u32;
}

impl EncoderModel<PRECISION> for &Model {
    fn left_cumulative_and_probability(&self, symbol: impl Borrow<u32>) -> Option<(u32, NonZeroU32)> {
        self.place(*symbol.borrow())
    }
}

impl DecoderModel<PRECISION> for &Model {
    fn quantile_function(&self, quantile: u32) -> (u32, u32, NonZeroU32) {
        // The most likely come first.
        let symbol = self.starts[1..].iter().take_while(|&&end| end <= quantile).count() as u32;
        let symbol = symbol.min(self.beyond());
        let (start, share) = self.place(symbol).unwrap_or((0, NonZeroU32::MIN));
        (symbol, start, share)
    }
}

/// So many bits, all as likely.
#[derive(Clone, Copy, Debug)]
struct Plain(u32);

impl Plain {
    fn share(self) -> NonZeroU32 {
        NonZeroU32::new(TOTAL >> self.0).unwrap_or(NonZeroU32::MIN)
    }
}

impl EntropyModel<PRECISION> for Plain {
    type Symbol = u32;
    type Probability = u32;
}

impl EncoderModel<PRECISION> for Plain {
    fn left_cumulative_and_probability(&self, symbol: impl Borrow<u32>) -> Option<(u32, NonZeroU32)> {
        let start = *symbol.borrow() * self.share().get();
        (start < TOTAL).then_some((start, self.share()))
    }
}

impl DecoderModel<PRECISION> for Plain {
    fn quantile_function(&self, quantile: u32) -> (u32, u32, NonZeroU32) {
        let symbol = quantile / self.share();
        (symbol, symbol * self.share().get(), self.share())
    }
}

fn models() -> &'static [Model] {
    static MODELS_MADE: OnceLock<Vec<Model>> = OnceLock::new();
    MODELS_MADE.get_or_init(|| {
        let means = std::iter::successors(Some(LEAST_MEAN), |mean| Some(mean * QUARTER_OCTAVE));
        means.take(MODELS).map(Model::of_mean).collect()
    })
}

/// A scale's model and low bits; none for 0 and for what is no scale.
fn model(scale: u8) -> Option<(&'static Model, u32)> {
    let index = usize::from(scale).checked_sub(1)?;
    let (place, low_bits) = match index.checked_sub(MODELS) {
        None => (index, 0),
        Some(above) => (MODELS - OCTAVE + above % OCTAVE, (above / OCTAVE) as u32 + 1),
    };
    (low_bits <= MOST_BITS).then(|| (&models()[place], low_bits))
}

/// Whether a group may have this scale.
pub(crate) fn is_scale(scale: u8) -> bool {
    scale == 0 || model(scale).is_some()
}

/// What decides the scale of a group and what it costs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Tally {
    /// Integers that are not 0.
    pub(crate) nonzero: u64,
    /// Sum of the magnitudes, each at most [`MOST`].
    pub(crate) sum: u64,
}

impl Tally {
    /// The scale of a group of so many integers.
    pub(crate) fn scale(self, count: usize) -> u8 {
        if self.sum == 0 || count == 0 {
            return 0;
        }
        // Each scale ends halfway to the next, by ratio.
        let mut end = LEAST_MEAN * QUARTER_OCTAVE.sqrt();
        let mean = self.sum as f64 / count as f64;
        let mut scale = 1;
        while mean > end {
            end *= QUARTER_OCTAVE;
            scale += 1;
        }
        scale
    }

    /// What coding the group costs, nearly, in parts of a bit ([`COST_OF_A_BIT`]).
    pub(crate) fn cost(self, count: usize) -> u64 {
        let Some((model, low_bits)) = model(self.scale(count)) else { return 0 };
        let [zero, one, further] = model.costs;
        let count = count as u64;
        // Dropping low bits makes some of the integers 0: as many as the model expects, at least.
        let sum = self.sum >> low_bits;
        let nonzero = if low_bits == 0 { self.nonzero } else { self.nonzero.min(sum) };
        (count - nonzero) * zero
            + nonzero * one
            + (sum - nonzero) * further
            + count * u64::from(low_bits) * COST_OF_A_BIT
    }
}

/// Writes groups.
#[derive(Debug, Default)]
pub(crate) struct Writer(DefaultRangeEncoder);

/// A model that has no place for a symbol: a defect of this module.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Impossible;

impl Writer {
    /// A group of this scale, of magnitudes of [`MOST`] at the most.
    pub(crate) fn group(&mut self, scale: u8, integers: &[i32]) -> Result<(), Impossible> {
        let Some((model, low_bits)) = model(scale) else { return Ok(()) };
        for &integer in integers {
            // Arithmetic, so that the low bits count upwards from what remains.
            let high = integer >> low_bits;
            let symbol = 2 * high.unsigned_abs() - u32::from(high > 0);
            let beyond = model.beyond();
            self.0.encode_symbol(symbol.min(beyond), model).map_err(|_| Impossible)?;
            if symbol >= beyond {
                self.plain(symbol - beyond, MOST_BITS)?;
            }
            self.plain(integer as u32 & ((1 << low_bits) - 1), low_bits)?;
        }
        Ok(())
    }

    fn plain(&mut self, value: u32, bits: u32) -> Result<(), Impossible> {
        for at in (0..bits).step_by(CHUNK as usize) {
            let width = CHUNK.min(bits - at);
            let part = value >> at & ((1 << width) - 1);
            self.0.encode_symbol(part, Plain(width)).map_err(|_| Impossible)?;
        }
        Ok(())
    }

    /// Bytes that it has written so far.
    pub(crate) fn bytes(&self) -> usize {
        self.0.num_words() * size_of::<u32>()
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        // `RangeEncoder::clear` of constriction 0.5.0 keeps the words that it holds back.
        self.0 = DefaultRangeEncoder::new();
    }

    /// Appends what was written.
    pub(crate) fn append_to(&mut self, out: &mut Vec<u8>) {
        for word in self.0.get_compressed().iter() {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }
}

/// Reads groups.
#[derive(Debug)]
pub(crate) struct Reader(DefaultRangeDecoder);

/// Bytes that no [`Writer`] writes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Invalid;

impl Reader {
    /// Of what a writer has written; any bytes are taken, and zeros follow them.
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let words: Vec<u32> = bytes.as_chunks::<4>().0.iter().map(|&word| u32::from_le_bytes(word)).collect();
        Self(DefaultRangeDecoder::from_compressed(words).unwrap_infallible())
    }

    /// The next integers, of a group of this scale.
    pub(crate) fn group(&mut self, scale: u8, count: usize, mut each: impl FnMut(i64)) -> Result<(), Invalid> {
        let Some((model, low_bits)) = model(scale) else {
            (0..count).for_each(|_| each(0));
            return Ok(());
        };
        for _ in 0..count {
            let mut symbol = self.0.decode_symbol(model).map_err(|_| Invalid)?;
            if symbol == model.beyond() {
                symbol += self.plain(MOST_BITS)?;
            }
            let magnitude = i64::from(symbol.div_ceil(2));
            let high = if symbol % 2 == 1 { magnitude } else { -magnitude };
            each((high << low_bits) + i64::from(self.plain(low_bits)?));
        }
        Ok(())
    }

    fn plain(&mut self, bits: u32) -> Result<u32, Invalid> {
        let mut value = 0;
        for at in (0..bits).step_by(CHUNK as usize) {
            value |= self.0.decode_symbol(Plain(CHUNK.min(bits - at))).map_err(|_| Invalid)? << at;
        }
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tally(integers: &[i32]) -> Tally {
        Tally {
            nonzero: integers.iter().filter(|&&i| i != 0).count() as u64,
            sum: integers.iter().map(|i| u64::from(i.unsigned_abs())).sum(),
        }
    }

    fn round_trip(groups: &[Vec<i32>]) -> usize {
        let mut writer = Writer::default();
        let scales: Vec<u8> = groups.iter().map(|group| tally(group).scale(group.len())).collect();
        for (group, &scale) in groups.iter().zip(&scales) {
            writer.group(scale, group).unwrap();
        }
        let mut bytes = Vec::new();
        writer.append_to(&mut bytes);
        assert_eq!(bytes.len(), writer.bytes());
        let mut reader = Reader::new(&bytes);
        for (group, &scale) in groups.iter().zip(&scales) {
            let mut back = Vec::new();
            reader.group(scale, group.len(), |integer| back.push(integer)).unwrap();
            assert!(back.iter().zip(group).all(|(&a, &b)| a == i64::from(b)), "{back:?} {group:?}");
            assert_eq!(back.len(), group.len());
        }
        bytes.len()
    }

    fn any_group() -> impl Strategy<Value = Vec<i32>> {
        let integer = prop_oneof![5 => -3i32..=3, 2 => -40i32..=40, 1 => -MOST..=MOST];
        prop_oneof![prop::collection::vec(integer, 0..60), prop::collection::vec(-MOST..=MOST, 0..60), Just(vec![0; 9])]
    }

    proptest! {
        #[test]
        fn every_group_comes_back(groups in prop::collection::vec(any_group(), 0..8)) {
            round_trip(&groups);
        }

        #[test]
        fn any_bytes_are_integers_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..80), scale in any::<u8>()) {
            let mut count = 0;
            if Reader::new(&bytes).group(scale, 50, |_| count += 1).is_ok() {
                prop_assert_eq!(count, 50);
            }
        }
    }

    /// Integers with the magnitudes of a Laplace distribution, evenly drawn.
    fn laplace(count: usize, mean: f64) -> Vec<i32> {
        let quantile = |i: usize| (i as f64 + 0.5) / count as f64;
        let magnitude = |p: f64| (-mean * (1.0 - p).ln()).round() as i32;
        (0..count).map(|i| magnitude(quantile(i)) * if i % 2 == 0 { 1 } else { -1 }).collect()
    }

    #[test]
    fn a_writer_that_is_used_again_starts_anew() {
        let mut writer = Writer::default();
        for seed in 0..400 {
            let group: Vec<i32> = (0..300).map(|i| ((i * 7919 + seed * 104_729) % 11 - 5) * ((i + seed) % 3)).collect();
            let scale = tally(&group).scale(group.len());
            writer.clear();
            writer.group(scale, &group).unwrap();
            let (mut bytes, mut back) = (Vec::new(), Vec::new());
            writer.append_to(&mut bytes);
            Reader::new(&bytes).group(scale, group.len(), |integer| back.push(integer as i32)).unwrap();
            assert_eq!(back, group, "{seed}");
        }
    }

    #[test]
    fn the_size_is_near_the_entropy_and_as_foretold() {
        for mean in [0.1, 0.3, 0.7, 3.0, 11.0, 900.0, 200_000.0] {
            let group = laplace(20_000, mean);
            let mut counts = std::collections::BTreeMap::<i32, f64>::new();
            group.iter().for_each(|&i| *counts.entry(i).or_default() += 1.0);
            let entropy: f64 = counts.values().map(|c| c * (20_000.0 / c).log2() / 8.0).sum();
            let bytes = round_trip(std::slice::from_ref(&group)) as f64;
            let foretold = tally(&group).cost(group.len()) as f64 / (8 * COST_OF_A_BIT) as f64;
            // So few integers cannot show the entropy of the widest.
            assert!(bytes < 1.04 * entropy + 8.0 || mean > 100.0, "{mean}: {bytes} of {entropy}");
            assert!((bytes / foretold - 1.0).abs() < 0.02, "{mean}: {bytes}, foretold {foretold}");
        }
    }

    #[test]
    fn models_are_the_same_everywhere() {
        // Of mean 1, for which s is (√5 − 1) / 2: zero and one have shares of 0.382 and 0.191.
        let middle = &models()[40];
        assert_eq!(middle.starts[..6], [0, 25042, 37558, 50074, 54854, 59634]);
        assert!(models().iter().all(|model| model.starts.windows(2).all(|pair| pair[0] < pair[1])));
        assert!(models().iter().all(|model| model.starts.last() == Some(&TOTAL)));
        assert_eq!([is_scale(0), is_scale(49), is_scale(145), is_scale(146)], [true, true, true, false]);
    }
}
