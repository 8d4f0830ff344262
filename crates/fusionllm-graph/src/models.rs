//! Builders of known models.

mod gpt2;

pub use gpt2::{Gpt2Config, gpt2};
