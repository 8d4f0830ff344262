//! Builders of known models.

mod gpt2;
mod resnet;

pub use gpt2::{Gpt2Config, MAX_LAYERS, gpt2};
pub use resnet::resnet101;
