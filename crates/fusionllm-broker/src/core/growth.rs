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
