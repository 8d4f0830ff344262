//! When a job that goes on with fewer CompNodes than it had takes in those that are there again.

use std::collections::BTreeSet;
use std::time::Duration;

use super::ConnectionId;

/// What is left of a job must take this long, or it is not worth a move.
const LEAST_LEFT: Duration = Duration::from_secs(60);
/// First and longest rest after such a move: where machines come and go, a job must get on, too.
const REST: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));

/// What is remembered of it.
#[derive(Debug, Default)]
pub(super) struct Growth {
    /// The most CompNodes that a placement of the job had.
    most: usize,
    /// Those for which it has moved before: the plan may have left them out.
    tried: BTreeSet<ConnectionId>,
    rest: Duration,
    rest_until: Duration,
}

impl Growth {
    /// It is placed on so many.
    pub(super) fn placed(&mut self, members: usize) {
        self.most = self.most.max(members);
    }

    /// The plan has no use for these. Whom it used and who was lost since then is as welcome as ever.
    pub(super) fn left_out<'a>(&mut self, them: impl Iterator<Item = &'a ConnectionId>) {
        self.tried.extend(them);
    }

    /// Whether it may move now, from `members` CompNodes, `left` before it is done, since some of these are idle.
    pub(super) fn is_due(&self, members: usize, left: Duration, idle: &[ConnectionId], now: Duration) -> bool {
        let are_new = idle.iter().any(|c| !self.tried.contains(c));
        are_new && members < self.most && left >= LEAST_LEFT && now >= self.rest_until
    }

    /// It moves, to these too if the plan will have it so.
    pub(super) fn moves(&mut self, idle: Vec<ConnectionId>, now: Duration) {
        self.tried.extend(idle);
        self.rest = (self.rest * 2).clamp(REST.0, REST.1);
        self.rest_until = now + self.rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whom_a_plan_has_left_out_is_no_reason_to_move() {
        let [b, c, d] = [2, 3, 4].map(ConnectionId);
        let (now, left) = (Duration::from_secs(1000), Duration::from_secs(1000));
        let mut growth = Growth::default();
        growth.placed(3);
        assert!(growth.is_due(2, left, &[c], now));
        growth.left_out([c].iter());
        growth.placed(2);
        assert!(!growth.is_due(2, left, &[c], now));
        assert!(growth.is_due(1, left, &[b], now), "who worked for it, was cut off and is there again may take part");
        assert!(growth.is_due(2, left, &[c, d], now), "another one may be of use");
        growth.moves(vec![c, d], now);
        assert!(!growth.is_due(2, left, &[ConnectionId(5)], now), "it rests");
    }
}
