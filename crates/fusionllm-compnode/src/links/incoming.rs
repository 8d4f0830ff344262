//! One channel from one peer: receive, drop what came twice, decode, deliver, confirm what was taken.

use std::sync::{Arc, Mutex, PoisonError};

use fusionllm_codec::HostTensor;
use fusionllm_protocol::{Channel, OpDataHeader, PeerFrame, ReceiveWindow, Received, decode, encode};
use fusionllm_transport::{FrameSink, FrameSource};
use tokio::sync::watch;
use tokio::task::spawn_blocking;

use super::{CONTROL_FRAME_BYTES, JobLinks};
use crate::mailbox::Slot;

/// What stays of a channel when its connection is lost.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    window: Mutex<ReceiveWindow>,
    taken: watch::Sender<u64>,
}

impl Incoming {
    /// The task loop took one more message.
    pub(super) fn confirm_one(&self) {
        let next = self.lock().take();
        self.taken.send_replace(next);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, ReceiveWindow> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves one stream that a peer has opened. What is wrong with the stream ends it; the peer opens another.
pub(super) async fn serve(links: &Arc<JobLinks>, peer: usize, mut sink: FrameSink, mut source: FrameSource) {
    let Ok(Some(frame)) = source.recv_limited(CONTROL_FRAME_BYTES).await else { return };
    let Ok(PeerFrame::Open { job, generation, channel }) = decode(&frame) else { return };
    if (job, generation) != (links.job, links.generation) {
        tracing::debug!(%job, "dropped a stream of another generation");
        return;
    }
    if links.sender_of(channel).map(|n| n.index()) != Some(peer) {
        tracing::warn!(peer = links.name_of(peer), ?channel, "refused a channel that is not the peer's");
        return;
    }
    let incoming = links.incoming(channel);
    let next = incoming.lock().next();
    let Ok(answer) = encode(&PeerFrame::Resume { next }) else { return };
    if sink.send(&answer).await.is_err() {
        return;
    }
    tokio::select! {
        () = read(links, peer, channel, &incoming, source) => {}
        () = confirm(&incoming, &mut sink) => {}
    }
}

async fn read(links: &Arc<JobLinks>, peer: usize, channel: Channel, incoming: &Incoming, mut source: FrameSource) {
    while let Ok(Some(frame)) = source.recv_limited(CONTROL_FRAME_BYTES).await {
        let (number, header) = match decode(&frame) {
            Ok(PeerFrame::Message { number, header }) => (number, header),
            Ok(_) => return links.fail(peer, "sent a frame that is no message"),
            Err(error) => return links.fail(peer, &error.to_string()),
        };
        let shape: Vec<usize> = header.shape.iter().map(|&d| usize::try_from(d).unwrap_or(usize::MAX)).collect();
        let expected = match header.codec.encoded_bytes(&shape) {
            Ok(bytes) => bytes,
            Err(error) => return links.fail(peer, &error.to_string()),
        };
        let Ok(Some(payload)) = source.recv_limited(expected).await else { return };
        let tensor = match decode_payload(&header, shape, payload).await {
            Ok(tensor) => tensor,
            Err(reason) => return links.fail(peer, &reason),
        };
        // Counted only now that it can be delivered at once: whatever ends this task earlier, the message comes
        // again over the next stream.
        let received = incoming.lock().receive(number);
        match received {
            Ok(Received::Deliver) => {
                let OpDataHeader { step, pass, micro_batch, .. } = header;
                links.mailbox.put(Slot { channel, pass, step, micro_batch }, tensor);
            }
            Ok(Received::Duplicate) => {}
            Err(error) => return links.fail(peer, &error.to_string()),
        }
    }
    // The sender closed the stream or is lost. If lost, it opens another.
    std::future::pending::<()>().await;
}

async fn decode_payload(header: &OpDataHeader, shape: Vec<usize>, payload: Vec<u8>) -> Result<HostTensor, String> {
    let (codec, element) = (header.codec, header.element);
    let decoded = spawn_blocking(move || codec.decode(&shape, element, &payload)).await;
    decoded.map_err(|e| format!("decoding: {e}"))?.map_err(|e| e.to_string())
}

/// Tells the sender how far the task loop is, until the stream ends.
async fn confirm(incoming: &Incoming, sink: &mut FrameSink) {
    let mut taken = incoming.taken.subscribe();
    taken.mark_changed();
    while taken.changed().await.is_ok() {
        let next = *taken.borrow_and_update();
        let Ok(frame) = encode(&PeerFrame::Taken { next }) else { return };
        if sink.send(&frame).await.is_err() {
            return;
        }
    }
}
