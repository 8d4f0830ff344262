//! The allocator under tensors, which come and go with every micro-batch.

use std::ffi::c_long;

use libmimalloc_sys::{mi_option_get, mi_option_set_default, mi_option_t};

/// For `#[global_allocator]` of whatever trains.
pub use mimalloc::MiMalloc as Allocator;

/// Options of mimalloc's `mimalloc.h` for which its bindings have no name, and our values.
///
/// - `mi_option_purge_delay`: milliseconds for which freed memory stays with the process: longer than most micro-batches
///   take. By mimalloc's own 10 a large model's tensors go back to the kernel, which clears each page anew.
/// - `mi_option_arena_purge_mult`: how many times as long that is for large blocks. By mimalloc's own 10 the memory of
///   some ten seconds of tensors would stay.
const OPTIONS: [(mi_option_t, c_long); 2] = [(15, 1000), (24, 1)];

/// Keeps freed memory for a second before it is given back, unless `MIMALLOC_PURGE_DELAY` and
/// `MIMALLOC_ARENA_PURGE_MULT` say otherwise. To be called first in `main`. Gives the milliseconds that hold now, for
/// small and for large blocks.
pub fn keep_freed_memory() -> [c_long; 2] {
    // SAFETY: both calls only read and write numbers that mimalloc keeps for the purpose.
    #[expect(unsafe_code, reason = "options are set by foreign functions")]
    let [delay, times] = OPTIONS.map(|(option, value)| unsafe {
        mi_option_set_default(option, value);
        mi_option_get(option)
    });
    [delay, delay * times]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_memory_is_kept_for_a_second() {
        // That the numbers are those of the right options shows in their defaults.
        #[expect(unsafe_code, reason = "options are read by foreign functions")]
        let before = OPTIONS.map(|(option, _)| unsafe { mi_option_get(option) });
        let is_told = |name| std::env::var_os(name).is_some();
        if !is_told("MIMALLOC_PURGE_DELAY") && !is_told("MIMALLOC_ARENA_PURGE_MULT") {
            assert_eq!(before, [10, 10]);
            assert_eq!(keep_freed_memory(), [1000, 1000]);
        }
    }
}
