//! The share of a tensor's entries that a sparse codec keeps.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::CodecError;

const MILLION: u32 = 1_000_000;

/// A share of entries in parts per million, from 1 to 1,000,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Density(u32);

impl Density {
    /// Every entry.
    pub const FULL: Self = Self(MILLION);

    /// That many entries in a million.
    ///
    /// # Errors
    /// [`CodecError::Density`] for 0 and for more than a million.
    pub fn from_ppm(ppm: u32) -> Result<Self, CodecError> {
        if (1..=MILLION).contains(&ppm) { Ok(Self(ppm)) } else { Err(CodecError::Density { given: ppm.to_string() }) }
    }

    /// The nearest density to a share of 1.
    ///
    /// # Errors
    /// [`CodecError::Density`] if the share rounds to no density.
    pub fn from_share(share: f64) -> Result<Self, CodecError> {
        // The cast saturates, and makes 0 of NaN.
        Self::from_ppm((share * f64::from(MILLION)).round() as u32)
            .map_err(|_| CodecError::Density { given: format!("{share} x 1e6") })
    }

    /// Kept entries in a million.
    pub fn ppm(self) -> u32 {
        self.0
    }

    /// Kept entries as a share of 1.
    pub fn share(self) -> f64 {
        f64::from(self.0) / f64::from(MILLION)
    }

    /// How many of `n` entries are kept: the share rounded up, so at least 1 unless there are none.
    pub fn kept(self, n: u64) -> u64 {
        let million = u64::from(MILLION);
        let (whole, rest) = (n / million, n % million);
        whole * u64::from(self.0) + (rest * u64::from(self.0)).div_ceil(million)
    }
}

impl TryFrom<u32> for Density {
    type Error = CodecError;

    fn try_from(ppm: u32) -> Result<Self, CodecError> {
        Self::from_ppm(ppm)
    }
}

impl From<Density> for u32 {
    fn from(density: Density) -> Self {
        density.0
    }
}

/// The share of 1 in the fewest digits: `0.01`.
impl fmt::Display for Density {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.share())
    }
}

/// A share of 1 in whole parts per million: `0.01`, `1`, `0.000001`.
impl FromStr for Density {
    type Err = CodecError;

    fn from_str(text: &str) -> Result<Self, CodecError> {
        let wrong = || CodecError::Density { given: text.to_owned() };
        let share: f64 = text.parse().map_err(|_| wrong())?;
        let density = Self::from_share(share).map_err(|_| wrong())?;
        if (density.share() - share).abs() < 1e-9 { Ok(density) } else { Err(wrong()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn text_round_trips(ppm in 1u32..=MILLION) {
            let density = Density::from_ppm(ppm).unwrap();
            prop_assert_eq!(density.to_string().parse::<Density>().unwrap(), density);
        }

        #[test]
        fn kept_is_the_share_rounded_up(n in 0u64..1 << 40, ppm in 1u32..=MILLION) {
            let kept = Density::from_ppm(ppm).unwrap().kept(n);
            let exact = (u128::from(n) * u128::from(ppm)).div_ceil(1_000_000);
            prop_assert_eq!(u128::from(kept), exact);
            prop_assert!(kept <= n && (kept > 0 || n == 0));
        }
    }

    #[test]
    fn what_is_no_share_is_refused() {
        for text in ["0", "1.1", "-0.1", "nan", "inf", "1e-7", "0.0000015", "", "x"] {
            assert!(text.parse::<Density>().is_err(), "{text}");
        }
        assert!(Density::from_ppm(0).is_err() && Density::from_ppm(MILLION + 1).is_err());
    }
}
