//! A boundary tensor as bytes and back.
//!
//! This crate knows element values and byte layouts, and nothing of graphs or networks. The bytes of an
//! encoded tensor carry no shape: both ends know it (it travels in the OP-Data header), and a decoder never
//! allocates more than that shape allows.
//!
//! [`Codec`] alone is stateless. [`EdgeEncoder`] and [`EdgeDecoder`] are the two ends of one direction of one
//! boundary edge: they reuse their memory from tensor to tensor, keep what a codec dropped for the next tensor
//! (error feedback), and hold the basis of the transform codec.

mod bit_rate;
mod codec;
mod codecs;
mod density;
mod edge;
mod element;
mod error;
mod real;
mod tensor;
#[cfg(test)]
mod testing;
mod topk_values;

pub use bit_rate::BitRate;
pub use codec::Codec;
pub use codecs::transform::MOST_RANK;
pub use density::Density;
pub use edge::{EdgeDecoder, EdgeEncoder, EdgeOptions, EdgeState, Encoded};
pub use element::ElementType;
pub use error::CodecError;
pub use real::Real;
pub use tensor::{HostTensor, Values};
pub use topk_values::TopKValues;
