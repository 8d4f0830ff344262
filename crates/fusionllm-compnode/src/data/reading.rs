//! Reading of data under way: whether it is still wanted, how far it is, and what memory there is for it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::DataError;
use crate::stop::StopFlag;

/// Shared between whoever reads and whoever watches.
#[derive(Debug, Default)]
pub struct Reading {
    stop: StopFlag,
    /// Grows with every entry, every part of a file and every piece of text.
    progress: AtomicU64,
    /// Bytes of memory that text and tokens may fill, if that is known.
    room: OnceLock<u64>,
    /// Bytes that they fill already.
    held: AtomicU64,
    /// Bytes of the data, and how many of them have become tokens.
    total: AtomicU64,
    done: AtomicU64,
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

    /// The data has so many bytes.
    pub(super) fn begins(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
    }

    /// So many more of them have become tokens.
    pub(super) fn became_tokens(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes of the data that have become tokens, and of all the data; 0 as long as that is not known.
    pub fn bytes(&self) -> (u64, u64) {
        let total = self.total.load(Ordering::Relaxed);
        (self.done.load(Ordering::Relaxed).min(total), total)
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
