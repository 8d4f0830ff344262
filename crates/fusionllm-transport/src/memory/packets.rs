//! What travels over a connection.

use std::fmt;

use bytes::Bytes;

use super::link::StreamId;

/// A piece of what one side says.
#[derive(Debug)]
pub(super) enum Packet {
    /// The next bytes of a stream.
    Data { stream: StreamId, bytes: Bytes },
    /// A stream's end.
    End { stream: StreamId },
    /// All of a stream has come.
    Confirmed { stream: StreamId },
    /// Nobody reads this stream any more.
    Stop { stream: StreamId },
    /// So many bytes were read.
    Room { stream: StreamId, bytes: usize },
    /// So many streams of a kind may be opened, counted from the first.
    Limit { kind: usize, streams: u64 },
    /// The connection is closed.
    Close { code: u64, reason: String },
}

impl Packet {
    /// The stream on whose order this depends.
    pub(super) fn ordered_in(&self) -> Option<StreamId> {
        match self {
            Self::Data { stream, .. } | Self::End { stream } => Some(*stream),
            _ => None,
        }
    }

    /// Bytes of streams in it.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Data { bytes, .. } => bytes.len(),
            _ => 0,
        }
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data { stream, bytes } => write!(f, "{stream}: {} bytes", bytes.len()),
            Self::End { stream } => write!(f, "{stream}: end"),
            Self::Confirmed { stream } => write!(f, "{stream}: all has come"),
            Self::Stop { stream } => write!(f, "{stream}: stop"),
            Self::Room { stream, bytes } => write!(f, "{stream}: room for {bytes} bytes"),
            Self::Limit { kind, streams } => write!(f, "{streams} streams of kind {kind}"),
            Self::Close { code, reason } => write!(f, "close {code} {reason:?}"),
        }
    }
}
