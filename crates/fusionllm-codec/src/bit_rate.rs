//! How many bits an element may cost.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::CodecError;

/// Bits an element in thousandths, from 0.01 to 8 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct BitRate(u32);

impl BitRate {
    /// The lowest rate there is, 0.01 bits.
    pub const LEAST: Self = Self(10);
    /// The highest, 8 bits.
    pub const MOST: Self = Self(8_000);

    /// That many thousandths of a bit.
    ///
    /// # Errors
    /// [`CodecError::BitRate`] below 10 and above 8,000.
    pub fn from_thousandths(thousandths: u32) -> Result<Self, CodecError> {
        let rate = Self(thousandths);
        if (Self::LEAST..=Self::MOST).contains(&rate) {
            Ok(rate)
        } else {
            Err(CodecError::BitRate { given: rate.to_string() })
        }
    }

    /// The rate in thousandths of a bit an element.
    pub fn thousandths(self) -> u32 {
        self.0
    }

    /// Whole bytes that `elements` may cost.
    pub(crate) fn bytes(self, elements: u64) -> u64 {
        let whole = elements / 8_000 * u64::from(self.0);
        whole + (elements % 8_000 * u64::from(self.0)) / 8_000
    }
}

impl TryFrom<u32> for BitRate {
    type Error = CodecError;

    fn try_from(thousandths: u32) -> Result<Self, CodecError> {
        Self::from_thousandths(thousandths)
    }
}

impl From<BitRate> for u32 {
    fn from(rate: BitRate) -> Self {
        rate.0
    }
}

/// The bits in the fewest digits: `2`, `0.5`.
impl fmt::Display for BitRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", f64::from(self.0) / 1e3)
    }
}

/// Bits in whole thousandths: `2`, `0.5`, `0.125`.
impl FromStr for BitRate {
    type Err = CodecError;

    fn from_str(text: &str) -> Result<Self, CodecError> {
        let wrong = || CodecError::BitRate { given: text.to_owned() };
        let bits: f64 = text.parse().map_err(|_| wrong())?;
        // The cast saturates, and makes 0 of NaN.
        let rate = Self::from_thousandths((bits * 1e3).round() as u32).map_err(|_| wrong())?;
        if (f64::from(rate.0) / 1e3 - bits).abs() < 1e-9 { Ok(rate) } else { Err(wrong()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn text_round_trips(thousandths in 10u32..=8_000) {
            let rate = BitRate::from_thousandths(thousandths).unwrap();
            prop_assert_eq!(rate.to_string().parse::<BitRate>().unwrap(), rate);
        }

        #[test]
        fn bytes_are_the_bits_rounded_down(elements in 0u64..1 << 40, thousandths in 10u32..=8_000) {
            let bytes = BitRate::from_thousandths(thousandths).unwrap().bytes(elements);
            prop_assert_eq!(u128::from(bytes), u128::from(elements) * u128::from(thousandths) / 8_000);
        }
    }

    #[test]
    fn what_is_no_rate_is_refused() {
        for text in ["0", "0.009", "8.001", "-1", "nan", "inf", "1.0005", "", "x"] {
            let error = text.parse::<BitRate>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{text}`")), "{error}");
        }
        assert!(BitRate::from_thousandths(9).is_err() && BitRate::from_thousandths(8_001).is_err());
    }
}
