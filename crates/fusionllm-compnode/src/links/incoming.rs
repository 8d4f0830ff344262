//! One channel from one peer: receive, drop what came twice, decode, deliver, confirm what was taken.

use std::sync::{Arc, Mutex, PoisonError};

use fusionllm_codec::Codec;
use fusionllm_protocol::{Channel, OpDataHeader, PeerFrame, ReceiveWindow, Received, decode, encode};
use fusionllm_transport::{FrameSink, FrameSource};
use tokio::sync::watch;
use tokio::task::spawn_blocking;

use super::meter::Meter;
use super::{CONTROL_FRAME_BYTES, JobLinks, URGENT};
use crate::channel_codec::{ChannelDecoder, ChannelOptions};
use crate::mailbox::{Mailbox, Slot};

/// What stays of a channel when its connection is lost.
#[derive(Debug)]
pub(super) struct Incoming {
    window: Mutex<ReceiveWindow>,
    taken: watch::Sender<u64>,
    decoder: Mutex<ChannelDecoder>,
}

impl Incoming {
    pub(super) fn new(options: ChannelOptions, channel: Channel) -> Self {
        let (window, taken) = (Mutex::default(), watch::Sender::default());
        Self { window, taken, decoder: Mutex::new(ChannelDecoder::new(options, channel)) }
    }

    /// Decodes and delivers a message, unless it came before. The decoder remembers what it decoded, so this happens
    /// as a whole or not at all, whatever becomes of the stream: for a blocking thread.
    fn deliver(
        &self,
        mailbox: &Mailbox,
        channel: Channel,
        number: u64,
        header: OpDataHeader,
        payload: &[u8],
    ) -> Result<(), String> {
        let mut decoder = self.decoder.lock().unwrap_or_else(PoisonError::into_inner);
        if number < self.lock().next() {
            return Ok(());
        }
        let shape = shape_of(&header);
        let OpDataHeader { step, pass, micro_batch, codec, element, .. } = header;
        let tensor = decoder.decode(pass, codec, shape, element, payload).map_err(|e| e.to_string())?;
        match self.lock().receive(number).map_err(|e| e.to_string())? {
            Received::Deliver => mailbox.put(Slot { channel, pass, step, micro_batch }, tensor, codec),
            Received::Duplicate => {}
        }
        Ok(())
    }

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
    // On the way back there are only confirmations, for which the other's compute may wait.
    sink.set_priority(URGENT);
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

async fn read(links: &Arc<JobLinks>, peer: usize, channel: Channel, incoming: &Arc<Incoming>, mut source: FrameSource) {
    while let Ok(Some(frame)) = source.recv_limited(CONTROL_FRAME_BYTES).await {
        let (number, header) = match decode(&frame) {
            Ok(PeerFrame::Message { number, header }) => (number, header),
            Ok(_) => return links.fail(peer, "sent a frame that is no message"),
            Err(error) => return links.fail(peer, &error.to_string()),
        };
        let most = match most_bytes(links, channel, &header) {
            Ok(most) => most,
            Err(reason) => return links.fail(peer, &reason),
        };
        let coming = links.meters.get(peer).map(Meter::begin);
        let Ok(Some(payload)) = source.recv_limited(most).await else { return };
        if let Some(coming) = coming {
            coming.end(payload.len() as u64);
        }
        let (at, job) = (Arc::clone(incoming), Arc::clone(links));
        let delivered = spawn_blocking(move || at.deliver(&job.mailbox, channel, number, header, &payload)).await;
        match delivered {
            Ok(Ok(())) => {}
            Ok(Err(reason)) => return links.fail(peer, &reason),
            Err(error) => return links.fail(peer, &format!("decoding: {error}")),
        }
    }
    // The sender closed the stream or is lost. If lost, it opens another.
    std::future::pending::<()>().await;
}

fn shape_of(header: &OpDataHeader) -> Vec<usize> {
    header.shape.iter().map(|&d| usize::try_from(d).unwrap_or(usize::MAX)).collect()
}

/// Largest payload of a message. A sparse one may announce a tensor far larger than itself, so its shape is held
/// against the graph's.
fn most_bytes(links: &JobLinks, channel: Channel, header: &OpDataHeader) -> Result<u64, String> {
    let shape = shape_of(header);
    let elements = Codec::Dense.encoded_bytes(&shape).map_err(|e| e.to_string())? / 4;
    let is_known = |most: u64| elements <= most;
    if !header.codec.is_lossless() && !links.most_elements(channel).is_some_and(is_known) {
        return Err(format!("sent a tensor of shape {shape:?} over {channel:?}, which the graph does not have"));
    }
    header.codec.encoded_bytes(&shape).map_err(|e| e.to_string())
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
