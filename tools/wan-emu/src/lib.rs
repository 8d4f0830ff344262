//! Emulates a wide-area network on one Linux machine: every node is a network namespace with one TUN device, and a
//! router in user space joins them by links of asked rate, delay, jitter and loss.
//!
//! The emulation itself, [`fabric`], is a function of packets and times, without clock or device. Around it stand the
//! description of a network ([`network`], [`link`], [`preset`]), the machine ([`netns`], [`router`]), what runs on it
//! ([`session`], [`control`]) and what checks it ([`measure`]).

#[cfg(not(target_os = "linux"))]
compile_error!("wan-emu needs Linux: network namespaces and TUN devices");

pub mod children;
pub mod control;
pub mod emulation;
pub mod error;
pub mod fabric;
pub mod lease;
pub mod link;
pub mod measure;
pub mod netns;
pub mod network;
pub mod notice;
pub mod packet;
pub mod pipe;
pub mod preset;
pub mod router;
pub mod session;
pub mod urgent;

pub use error::Error;
