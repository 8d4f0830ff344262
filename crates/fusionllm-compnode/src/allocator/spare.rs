//! Large blocks that are free and kept for their like.
//!
//! By way of the kernel each page of the next one would be cleared anew. Kept is at most a share of what is in use, so that
//! it is known how much memory that takes.

use super::LARGE;

/// Most that is kept: this, and the share of the bytes in use.
const LEAST: usize = 16 << 20;
const SHARE: usize = 16;
/// Blocks that are kept.
const SLOTS: usize = 256;

/// The blocks, oldest first, and how much is in use besides.
#[derive(Debug)]
pub(super) struct Spare {
    blocks: [(usize, usize); SLOTS],
    count: usize,
    kept: usize,
    used: usize,
}

impl Spare {
    pub(super) const fn new() -> Self {
        Self { blocks: [(0, 0); SLOTS], count: 0, kept: 0, used: 0 }
    }

    /// A block is needed: one that is kept, the newest of its size, which is likeliest in a cache; else one must be mapped.
    pub(super) fn take(&mut self, class: usize) -> Option<*mut u8> {
        self.used += class;
        let at = self.blocks.iter().take(self.count).rposition(|&(_, size)| size == class)?;
        Some(self.remove(at).0)
    }

    /// A block in use has another size now.
    pub(super) fn resized(&mut self, from: usize, to: usize) {
        self.used = (self.used + to).saturating_sub(from);
    }

    /// A block is free.
    pub(super) fn put(&mut self, block: *mut u8, class: usize) {
        self.used = self.used.saturating_sub(class);
        if let Some(slot) = self.blocks.get_mut(self.count) {
            *slot = (block.expose_provenance(), class);
            self.count += 1;
            self.kept += class;
        }
    }

    /// A block that is not to be kept, if there is one: those from [`LARGE`] on are few.
    pub(super) fn excess(&mut self) -> Option<(*mut u8, usize)> {
        let newest = self.count.checked_sub(1)?;
        let is_large = self.blocks.get(newest).is_some_and(|&(_, class)| class >= LARGE);
        if is_large {
            return Some(self.remove(newest));
        }
        // One slot stays free for the next that comes.
        let is_too_much = self.kept > LEAST + self.used / SHARE || self.count == SLOTS;
        is_too_much.then(|| self.remove(0))
    }

    fn remove(&mut self, at: usize) -> (*mut u8, usize) {
        let (block, class) = self.blocks.get(at).copied().unwrap_or_default();
        self.blocks.copy_within(at + 1..self.count, at);
        self.count -= 1;
        self.kept -= class;
        (std::ptr::with_exposed_provenance_mut(block), class)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(number: usize) -> *mut u8 {
        std::ptr::without_provenance_mut(number)
    }

    #[test]
    fn no_more_is_kept_than_a_share_of_what_is_in_use() {
        const MIB: usize = 1 << 20;
        let mut spare = Spare::new();
        for _ in 0..100 {
            assert_eq!(spare.take(8 * MIB), None);
        }
        let mut freed = 0;
        for number in 1..=100 {
            spare.put(block(number), 8 * MIB);
            while let Some((freed_block, class)) = spare.excess() {
                freed += 1;
                assert_eq!((freed_block, class), (block(freed), 8 * MIB), "the oldest goes first");
            }
            let in_use = (100 - number) * 8 * MIB;
            assert!(spare.kept <= LEAST + in_use / SHARE, "{} with {in_use} in use", spare.kept);
        }
        assert_eq!(spare.take(8 * MIB), Some(block(100)), "the newest comes first");
        assert_eq!(spare.take(7 * MIB), None, "another size");
        spare.put(block(5), 2 * LARGE);
        assert_eq!(spare.excess(), Some((block(5), 2 * LARGE)));
        for number in 0..2 * SLOTS {
            spare.used += MIB * SHARE;
            spare.put(block(number + 1000), 1);
            while spare.excess().is_some() {}
        }
        assert!(spare.count < SLOTS);
    }
}
