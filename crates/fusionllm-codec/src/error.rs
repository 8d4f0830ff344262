//! What can go wrong between a tensor and its bytes.

/// Why a tensor could not be encoded or decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The payload has not the length that the shape and codec call for.
    #[error("{codec} payload of shape {shape:?} has {got} bytes, expected {expected}")]
    PayloadLength {
        /// Name of the codec.
        codec: &'static str,
        /// Dimensions of the tensor, as the message's header announced them.
        shape: Vec<usize>,
        /// Bytes that the shape calls for.
        expected: u64,
        /// Bytes that came.
        got: u64,
    },
    /// The payload is longer than the shape and codec allow.
    #[error("{codec} payload of shape {shape:?} has {got} bytes, expected at most {most}")]
    PayloadTooLong {
        /// Name of the codec.
        codec: &'static str,
        /// Dimensions of the tensor, as the message's header announced them.
        shape: Vec<usize>,
        /// Bytes that the shape allows.
        most: u64,
        /// Bytes that came.
        got: u64,
    },
    /// The values do not fill the shape.
    #[error("{got} values do not fill shape {shape:?}, which holds {expected}")]
    ValueCount {
        /// Dimensions that were asked for, outermost first.
        shape: Vec<usize>,
        /// Values that the shape holds.
        expected: u64,
        /// Values that were given.
        got: u64,
    },
    /// The product of the dimensions overflows.
    #[error("shape {shape:?} holds more elements than can be addressed")]
    ShapeOverflow {
        /// Dimensions that were asked for, outermost first.
        shape: Vec<usize>,
    },
    /// Integers were given to a codec of real numbers.
    #[error("codec {codec} cannot carry {element:?} tensors, use dense")]
    ElementType {
        /// Name of the codec.
        codec: &'static str,
        /// Element type of the tensor.
        element: crate::ElementType,
    },
    /// No codec has this name.
    #[error(
        "unknown codec `{name}`, expected one of: dense, bf16, f16, int8, int4, \
         topk:SHARE:f32|bf16|int8, transform:BITS"
    )]
    UnknownCodec {
        /// The name that was asked for.
        name: String,
    },
    /// A density outside 1 to 1,000,000 parts per million.
    #[error("density `{given}` is no share from 0.000001 to 1 in whole parts per million")]
    Density {
        /// The share that was given, as text.
        given: String,
    },
    /// Bits an element that no codec can keep to.
    #[error("rate `{given}` is not from 0.01 to 8 bits an element in whole thousandths")]
    BitRate {
        /// The bits an element that were given, as text.
        given: String,
    },
    /// The payload is of another version of the layout.
    #[error("{codec} payload has layout version {got}, expected {expected}")]
    Version {
        /// Name of the codec.
        codec: &'static str,
        /// The version that this build reads.
        expected: u8,
        /// The version that came.
        got: u8,
    },
    /// The payload has the right length, but no encoder writes such bytes.
    #[error("{codec} payload is corrupt: {what}")]
    Corrupt {
        /// Name of the codec.
        codec: &'static str,
        /// Which field is wrong, and how.
        what: &'static str,
    },
    /// A `transform` payload refers to a basis that this end does not hold: a message was lost, or state was.
    #[error("transform payload needs basis {needed}, this end holds {}", .held.map_or("none".to_owned(), |n| n.to_string()))]
    MissingBasis {
        /// Number of the basis that it needs.
        needed: u32,
        /// Number of the one that is held.
        held: Option<u32>,
    },
    /// Saved state of an edge that no edge can have had.
    #[error("the saved state of an edge is corrupt: {what}")]
    State {
        /// Which part of the state is wrong, and how.
        what: &'static str,
    },
}
