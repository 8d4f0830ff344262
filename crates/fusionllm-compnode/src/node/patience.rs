//! For how long a CompNode goes on with a broker that is there no more.

use std::time::Duration;

/// What is endured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// Heartbeats in a row after which nothing at all came: half a minute, less than the lease that the broker gives. Over
    /// another connection it may answer.
    pub(super) heartbeats: u32,
    /// A job without a broker is dropped after this long, so that it does not fill the memory for ever. The broker has
    /// given the CompNode up long before.
    pub(super) alone: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { heartbeats: 30, alone: Duration::from_secs(600) }
    }
}

/// What is heard of a broker between heartbeats. Counting those and not seconds, a CompNode that was held up itself blames
/// nobody; and counting bytes and not messages, it waits for a large message that takes long.
#[derive(Debug)]
pub(super) struct Hearing {
    bytes: u64,
    unanswered: u32,
}

impl Hearing {
    /// Nothing yet.
    pub(super) fn new() -> Self {
        Self { bytes: 0, unanswered: 0 }
    }

    /// A heartbeat goes out, and `bytes` have come until now: how many went before since something came.
    pub(super) fn heartbeat(&mut self, bytes: u64) -> u32 {
        if bytes != self.bytes {
            *self = Self { bytes, unanswered: 0 };
        }
        self.unanswered += 1;
        self.unanswered - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heartbeats_count_as_unanswered_only_while_nothing_comes() {
        let mut hearing = Hearing::new();
        let counts = [0, 0, 0, 90, 90, 91, 200, 200, 200, 200].map(|bytes| hearing.heartbeat(bytes));
        assert_eq!(counts, [0, 1, 2, 0, 1, 0, 0, 1, 2, 3]);
    }
}
