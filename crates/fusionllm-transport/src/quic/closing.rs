//! Endpoints are closed however they end, so that their peers know.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use iroh::Endpoint;
use tokio::time::{Instant, sleep};

/// How long closing may take before a process ends.
const LIMIT: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Those of this process that are not known to be closed.
static OPEN: Mutex<Vec<Endpoint>> = Mutex::new(Vec::new());

fn open() -> MutexGuard<'static, Vec<Endpoint>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has [`close_all`] close it.
pub(crate) fn remember(endpoint: &Endpoint) {
    let mut open = open();
    open.retain(|endpoint| !endpoint.is_closed());
    open.push(endpoint.clone());
}

/// Closes an endpoint that nobody uses any more, if there is a runtime to do it.
pub(crate) fn close_later(endpoint: Endpoint) {
    if let Ok(runtime) = tokio::runtime::Handle::try_current()
        && !endpoint.is_closed()
    {
        runtime.spawn(async move { endpoint.close().await });
    }
}

/// Closes every endpoint of this process that is still open, so that the peers know; two seconds at most. For the end of
/// a process, however it comes to it.
pub async fn close_all() {
    let endpoints: Vec<_> = open().drain(..).filter(|endpoint| !endpoint.is_closed()).collect();
    for endpoint in &endpoints {
        let endpoint = endpoint.clone();
        tokio::spawn(async move { endpoint.close().await });
    }
    let began = Instant::now();
    // Closing one a second time does not wait for the first.
    while endpoints.iter().any(|endpoint| !endpoint.is_closed()) && began.elapsed() < LIMIT {
        sleep(LOOK_AGAIN).await;
    }
    // A peer that stands still does not say that it has heard. Dropped, the endpoint would complain on the terminal; the process
    // ends now, and what it holds with it.
    endpoints.into_iter().filter(|endpoint| !endpoint.is_closed()).for_each(std::mem::forget);
}
