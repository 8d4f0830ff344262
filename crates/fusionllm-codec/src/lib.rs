//! A boundary tensor as bytes and back.
//!
//! This crate knows element values and byte layouts, and nothing of graphs or networks. The bytes of an
//! encoded tensor carry no shape: both ends know it (it travels in the OP-Data header), and a decoder never
//! allocates more than that shape allows.

mod codec;
mod error;
mod tensor;

pub use codec::Codec;
pub use error::CodecError;
pub use tensor::{ElementType, HostTensor, Values};
