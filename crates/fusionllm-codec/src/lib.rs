//! A boundary tensor as bytes and back.
//!
//! This crate knows element values and byte layouts, and nothing of graphs or networks. The bytes of an
//! encoded tensor carry no shape: both ends know it (it travels in the OP-Data header), and a decoder never
//! allocates more than that shape allows.

mod codec;
mod codecs;
mod density;
mod error;
mod real;
mod tensor;
#[cfg(test)]
mod testing;

pub use codec::{Codec, LowRankValues, Residual, TopKValues};
pub use density::Density;
pub use error::CodecError;
pub use real::Real;
pub use tensor::{ElementType, HostTensor, Values};
