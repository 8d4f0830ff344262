//! How much a link loses whatever is sent, as radio and long links do, and when loss is of a queue that overflows.

use std::collections::VecDeque;

/// Packets of which a share is taken.
const LEAST_PACKETS: u64 = 64;
/// So many shares are remembered.
const REMEMBERED: usize = 4;
/// A share this much above what is usual is of a queue.
const TOLERATED: f64 = 0.1;
/// And at least so many packets: one of five says nothing.
const LEAST_LOST_PACKETS: u64 = 8;
/// No link that loses more is of use.
const MOST: f64 = 0.8;

/// What became of packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) came: u64,
    pub(super) lost: u64,
}

impl Counts {
    pub(super) fn packets(self) -> u64 {
        self.came + self.lost
    }
}

/// Shares of packets lost, of the last few rounds.
#[derive(Clone, Debug, Default)]
pub(super) struct Losses {
    shares: VecDeque<f64>,
    /// Since the last share.
    since: Counts,
    /// While no more was sent than the link delivers, the newest last.
    lean: VecDeque<Counts>,
    /// Shares that are still taken before loss may be of a queue again: whether it was shows in what is lost at less speed.
    patience: usize,
}

impl Losses {
    /// A round is over. Says whether a queue overflows.
    pub(super) fn end_round(&mut self, counts: Counts) -> bool {
        self.since.came += counts.came;
        self.since.lost += counts.lost;
        let packets = self.since.packets();
        let share = self.since.lost as f64 / packets.max(1) as f64;
        let overflows = self.patience == 0
            && packets >= LEAST_PACKETS / 2
            && self.since.lost >= LEAST_LOST_PACKETS
            && share > self.usual() + TOLERATED;
        if packets >= LEAST_PACKETS || overflows {
            self.patience = if overflows { REMEMBERED } else { self.patience.saturating_sub(1) };
            if self.shares.len() == REMEMBERED {
                self.shares.pop_front();
            }
            self.shares.push_back(share);
            self.since = Counts::default();
        }
        overflows
    }

    /// A time is over in which no more was sent than the link delivers.
    pub(super) fn end_lean(&mut self, counts: Counts) {
        if self.lean.len() == REMEMBERED {
            self.lean.pop_front();
        }
        self.lean.push_back(counts);
    }

    /// Share of packets that is lost at any speed. Sending more to make up for it must not be what loses them, so it is no
    /// more than what was lost without.
    pub(super) fn usual(&self) -> f64 {
        let least = self.shares.iter().copied().fold(MOST, f64::min);
        if self.shares.len() < REMEMBERED { 0.0 } else { least.min(self.lean_share()) }
    }

    /// Of the newest packets that are enough to tell.
    fn lean_share(&self) -> f64 {
        let (mut packets, mut lost) = (0, 0);
        for counts in self.lean.iter().rev() {
            (packets, lost) = (packets + counts.packets(), lost + counts.lost);
            if packets >= LEAST_PACKETS {
                break;
            }
        }
        if packets < LEAST_PACKETS / 2 { MOST } else { lost as f64 / packets as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(came: u64, lost: u64) -> Counts {
        Counts { came, lost }
    }

    #[test]
    fn what_is_lost_at_any_speed_is_no_overflow_for_long() {
        let mut losses = Losses::default();
        assert!((0..4).all(|_| !losses.end_round(counts(100, 0))));
        // One of five is lost from now on: once that could be a queue.
        let overflows: Vec<bool> = (0..20).map(|_| losses.end_round(counts(80, 20))).collect();
        assert_eq!(overflows.iter().filter(|o| **o).count(), 1);
        assert!((losses.usual() - 0.2).abs() < 1e-9);
        // Three of five are more than that.
        assert!(losses.end_round(counts(40, 60)));
        // It is over.
        losses.end_round(counts(100, 0));
        assert_eq!(losses.usual(), 0.0);
    }

    #[test]
    fn what_is_lost_only_at_more_speed_is_not_made_up_for() {
        let mut losses = Losses::default();
        (0..8).for_each(|_| _ = losses.end_round(counts(80, 20)));
        assert!((losses.usual() - 0.2).abs() < 1e-9);
        losses.end_lean(counts(10, 0));
        assert!((losses.usual() - 0.2).abs() < 1e-9, "too few to tell");
        losses.end_lean(counts(60, 1));
        assert!(losses.usual() < 0.02);
        losses.end_lean(counts(160, 40));
        assert!((losses.usual() - 0.2).abs() < 1e-9, "the newest count");
    }

    #[test]
    fn a_few_lost_packets_say_nothing() {
        let mut losses = Losses::default();
        assert!(!losses.end_round(counts(1, 4)) && !losses.end_round(counts(30, 2)));
        assert!((0..50).all(|_| !losses.end_round(counts(95, 5))));
    }
}
