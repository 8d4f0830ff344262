//! Streams of frames over streams of bytes: eight bytes of length (little-endian), then that many bytes.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::SessionError;
use crate::wire::{ReceiveHalf, SendHalf};

/// Largest frame that [`FrameSource::recv`] takes.
pub const MAX_FRAME_BYTES: u64 = 4 << 30;
const LENGTH_BYTES: u64 = 8;
/// A reader's memory grows by at most this much ahead of what has come.
const GROWTH_BYTES: usize = 1 << 20;
/// What is thrown away at once at the most.
const SKIP_BYTES: usize = 64 << 10;

/// The sending end of a stream.
#[derive(Debug)]
pub struct FrameSink(Box<dyn SendHalf>);

impl FrameSink {
    pub(crate) fn new(stream: Box<dyn SendHalf>) -> Self {
        Self(stream)
    }

    /// Sends one frame; returns once it is in the send buffer. Dropped before it is done, it leaves a broken stream.
    ///
    /// # Errors
    /// [`SessionError`] if the peer or the connection is gone.
    pub async fn send(&mut self, frame: &[u8]) -> Result<(), SessionError> {
        self.send_raw(&(frame.len() as u64).to_le_bytes()).await?;
        self.send_raw(frame).await
    }

    /// Sends bytes without a frame around them; for a reader that only counts.
    pub(crate) async fn send_raw(&mut self, mut bytes: &[u8]) -> Result<(), SessionError> {
        while !bytes.is_empty() {
            let written = poll_fn(|cx| self.0.poll_write(cx, bytes)).await?;
            bytes = bytes.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    /// Streams of higher priority go first; the default is 0.
    pub fn set_priority(&mut self, priority: i32) {
        self.0.set_priority(priority);
    }

    /// Ends the stream and waits until the peer has received all of it.
    ///
    /// # Errors
    /// [`SessionError`] if the peer did not take it all.
    pub async fn finish(mut self) -> Result<(), SessionError> {
        self.0.finish().await
    }
}

/// The receiving end of a stream.
#[derive(Debug)]
pub struct FrameSource {
    stream: Box<dyn ReceiveHalf>,
    meter: StreamMeter,
}

/// How much of a stream was read, also of a frame that is not whole yet. Clones are of the same stream.
#[derive(Clone, Debug, Default)]
pub struct StreamMeter(Arc<AtomicU64>);

impl StreamMeter {
    /// Bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl FrameSource {
    pub(crate) fn new(stream: Box<dyn ReceiveHalf>) -> Self {
        Self { stream, meter: StreamMeter::default() }
    }

    /// Tells how much was read, while somebody reads.
    pub fn meter(&self) -> StreamMeter {
        self.meter.clone()
    }

    /// The next frame of at most [`MAX_FRAME_BYTES`]; nothing at the stream's end.
    ///
    /// # Errors
    /// As [`Self::recv_limited`].
    pub async fn recv(&mut self) -> Result<Option<Vec<u8>>, SessionError> {
        self.recv_limited(MAX_FRAME_BYTES).await
    }

    /// The next frame of at most `limit` bytes; nothing at the stream's end. Memory grows only with what has come,
    /// whatever length was announced. Dropped before it is done, it loses the frame's beginning.
    ///
    /// # Errors
    /// [`SessionError`] if the stream ends within a frame, a larger frame is announced, or the connection is gone.
    pub async fn recv_limited(&mut self, limit: u64) -> Result<Option<Vec<u8>>, SessionError> {
        let header = self.read_up_to(LENGTH_BYTES).await?;
        if header.is_empty() {
            return Ok(None);
        }
        let got = header.len() as u64;
        let header: [u8; 8] = header.try_into().map_err(|_| SessionError::Clipped { got, expected: LENGTH_BYTES })?;
        let announced = u64::from_le_bytes(header);
        if announced > limit {
            return Err(SessionError::TooLarge { announced, limit });
        }
        let frame = self.read_up_to(announced).await?;
        let got = frame.len() as u64;
        if got == announced { Ok(Some(frame)) } else { Err(SessionError::Clipped { got, expected: announced }) }
    }

    /// Throws away what has come and says how many bytes that was; nothing at the stream's end.
    pub(crate) async fn skip_some(&mut self) -> Result<Option<u64>, SessionError> {
        Ok(self.chunk(SKIP_BYTES).await?.map(|chunk| chunk.len() as u64))
    }

    async fn chunk(&mut self, most: usize) -> Result<Option<Bytes>, SessionError> {
        poll_fn(|cx| self.stream.poll_chunk(cx, most)).await
    }

    /// `count` bytes, or fewer if the stream ends.
    async fn read_up_to(&mut self, count: u64) -> Result<Vec<u8>, SessionError> {
        let mut left = usize::try_from(count).unwrap_or(usize::MAX);
        let mut bytes = Vec::new();
        while left > 0 {
            let Some(chunk) = self.chunk(left).await? else { break };
            self.meter.0.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            if bytes.capacity() - bytes.len() < chunk.len() {
                // Doubling, but never far ahead of what has come.
                bytes.reserve_exact(bytes.len().max(GROWTH_BYTES).min(left).max(chunk.len()));
            }
            bytes.extend_from_slice(&chunk);
            left -= chunk.len();
        }
        Ok(bytes)
    }
}
