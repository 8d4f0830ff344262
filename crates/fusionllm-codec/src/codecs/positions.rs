//! Which `k` of `n` positions are kept: a strictly increasing list, in a size that depends on `n` and `k` alone.
//!
//! The shorter of two forms, and nothing where `k = n`:
//!
//! | form | bytes | content |
//! |---|---|---|
//! | Elias-Fano, where shorter | ⌈k·l/8⌉ + ⌈(k + ((n−1) >> l))/8⌉, l = ⌊log2(n/k)⌋ | the `l` low bits of each position, one after the other; then bit `(position >> l) + i` set for the `i`-th position |
//! | bitmap | ⌈n/8⌉ | bit `position` set |

use crate::CodecError;

/// The form and its sizes for `k` of `n`; `k ≤ n < 2^32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    All,
    Bitmap { bytes: u64 },
    EliasFano { low_bits: u32, low_bytes: u64, high_bytes: u64 },
}

impl Form {
    fn of(n: u64, k: u64) -> Self {
        if k == n {
            return Self::All;
        }
        let low_bits = (n / k.max(1)).ilog2();
        let low_bytes = (k * u64::from(low_bits)).div_ceil(8);
        let high_bytes = (k + ((n - 1) >> low_bits)).div_ceil(8);
        let bytes = n.div_ceil(8);
        if low_bytes + high_bytes < bytes {
            Self::EliasFano { low_bits, low_bytes, high_bytes }
        } else {
            Self::Bitmap { bytes }
        }
    }
}

/// Bytes of the positions of `k` of `n`.
pub(crate) fn bytes(n: u64, k: u64) -> u64 {
    match Form::of(n, k) {
        Form::All => 0,
        Form::Bitmap { bytes } => bytes,
        Form::EliasFano { low_bytes, high_bytes, .. } => low_bytes + high_bytes,
    }
}

/// Appends the form of strictly increasing `positions` below `n`.
pub(crate) fn encode(positions: &[u32], n: u64, out: &mut Vec<u8>) {
    match Form::of(n, positions.len() as u64) {
        Form::All => {}
        Form::Bitmap { bytes } => {
            let bitmap = zeros(out, bytes);
            for &position in positions {
                bitmap[position as usize / 8] |= 1 << (position % 8);
            }
        }
        Form::EliasFano { low_bits, high_bytes, .. } => {
            write_low(positions, low_bits, out);
            let high = zeros(out, high_bytes);
            for (i, &position) in positions.iter().enumerate() {
                let bit = (position >> low_bits) as usize + i;
                high[bit / 8] |= 1 << (bit % 8);
            }
        }
    }
}

fn zeros(out: &mut Vec<u8>, count: u64) -> &mut [u8] {
    let start = out.len();
    out.resize(start + count as usize, 0);
    &mut out[start..]
}

fn write_low(positions: &[u32], low_bits: u32, out: &mut Vec<u8>) {
    let mask = (1u64 << low_bits) - 1;
    let (mut pending, mut filled) = (0u64, 0);
    for &position in positions {
        // At most 31 + 32 bits are pending.
        pending |= (u64::from(position) & mask) << filled;
        filled += low_bits;
        if filled >= 32 {
            out.extend_from_slice(&(pending as u32).to_le_bytes());
            pending >>= 32;
            filled -= 32;
        }
    }
    out.extend_from_slice(&pending.to_le_bytes()[..filled.div_ceil(8) as usize]);
}

/// Replaces `into` by the `k` positions below `n` that `bytes`, of the length that [`bytes`] says, encode.
pub(crate) fn decode(
    codec: &'static str,
    mut bytes: &[u8],
    n: u64,
    k: usize,
    into: &mut Vec<u32>,
) -> Result<(), CodecError> {
    into.clear();
    match Form::of(n, k as u64) {
        Form::All => into.extend(0..n as u32),
        Form::Bitmap { bytes: count } => {
            let bitmap = super::take(codec, &mut bytes, count)?;
            read_bits(codec, bitmap, k, n, into, |bit, _| bit)?;
        }
        Form::EliasFano { low_bits, low_bytes, high_bytes } => {
            let mut low = LowBits::new(super::take(codec, &mut bytes, low_bytes)?, low_bits);
            let high = super::take(codec, &mut bytes, high_bytes)?;
            read_bits(codec, high, k, n, into, |bit, i| (bit - i) << low_bits | low.next())?;
            if !low.only_zeros_are_left() {
                return Err(CodecError::Corrupt { codec, what: "padding bits are not zero" });
            }
        }
    }
    Ok(())
}

