//! Ends work that takes long.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::ExecutorError;

/// Set once; whoever works looks at it between two ops. Clones are the same flag.
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Asks the work to end.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the work may go on.
    ///
    /// # Errors
    /// [`ExecutorError::Stopped`] if it may not.
    pub fn check(&self) -> Result<(), ExecutorError> {
        if self.0.load(Ordering::Relaxed) { Err(ExecutorError::Stopped) } else { Ok(()) }
    }
}
