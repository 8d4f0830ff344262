//! Anonymous memory of the kernel. A null pointer says that there is none.
#![expect(unsafe_code, reason = "the kernel's calls take addresses")]

#[cfg(not(unix))]
pub(super) use none::{map, remap, unmap};
#[cfg(unix)]
pub(super) use unix::{map, remap, unmap};

#[cfg(unix)]
mod unix {
    use std::ptr::null_mut;

    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    pub(crate) fn map(size: usize) -> *mut u8 {
        // SAFETY: the kernel chooses where, so nothing is mapped there yet.
        let mapped = unsafe { mmap_anonymous(null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE) };
        mapped.map_or(null_mut(), |block| {
            // Fewer and larger pages; where the kernel has none, small ones do.
            #[cfg(target_os = "linux")]
            // SAFETY: the block was mapped above, and its content stays.
            let _ = unsafe { rustix::mm::madvise(block, size, rustix::mm::Advice::LinuxHugepage) };
            block.cast()
        })
    }

    /// # Safety
    /// `block` came from [`map`] or [`remap`] with this size.
    pub(crate) unsafe fn unmap(block: *mut u8, size: usize) {
        // It fails only for what was not mapped.
        let _ = unsafe { munmap(block.cast(), size) };
    }

    /// # Safety
    /// As [`unmap`]; the block is where the answer says afterwards, if that is not null.
    #[cfg(target_os = "linux")]
    pub(crate) unsafe fn remap(block: *mut u8, old: usize, new: usize) -> *mut u8 {
        let moved = unsafe { rustix::mm::mremap(block.cast(), old, new, rustix::mm::MremapFlags::MAYMOVE) };
        moved.map_or(null_mut(), |block| block.cast())
    }

    /// # Safety
    /// As [`unmap`]; the block is where the answer says afterwards, if that is not null.
    #[cfg(not(target_os = "linux"))]
    pub(crate) unsafe fn remap(block: *mut u8, old: usize, new: usize) -> *mut u8 {
        let moved = map(new);
        if !moved.is_null() {
            unsafe {
                std::ptr::copy_nonoverlapping(block, moved, old.min(new));
                unmap(block, old);
            }
        }
        moved
    }
}

/// No block is large there.
#[cfg(not(unix))]
mod none {
    pub(crate) fn map(_: usize) -> *mut u8 {
        std::ptr::null_mut()
    }

    pub(crate) unsafe fn unmap(_: *mut u8, _: usize) {}

    pub(crate) unsafe fn remap(_: *mut u8, _: usize, _: usize) -> *mut u8 {
        std::ptr::null_mut()
    }
}
