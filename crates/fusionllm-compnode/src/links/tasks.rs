//! The tasks of a job's wires, and what must happen however they end.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::ExchangeError;
use crate::mailbox::Mailbox;

/// All tasks of a job's wires. Once closed, none runs and none begins.
#[derive(Debug)]
pub(super) struct Tasks {
    state: Mutex<State>,
    mailbox: Arc<Mailbox>,
}

#[derive(Debug, Default)]
struct State {
    set: JoinSet<()>,
    closed: bool,
}

impl Tasks {
    /// No tasks yet. One that panics closes `mailbox`, since nobody else would notice.
    pub(super) fn new(mailbox: Arc<Mailbox>) -> Self {
        Self { state: Mutex::default(), mailbox }
    }

    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return;
        }
        while state.set.try_join_next().is_some() {}
        let watched = Watched(Arc::clone(&self.mailbox));
        state.set.spawn(async move {
            let _watched = watched;
            task.await;
        });
    }

    pub(super) fn close(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.closed = true;
        state.set.abort_all();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed
    }

    /// Tasks that have not ended, or whose end nobody has noticed yet.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.set.try_join_next().is_some() {}
        state.set.len()
    }
}

struct Watched(Arc<Mailbox>);

impl Drop for Watched {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let reason = "a task of the job's wires panicked (internal error)".to_owned();
            self.0.close(ExchangeError::Aborted { reason });
        }
    }
}

/// An outgoing channel that still holds messages. It counts until this is dropped, however its task ends.
pub(super) struct OpenChannel(Arc<watch::Sender<usize>>);

impl OpenChannel {
    pub(super) fn new(open: &Arc<watch::Sender<usize>>) -> Self {
        open.send_modify(|n| *n += 1);
        Self(Arc::clone(open))
    }
}

impl Drop for OpenChannel {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n = n.saturating_sub(1));
    }
}
