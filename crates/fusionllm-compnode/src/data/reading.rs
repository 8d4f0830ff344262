//! Reading of data under way: whether it is still wanted, how far it is, and what memory there is for it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::DataError;
use crate::stop::StopFlag;

/// Shared between whoever reads and whoever watches.
#[derive(Debug, Default)]
pub(crate) struct Reading {
    stop: StopFlag,
    /// Grows with every entry, every part of a file and every piece of text.
    progress: AtomicU64,
    /// Bytes of memory that text and tokens may fill, if that is known.
    room: OnceLock<u64>,
    /// Bytes that they fill already.
    held: AtomicU64,
}

impl Reading {
    /// A reading that ends when `stop` is set.
    pub(crate) fn new(stop: StopFlag) -> Self {
        Self { stop, ..Self::default() }
    }

    /// No more memory than `room` may be filled.
    pub(crate) fn limit(&self, room: u64) {
        // The first limit stays.
        let _ = self.room.set(room);
    }

    /// So much more is done, of whatever is counted.
    ///
    /// # Errors
    /// [`DataError::Stopped`] if the data is not wanted any more.
    pub(crate) fn moved(&self, by: usize) -> Result<(), DataError> {
        self.progress.fetch_add(by as u64, Ordering::Relaxed);
        self.check()
    }

    /// Whether the data is still wanted.
    ///
    /// # Errors
    /// [`DataError::Stopped`] if it is not.
    pub(super) fn check(&self) -> Result<(), DataError> {
        self.stop.check().map_err(|_| DataError::Stopped)
    }

    /// How much is done.
    pub(crate) fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }

    /// So many bytes are filled now.
    pub(super) fn holds(&self, bytes: u64) {
        self.held.store(bytes, Ordering::Relaxed);
    }

    /// Whether there is memory for `more` bytes.
    ///
    /// # Errors
    /// [`DataError::Memory`] if there is not.
    pub(super) fn fits(&self, more: u64) -> Result<(), DataError> {
        let needed = self.held.load(Ordering::Relaxed).saturating_add(more);
        match self.room.get() {
            Some(&room) if needed > room => Err(DataError::Memory { needed, room }),
            _ => Ok(()),
        }
    }
}
