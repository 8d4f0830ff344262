//! A thread or task that lives as long as the broker, and whose early end must not go unnoticed.

use tokio::task::JoinHandle;

/// Such a thread or task.
#[derive(Debug)]
pub(super) struct Watched {
    name: &'static str,
    handle: JoinHandle<()>,
    /// Then the handle is not asked again.
    has_ended: bool,
}

impl Watched {
    pub(super) fn new(name: &'static str, handle: JoinHandle<()>) -> Self {
        Self { name, handle, has_ended: false }
    }

    /// Resolves when it has ended, and logs if that was by a panic.
    pub(super) async fn ended(&mut self) {
        if self.has_ended {
            return;
        }
        if let Err(error) = (&mut self.handle).await {
            tracing::error!(%error, "{} has failed", self.name);
        }
        self.has_ended = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn an_end_is_seen_however_it_came_and_asked_for_twice() {
        for panics in [false, true] {
            let mut watched = Watched::new("a task", tokio::spawn(async move { assert!(!panics, "a defect") }));
            watched.ended().await;
            watched.ended().await;
        }
    }
}
