//! The binary as its users run it: real processes, real sockets on loopback.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a helper that fails is a test that fails")]

mod away;
mod away_meddling;
mod bad_input;
mod chat;
mod circles;
mod cluster;
#[path = "../../../../tests/copy.rs"]
mod copy;
mod decoders;
#[cfg(target_os = "linux")]
mod disk;
mod docs;
mod endurance;
mod fixtures;
mod folders;
mod golden;
mod images;
mod input;
#[cfg(unix)]
mod last_checkpoint;
mod lora;
mod machines;
#[cfg(unix)]
mod meddling;
mod plan;
mod private;
mod process;
mod relay;
mod state;
mod survive;
mod texts;
mod tidy;
mod train;
mod weights;
