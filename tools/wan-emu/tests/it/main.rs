//! Networks on this machine. Needs root and /dev/net/tun; where these are missing, each test says so and does nothing.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a helper that fails is a test that fails")]
#![expect(clippy::print_stdout, reason = "shown for a test that fails, and with --nocapture")]

mod life;
mod links;
mod support;
