//! One module per codec, and the parts that they share.
//!
//! Each module documents its byte layout. All are little-endian; bits are numbered from the lowest of the first
//! byte. Sections follow each other without gaps, each padded with zero bits to whole bytes.

pub(crate) mod basis;
pub(crate) mod laplace;
pub(crate) mod plain;
pub(crate) mod positions;
pub(crate) mod quantize;
pub(crate) mod rounding;
pub(crate) mod select;
pub(crate) mod subspace;
pub(crate) mod topk;
pub(crate) mod transform;

use crate::CodecError;

/// Memory that encoding and decoding reuse from call to call.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    pub(crate) topk: topk::Scratch,
    pub(crate) transform: transform::Scratch,
}

/// Splits the layout version off a payload.
pub(crate) fn take_version<'a>(codec: &'static str, expected: u8, bytes: &'a [u8]) -> Result<&'a [u8], CodecError> {
    match bytes.split_first() {
        Some((&got, rest)) if got == expected => Ok(rest),
        Some((&got, _)) => Err(CodecError::Version { codec, expected, got }),
        None => Err(CodecError::Corrupt { codec, what: "it is empty" }),
    }
}

/// Splits the first `count` bytes off a payload.
pub(crate) fn take<'a>(codec: &'static str, bytes: &mut &'a [u8], count: u64) -> Result<&'a [u8], CodecError> {
    let split = usize::try_from(count).ok().and_then(|count| bytes.split_at_checked(count));
    let (head, rest) = split.ok_or(CodecError::Corrupt { codec, what: "it ends early" })?;
    *bytes = rest;
    Ok(head)
}
