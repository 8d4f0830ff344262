//! The allocator under tensors, which come and go with every micro-batch.

mod kernel;
mod spare;

use std::alloc::{GlobalAlloc, Layout};
use std::ffi::c_long;
use std::ops::RangeInclusive;
use std::sync::{Mutex, MutexGuard, PoisonError};

use fusionllm_planner::Pieces;
use libmimalloc_sys::{mi_option_get, mi_option_set_default, mi_option_t};
use mimalloc::MiMalloc;

use spare::Spare;

/// Blocks from here on are the kernel's. A table of 154 MB whose gradient comes and goes with every step left gaps in
/// mimalloc's memory that were as large as what was in use.
const LARGE: usize = 16 << 20;
/// So are the pieces of such a table, and those of them that are freed are kept for the next: one thread takes them and
/// another frees them, which mimalloc notices late.
const PIECES: RangeInclusive<usize> = Pieces::MOST_BYTES / 4 * 3..=Pieces::MOST_BYTES + (64 << 10);
/// Whatever the kernel gives is aligned to this.
const PAGE: usize = 4096;

/// For `#[global_allocator]` of whatever trains: mimalloc, and for large blocks the kernel.
#[derive(Debug)]
pub struct Allocator;

static SPARE: Mutex<Spare> = Mutex::new(Spare::new());

/// Whether the kernel gives a block. It is asked of the same layout when the block is freed.
fn is_large(layout: Layout) -> bool {
    let size = layout.size();
    cfg!(unix) && (size >= LARGE || PIECES.contains(&size)) && layout.align() <= PAGE
}

/// Bytes that a large block has: to an eighth of the power of two below, so that blocks of nearly one size are alike. What
/// nobody touches takes no memory.
fn class(size: usize) -> usize {
    let step = (1 << size.ilog2()) / 8;
    size.checked_next_multiple_of(step).unwrap_or(size)
}

fn spare() -> MutexGuard<'static, Spare> {
    SPARE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A large block, and whether all of it is zeros; null if there is none.
fn take(size: usize) -> (*mut u8, bool) {
    let class = class(size);
    let kept = spare().take(class);
    match kept {
        Some(block) => (block, false),
        None => (kernel::map(class), true),
    }
}

/// Frees a large block.
///
/// # Safety
/// It came from [`take`] or [`kernel::remap`] with a size of this class, and is not used any more.
#[expect(unsafe_code, reason = "as an allocator")]
unsafe fn give(block: *mut u8, size: usize) {
    spare().put(block, class(size));
    loop {
        // The kernel takes a while for a large block: nobody else waits for it.
        let Some((block, class)) = spare().excess() else { return };
        unsafe { kernel::unmap(block, class) };
    }
}

// SAFETY: a block goes back to whoever gave it, since its layout says who that is.
#[expect(unsafe_code, reason = "an allocator cannot be written without")]
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) { take(layout.size()).0 } else { unsafe { MiMalloc.alloc(layout) } }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !is_large(layout) {
            return unsafe { MiMalloc.alloc_zeroed(layout) };
        }
        let (block, is_zero) = take(layout.size());
        if !is_zero {
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if is_large(layout) {
            unsafe { give(block, layout.size()) }
        } else {
            unsafe { MiMalloc.dealloc(block, layout) }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Ok(new) = Layout::from_size_align(size, layout.align()) else { return std::ptr::null_mut() };
        match (is_large(layout), is_large(new)) {
            (false, false) => unsafe { MiMalloc.realloc(block, layout, size) },
            (true, true) if class(layout.size()) == class(size) => block,
            (true, true) => {
                let moved = unsafe { kernel::remap(block, class(layout.size()), class(size)) };
                if !moved.is_null() {
                    spare().resized(class(layout.size()), class(size));
                }
                moved
            }
            _ => unsafe {
                let moved = self.alloc(new);
                if !moved.is_null() {
                    std::ptr::copy_nonoverlapping(block, moved, layout.size().min(size));
                    self.dealloc(block, layout);
                }
                moved
            },
        }
    }
}

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

    /// Blocks keep their content over the border between the two, and within each.
    #[expect(unsafe_code, reason = "an allocator is used by pointers")]
    #[test]
    fn blocks_of_any_size_keep_their_content() {
        let (piece, large) = (Pieces::MOST_BYTES, LARGE);
        let sizes = [
            100,
            large - 1,
            large,
            3 * large + 5,
            3 * large + 9,
            piece,
            piece + 1,
            large + 7,
            large / 2,
            piece,
            1 << 10,
        ];
        let layout = |size| Layout::from_size_align(size, 64).unwrap();
        unsafe {
            let mut block = Allocator.alloc(layout(sizes[0]));
            for at in 0..sizes[0] {
                *block.add(at) = at as u8;
            }
            for pair in sizes.windows(2) {
                block = Allocator.realloc(block, layout(pair[0]), pair[1]);
                assert!(!block.is_null() && block.addr().is_multiple_of(64));
                *block.add(pair[1] - 1) = 1;
                assert!((0..sizes[0]).all(|at| *block.add(at) == at as u8), "{pair:?}");
            }
            Allocator.dealloc(block, layout(sizes[sizes.len() - 1]));
            for size in [10, piece, piece, LARGE + 1] {
                let zeros = Allocator.alloc_zeroed(layout(size));
                assert!((0..size).all(|at| *zeros.add(at) == 0));
                Allocator.dealloc(zeros, layout(size));
            }
        }
    }

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
