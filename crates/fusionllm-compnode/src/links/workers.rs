//! Where messages are encoded and decoded.

use tokio::task::{JoinError, spawn_blocking};

/// Threads that may compute for long, which async workers may not.
#[derive(Clone, Debug, Default)]
pub(super) enum Workers {
    /// The runtime's blocking threads.
    #[default]
    Threads,
    /// Tasks of the runtime itself that take simulated time, so that a seed gives one history.
    #[cfg(test)]
    Simulated(std::sync::Arc<std::sync::Mutex<rand_chacha::ChaCha8Rng>>),
}

impl Workers {
    /// Does some work. It is done to its end even if nobody waits for it any more.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        match self {
            Self::Threads => spawn_blocking(work).await,
            #[cfg(test)]
            Self::Simulated(dice) => {
                let takes = {
                    let mut dice = dice.lock().unwrap();
                    // Now and then so long that its stream is lost, and another one there, before it is done.
                    let longest = if rand::RngExt::random_range(&mut *dice, 0..16) == 0 { 3_000 } else { 20 };
                    rand::RngExt::random_range(&mut *dice, 0..longest)
                };
                let working = tokio::spawn(async move {
                    tokio::time::sleep(std::time::Duration::from_millis(takes)).await;
                    work()
                });
                working.await
            }
        }
    }
}
