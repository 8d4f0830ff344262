//! What several unit tests need.

/// How many histories are looked at: as many as usual, or as the environment asks for.
pub(crate) fn histories(usual: u64) -> u64 {
    std::env::var("FUSIONLLM_HISTORIES").ok().and_then(|count| count.parse().ok()).unwrap_or(usual)
}

/// Runs a history to its end, in simulated time.
pub(crate) fn in_virtual_time<T>(history: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(history)
}
