//! Whether the link's speed still grows, while more and more is asked for.

use super::round::Round;

/// What counts as growth of the link's speed.
pub(super) const GROWTH: f64 = 1.25;
/// Growing is over when the link's speed has not grown by [`GROWTH`] for so many rounds.
const FULL_ROUNDS: u32 = 2;

/// The last growth by [`GROWTH`].
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LastGrowth {
    /// The speed that it came to, in bytes a second.
    bytes_per_s: f64,
    /// Rounds since then that showed the link's speed.
    rounds_since: u32,
}

impl LastGrowth {
    /// To the speed of this round.
    pub(super) fn to(round: &Round) -> Self {
        Self { bytes_per_s: round.bytes_per_s, rounds_since: 0 }
    }

    /// A round is over.
    pub(super) fn see(&mut self, round: &Round) {
        if self.goes_on(round) {
            *self = Self::to(round);
        } else if round.is_of_link {
            self.rounds_since += 1;
        }
    }

    /// Whether the speed has grown again in this round.
    pub(super) fn goes_on(&self, round: &Round) -> bool {
        round.bytes_per_s >= self.bytes_per_s * GROWTH
    }

    /// Whether the speed grows no more.
    pub(super) fn is_over(&self) -> bool {
        self.rounds_since >= FULL_ROUNDS
    }
}
