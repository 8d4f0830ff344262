//! Builders of known models.

mod decoder;
mod families;
mod gpt2;
mod model;
mod resnet;

pub use decoder::{DecoderConfig, decoder};
pub use families::DecoderFamily;
pub use gpt2::{Gpt2Config, gpt2};
pub use model::{HuggingFaceModel, Model};
pub use resnet::{ResnetBlock, ResnetConfig, ResnetStem, resnet};

/// Most blocks of a model. Those of a GPT-2 then have nearly [`MAX_OPS`](crate::MAX_OPS) ops; a decoder ends a little before.
pub const MAX_LAYERS: usize = 4096;
