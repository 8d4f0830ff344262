//! Whole training runs of CompNodes inside one process.
#![expect(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod golden;
mod groups;
mod memory;
mod parity;
mod private;
mod recompute;
mod resnet;
#[allow(dead_code, reason = "the tests of peak memory use what these do not")]
mod run;
mod wires;
