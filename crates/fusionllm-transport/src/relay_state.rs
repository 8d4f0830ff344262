//! Whether an endpoint is connected to a relay.

use std::fmt;

/// How an endpoint stands to a relay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayState {
    /// It uses none.
    None,
    /// It is connected to its broker's.
    Connected,
    /// It is not, though it should be.
    Away {
        /// Why, in one line.
        reason: String,
    },
}

/// What follows an address at which nobody answered.
impl fmt::Display for RelayState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::Connected => f.write_str(", nor over the broker's relay"),
            Self::Away { reason } => write!(f, "; the broker's relay is away: {reason}"),
        }
    }
}
