//! When a packet last came from a peer: a broker that hears nothing of it asks.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use fusionllm_transport::{CloseReason, Session};
use tokio::time::{Instant, sleep};

/// How often it is looked whether something has come.
const EACH: Duration = Duration::from_millis(250);

/// A peer with which there was no connection yet is silent after this long.
const NEVER: Duration = Duration::from_secs(10);

/// Of one peer, over all connections.
#[derive(Debug)]
pub(super) struct Heard {
    /// Nothing before the first.
    last: Mutex<Option<Instant>>,
    began: Instant,
}

impl Default for Heard {
    fn default() -> Self {
        Self { last: Mutex::default(), began: Instant::now() }
    }
}

impl Heard {
    /// How long ago something came; nothing if nothing ever did, and that is too soon to say.
    pub(super) fn ago(&self) -> Option<Duration> {
        let never = || Some(self.began.elapsed()).filter(|since| *since >= NEVER);
        self.lock().map(|at| at.elapsed()).or_else(never)
    }

    /// Watches a connection to its end. Gives why it ended.
    pub(super) async fn watch(&self, session: &Session) -> CloseReason {
        let closed = session.closed();
        tokio::pin!(closed);
        let mut bytes = None;
        loop {
            // Packets that only confirm or ask whether somebody is there count, too.
            let received = Some(session.stats().bytes_received);
            if received != bytes {
                bytes = received;
                *self.lock() = Some(Instant::now());
            }
            tokio::select! {
                biased;
                reason = &mut closed => return reason,
                () = sleep(EACH) => {}
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