/// Pushes `position(bit, i)` for the `i`-th set bit, and holds that there are `k`, increasing and below `n`.
///
/// A set padding bit leads to a position beyond `n` or to a bit too many.
fn read_bits(
    codec: &'static str,
    bytes: &[u8],
    k: usize,
    n: u64,
    into: &mut Vec<u32>,
    mut position: impl FnMut(u64, u64) -> u64,
) -> Result<(), CodecError> {
    let corrupt = |what| CodecError::Corrupt { codec, what };
    into.reserve(k);
    let mut least = 0;
    for (word_index, chunk) in bytes.chunks(8).enumerate() {
        let mut padded = [0; 8];
        padded[..chunk.len()].copy_from_slice(chunk);
        let mut word = u64::from_le_bytes(padded);
        while word != 0 {
            if into.len() == k {
                return Err(corrupt("it marks more positions than are kept"));
            }
            let bit = word_index as u64 * 64 + u64::from(word.trailing_zeros());
            word &= word - 1;
            let next = position(bit, into.len() as u64);
            if next < least || next >= n {
                return Err(corrupt("positions do not increase or leave the tensor"));
            }
            least = next + 1;
            into.push(next as u32);
        }
    }
    if into.len() < k { Err(corrupt("it marks fewer positions than are kept")) } else { Ok(()) }
}

/// Reads fields of the same width one after the other.
struct LowBits<'a> {
    rest: &'a [u8],
    width: u32,
    pending: u64,
    filled: u32,
}

impl<'a> LowBits<'a> {
    fn new(rest: &'a [u8], width: u32) -> Self {
        Self { rest, width, pending: 0, filled: 0 }
    }

    /// The next field; zeros beyond the end.
    fn next(&mut self) -> u64 {
        if self.filled < self.width {
            // Fewer than 32 bits are pending.
            if let Some((word, rest)) = self.rest.split_first_chunk::<4>() {
                self.pending |= u64::from(u32::from_le_bytes(*word)) << self.filled;
                self.rest = rest;
            } else {
                for (i, &byte) in self.rest.iter().enumerate() {
                    self.pending |= u64::from(byte) << (self.filled + 8 * i as u32);
                }
                self.rest = &[];
            }
            self.filled += 32;
        }
        let field = self.pending & ((1u64 << self.width) - 1);
        self.pending >>= self.width;
        self.filled -= self.width;
        field
    }

    fn only_zeros_are_left(&self) -> bool {
        self.pending == 0 && self.rest.iter().all(|&byte| byte == 0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `n`, and some of the positions below it.
    fn subset() -> impl Strategy<Value = (u64, Vec<u32>)> {
        (1u64..3000, 0u32..100).prop_flat_map(|(n, percent)| {
            prop::collection::vec(0u32..100, n as usize)
                .prop_map(move |draws| (n, (0..n as u32).filter(|&i| draws[i as usize] < percent).collect()))
        })
    }

    proptest! {
        #[test]
        fn positions_round_trip_in_the_predicted_size((n, positions) in subset()) {
            let mut out = vec![7];
            encode(&positions, n, &mut out);
            prop_assert_eq!(out.len() as u64, 1 + bytes(n, positions.len() as u64));
            let mut back = Vec::new();
            decode("topk", &out[1..], n, positions.len(), &mut back).unwrap();
            prop_assert_eq!(back, positions);
        }

        #[test]
        fn any_bytes_are_positions_or_an_error(
            n in 1u64..500, share in 0.0..1.0, seed in prop::collection::vec(any::<u8>(), 0..80)
        ) {
            let k = (n as f64 * share) as usize;
            let mut given = seed;
            given.resize(bytes(n, k as u64) as usize, 0);
            let mut back = Vec::new();
            if decode("topk", &given, n, k, &mut back).is_ok() {
                let mut again = Vec::new();
                encode(&back, n, &mut again);
                prop_assert_eq!(again, given, "two encodings of the same positions");
            }
        }
    }

    #[test]
    fn one_position_in_a_hundred_costs_near_the_entropy() {
        let n = 4 << 20;
        let k = n / 100;
        // The entropy is 1.01 bytes.
        assert!((bytes(n, k) as f64) < 1.075 * k as f64);
        assert_eq!(bytes(n, n), 0);
        assert_eq!(bytes(n, n / 2), n / 8);
    }

    #[test]
    fn the_largest_tensors_are_counted_without_overflow() {
        let n = u64::from(u32::MAX);
        assert_eq!(bytes(n, 1), 4 + 1);
        assert_eq!(bytes(n, n - 1), n.div_ceil(8));
        let mut out = Vec::new();
        encode(&[u32::MAX - 1], n, &mut out);
        let mut back = Vec::new();
        decode("topk", &out, n, 1, &mut back).unwrap();
        assert_eq!(back, [u32::MAX - 1]);
    }
}
