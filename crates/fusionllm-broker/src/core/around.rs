//! The search for a plan that does without a cut link.

use std::collections::BTreeSet;

use super::ConnectionId;

/// So many sets of CompNodes are tried before a job waits until a link is back.
const MOST_TRIED: usize = 32;

/// A job is being placed on some of the CompNodes that there are, since the strategy's plan for all of them uses a cut link.
#[derive(Debug)]
pub(super) struct Around {
    /// All that there are.
    all: Vec<ConnectionId>,
    /// Sets that are still to be tried, the next one last.
    next: Vec<Vec<ConnectionId>>,
    seen: BTreeSet<Vec<ConnectionId>>,
    /// What the job waits for if none will do.
    reason: String,
}

impl Around {
    /// Of all these, of which none is left out yet.
    pub(super) fn new(all: Vec<ConnectionId>, reason: String) -> Self {
        Self { all, next: Vec::new(), seen: BTreeSet::new(), reason }
    }

    /// A set that may do.
    pub(super) fn add(&mut self, set: Vec<ConnectionId>) {
        if self.seen.len() < MOST_TRIED && self.seen.insert(set.clone()) {
            self.next.push(set);
        }
    }

    /// The set to try now.
    pub(super) fn take_next(&mut self) -> Option<Vec<ConnectionId>> {
        self.next.pop()
    }

    /// None will do: all that there are, and what the job waits for.
    pub(super) fn give_up(self) -> (Vec<ConnectionId>, String) {
        (self.all, self.reason)
    }
}
