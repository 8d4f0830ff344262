//! The two ends of a stream in memory.

use std::future::poll_fn;
use std::task::{Context, Poll};

use bytes::Bytes;

use super::link::{Side, StreamId, gone};
use super::packets::Packet;
use super::state::{Net, wait};
use crate::SessionError;
use crate::wire::{Later, ReceiveHalf, SendHalf};

/// What a stopped sender is told, as by QUIC when a receiver is dropped.
const STOPPED: SessionError = SessionError::StreamEnded { code: 0 };

#[derive(Debug)]
pub(super) struct Sender {
    pub(super) net: Net,
    pub(super) link: usize,
    pub(super) side: Side,
    pub(super) stream: StreamId,
}

#[derive(Debug)]
pub(super) struct Receiver {
    pub(super) net: Net,
    pub(super) link: usize,
    pub(super) side: Side,
    pub(super) stream: StreamId,
}

impl Sender {
    /// Sends the stream's end, once.
    fn end(&self) {
        let Self { link, side, stream, .. } = *self;
        self.net.with(|state| {
            let Some(end) = state.end(link, side) else { return };
            let is_over = end.error.is_some();
            if let Some(sending) = end.sending.get_mut(&stream)
                && !sending.is_ended
            {
                sending.is_ended = true;
                if !is_over {
                    state.send(link, side, Packet::End { stream });
                }
            }
        });
    }
}

impl SendHalf for Sender {
    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize, SessionError>> {
        let Self { link, side, stream, .. } = *self;
        self.net.with(|state| {
            let Some(end) = state.end(link, side) else { return Poll::Ready(Err(gone())) };
            if let Some(error) = &end.error {
                return Poll::Ready(Err(error.clone()));
            }
            let Some(sending) = end.sending.get_mut(&stream) else { return Poll::Ready(Err(gone())) };
            if sending.is_stopped {
                return Poll::Ready(Err(STOPPED));
            }
            let count = sending.room.min(bytes.len());
            if count == 0 && !bytes.is_empty() {
                wait(&mut sending.wakers, cx.waker());
                return Poll::Pending;
            }
            sending.room -= count;
            let written = bytes.get(..count).unwrap_or_default();
            state.send_bytes(link, side, stream, Bytes::copy_from_slice(written));
            Poll::Ready(Ok(count))
        })
    }

    fn set_priority(&mut self, priority: i32) {
        let Self { link, side, stream, .. } = *self;
        self.net.with(|state| {
            if let Some(sending) = state.end(link, side).and_then(|end| end.sending.get_mut(&stream)) {
                sending.is_urgent = priority > 0;
            }
        });
    }

    fn finish(&mut self) -> Later<'_, Result<(), SessionError>> {
        self.end();
        let this: &Self = self;
        Box::pin(poll_fn(move |cx| {
            let Self { link, side, stream, .. } = *this;
            this.net.with(|state| {
                let Some(end) = state.end(link, side) else { return Poll::Ready(Err(gone())) };
                let error = end.error.clone();
                match (end.sending.get_mut(&stream), error) {
                    (Some(sending), _) if sending.is_confirmed => Poll::Ready(Ok(())),
                    (Some(sending), _) if sending.is_stopped => Poll::Ready(Err(STOPPED)),
                    (_, Some(error)) => Poll::Ready(Err(error)),
                    (None, None) => Poll::Ready(Err(gone())),
                    (Some(sending), None) => {
                        wait(&mut sending.wakers, cx.waker());
                        Poll::Pending
                    }
                }
            })
        }))
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.end();
        self.net.with(|state| {
            state.settle(self.link, self.side, self.stream);
            state.release(self.link, self.side);
        });
    }
}

impl ReceiveHalf for Receiver {
    fn poll_chunk(&mut self, cx: &mut Context<'_>, most: usize) -> Poll<Result<Option<Bytes>, SessionError>> {
        let Self { link, side, stream, .. } = *self;
        self.net.with(|state| {
            let window = state.weather.window.max(1);
            let Some(end) = state.end(link, side) else { return Poll::Ready(Err(gone())) };
            let error = end.error.clone();
            let Some(receiving) = end.receiving.get_mut(&stream) else { return Poll::Ready(Err(gone())) };
            if let Some(first) = receiving.bytes.front_mut() {
                let chunk = first.split_to(most.min(first.len()));
                if first.is_empty() {
                    receiving.bytes.pop_front();
                }
                receiving.unsaid += chunk.len();
                if receiving.unsaid > window / 4 && !receiving.is_ended && error.is_none() {
                    let bytes = std::mem::take(&mut receiving.unsaid);
                    state.send(link, side, Packet::Room { stream, bytes });
                }
                return Poll::Ready(Ok(Some(chunk)));
            }
            if receiving.is_ended {
                receiving.is_read = true;
                state.settle(link, side, stream);
                return Poll::Ready(Ok(None));
            }
            if let Some(error) = error {
                return Poll::Ready(Err(error));
            }
            wait(&mut receiving.wakers, cx.waker());
            Poll::Pending
        })
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let Self { link, side, stream, .. } = *self;
        self.net.with(|state| {
            let Some(end) = state.end(link, side) else { return };
            let is_over = end.error.is_some();
            if let Some(receiving) = end.receiving.get_mut(&stream) {
                receiving.is_dropped = true;
                receiving.bytes.clear();
                if !receiving.is_read && !is_over {
                    state.send(link, side, Packet::Stop { stream });
                }
            }
            state.settle(link, side, stream);
            state.release(link, side);
        });
    }
}
