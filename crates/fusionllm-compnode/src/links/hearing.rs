//! When a packet last came from a peer: a broker that hears nothing of it asks.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use fusionllm_transport::{CloseReason, Session};
use tokio::time::{Instant, sleep};

/// How often it is looked whether something has come.
const EACH: Duration = Duration::from_millis(250);

/// Of one peer, over all connections; nothing before the first.
#[derive(Debug, Default)]
pub(super) struct Heard(Mutex<Option<Instant>>);

impl Heard {
    /// How long ago something came.
    pub(super) fn ago(&self) -> Option<Duration> {
        self.lock().map(|at| at.elapsed())
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
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
