//! The allocator under tensors, which come and go with every micro-batch.

use libmimalloc_sys::{mi_option_get, mi_option_set_default, mi_option_t};

/// For `#[global_allocator]` of whatever trains.
pub use mimalloc::MiMalloc as Allocator;

/// `mi_option_purge_delay` of mimalloc's `mimalloc.h`, for which its bindings have no name.
const PURGE_DELAY: mi_option_t = 15;
/// Milliseconds for which freed memory stays with the process: longer than most micro-batches take. By mimalloc's own 10
/// a large model's tensors go back to the kernel, which clears each page anew.
const KEPT_MS: std::ffi::c_long = 1000;

/// Keeps freed memory for a second before it is given back, unless `MIMALLOC_PURGE_DELAY` says otherwise. To be called
/// first in `main`. Gives the milliseconds that hold now.
pub fn keep_freed_memory() -> std::ffi::c_long {
    // SAFETY: both calls only read and write one number that mimalloc keeps for the purpose.
    #[expect(unsafe_code, reason = "options are set by foreign functions")]
    unsafe {
        mi_option_set_default(PURGE_DELAY, KEPT_MS);
        mi_option_get(PURGE_DELAY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_memory_is_kept_for_a_second() {
        // That the number is the right option shows in its default.
        #[expect(unsafe_code, reason = "options are read by foreign functions")]
        let before = unsafe { mi_option_get(PURGE_DELAY) };
        assert!(before == 10 || std::env::var_os("MIMALLOC_PURGE_DELAY").is_some(), "{before}");
        assert_eq!(keep_freed_memory(), if before == 10 { 1000 } else { before });
    }
}
