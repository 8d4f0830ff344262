//! Histories that are drawn from seeds and run in simulated time. For the tests of several crates.

/// How many histories are looked at: as many as usual, or as the environment asks for.
pub(crate) fn histories(usual: u64) -> u64 {
    std::env::var("FUSIONLLM_HISTORIES").ok().and_then(|count| count.parse().ok()).unwrap_or(usual)
}

/// Runs a history to its end, in simulated time.
pub(crate) fn in_virtual_time<T>(history: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(history)
}

/// Runs histories that check themselves, and holds that there are breaks in them: more than one each.
pub(crate) fn all_hold<F: Future<Output = String>>(usual: u64, history: impl Fn(u64) -> F) {
    let (mut breaks, count) = (0, histories(usual));
    for seed in 0..count {
        breaks += in_virtual_time(history(seed)).matches(" breaks from ").count() as u64;
    }
    assert!(breaks > count, "{breaks} breaks in {count} histories");
}

/// Runs each history twice, and holds the logs against each other.
pub(crate) fn each_is_one<F: Future<Output = String>>(usual: u64, history: impl Fn(u64) -> F) {
    for seed in 0..histories(usual) {
        let logs = [(); 2].map(|()| in_virtual_time(history(seed)));
        if logs[0] != logs[1] {
            let differs = logs[0].lines().zip(logs[1].lines()).position(|(a, b)| a != b).unwrap_or(usize::MAX);
            let around = |log: &str| log.lines().skip(differs.saturating_sub(5)).take(8).collect::<Vec<_>>().join("\n");
            panic!("seed {seed}, line {differs}:\n{}\nor\n{}", around(&logs[0]), around(&logs[1]));
        }
    }
}
