//! Packets that go out no faster than the link delivers. What is lost of them is lost at any speed; of others, the sender
//! may itself be why.

use std::time::Instant;

use super::losses::Counts;

/// The packets of one such time, and what became of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Lean {
    span: Option<Span>,
    /// Whether others have gone out since.
    is_over: bool,
    counts: Counts,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    first: (Instant, u64),
    last: (Instant, u64),
    packets: u64,
}

impl Lean {
    /// A packet goes out, no faster than the link delivers or faster.
    pub(super) fn sent(&mut self, now: Instant, packet: u64, is_lean: bool) {
        if !is_lean {
            self.is_over = true;
            return;
        }
        if std::mem::take(&mut self.is_over) {
            *self = Self::default();
        }
        let span = self.span.get_or_insert(Span { first: (now, packet), last: (now, packet), packets: 0 });
        span.last = (now, packet);
        span.packets += 1;
    }

    /// A packet that was sent at `sent` has come.
    pub(super) fn confirmed(&mut self, sent: Instant) {
        let is_one = self.span.is_some_and(|span| (span.first.0..=span.last.0).contains(&sent));
        self.counts.came += u64::from(is_one);
    }

    pub(super) fn lost(&mut self, packet: u64) {
        let is_one = self.span.is_some_and(|span| (span.first.1..=span.last.1).contains(&packet));
        self.counts.lost += u64::from(is_one);
    }

    /// How many came and were lost, once that is known of all.
    pub(super) fn take(&mut self) -> Option<Counts> {
        let packets = self.span.filter(|_| self.is_over)?.packets;
        let counts = self.counts;
        if counts.packets() < packets {
            return None;
        }
        *self = Self { is_over: true, ..Self::default() };
        Some(counts)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_became_of_them_is_told_once_it_is_known_of_all() {
        let (mut lean, began) = (Lean::default(), Instant::now());
        let at = |packet: u64| began + Duration::from_millis(packet);
        for packet in 0..40 {
            lean.sent(at(packet), packet, (10..20).contains(&packet) || packet >= 30);
        }
        assert_eq!(lean.take(), None, "the last ones are on their way");
        lean.sent(at(40), 40, false);
        // Of the first ten it was never known, so they do not count.
        for packet in 0..38 {
            lean.confirmed(at(packet));
        }
        lean.lost(29);
        lean.lost(38);
        assert_eq!(lean.take(), None);
        lean.lost(39);
        assert_eq!(lean.take(), Some(Counts { came: 8, lost: 2 }));
        assert_eq!(lean.take(), None);
    }
}
