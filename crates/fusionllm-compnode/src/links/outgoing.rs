//! One channel to one peer: encode, send, keep until taken, send again after a lost connection.

use std::sync::Arc;

use fusionllm_codec::HostTensor;
use fusionllm_protocol::{Channel, OpDataHeader, PeerFrame, ProtocolError, SendWindow, decode, encode};
use fusionllm_transport::{FrameSink, FrameSource, SessionError};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::attempts::Attempts;
use super::workers::Workers;
use super::{CONTROL_FRAME_BYTES, JobLinks, URGENT};
use crate::ExchangeError;
use crate::channel_codec::{ChannelEncoder, Found};
use crate::exchange::Message;

/// What the task loop has for a channel.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// A message to be encoded and sent.
    Message(Message),
    /// Say what the encoder holds back after all messages before.
    Residual(oneshot::Sender<Option<HostTensor>>),
}

/// An encoded message.
#[derive(Clone, Debug)]
struct Encoded {
    header: OpDataHeader,
    payload: Arc<Vec<u8>>,
}

/// Sends what the queue gives until it is closed and the receiver has taken everything.
pub(super) async fn run(
    links: &Arc<JobLinks>,
    peer: usize,
    channel: Channel,
    mut queue: mpsc::Receiver<Outgoing>,
    mut encoder: ChannelEncoder,
) -> Result<(), ExchangeError> {
    let mut window: SendWindow<Encoded> = SendWindow::new(links.window(channel));
    let mut buffers = Buffers::default();
    let mut queue_open = true;
    let mut attempts = Attempts::default();
    loop {
        let session = links.session_to(peer).await?;
        let Ok((mut sink, mut source)) = session.open_bi().await else {
            // The connection is gone; its watcher clears it before the next dial.
            let closed = session.closed().await;
            attempts.again().await.map_err(|gave_up| refused(links, peer, &gave_up.after(&closed.reason)))?;
            continue;
        };
        sink.set_priority(priority(channel));
        let next = match open(links, channel, &mut sink, &mut source).await {
            Ok(next) => next,
            Err(Broken::Lost(reason)) => {
                attempts.again().await.map_err(|gave_up| refused(links, peer, &gave_up.after(&reason)))?;
                continue;
            }
            Err(Broken::Wrong(reason)) => return Err(refused(links, peer, &reason)),
        };
        window.resume(next).map_err(|e| refused(links, peer, &e))?;
        attempts.opened(Instant::now());
        let mut taken = spawn_reader(links, source);
        let lost = loop {
            match send_all(&mut window, &mut sink).await {
                Ok(()) => {}
                Err(Broken::Lost(reason)) => break reason,
                Err(Broken::Wrong(reason)) => return Err(refused(links, peer, &reason)),
            }
            if !queue_open && window.is_empty() {
                // Nothing is owed any more, so a peer that has already gone is no failure.
                let _ = sink.finish().await;
                return Ok(());
            }
            tokio::select! {
                // What was taken makes room, and a lost stream is known before a message is encoded for it.
                biased;
                next = taken.recv() => match next {
                    Some(Ok(next)) => {
                        if window.taken(next).map_err(|e| refused(links, peer, &e))? {
                            attempts.progress();
                        }
                    }
                    Some(Err(Broken::Lost(reason))) => break reason,
                    Some(Err(Broken::Wrong(reason))) => return Err(refused(links, peer, &reason)),
                    None => break "the stream has ended".to_owned(),
                },
                message = queue.recv(), if queue_open && window.has_room() => match message {
                    Some(Outgoing::Residual(reply)) => {
                        // If nobody waits any more, nobody needs it.
                        let _ = reply.send(encoder.residual());
                    }
                    Some(Outgoing::Message(message)) => {
                        let (encoded, found);
                        (encoder, encoded, found) = encode_message(&links.workers, encoder, message, buffers.free()).await?;
                        buffers.lend(&encoded.payload);
                        links.found(peer, found);
                        if window.push(encoded).is_err() {
                            return Err(refused(links, peer, &"the window overflowed (internal error)"));
                        }
                    }
                    None => queue_open = false,
                },
            }
        };
        attempts.again().await.map_err(|gave_up| refused(links, peer, &gave_up.after(&lost)))?;
    }
}

/// Why a stream cannot go on.
#[derive(Debug)]
enum Broken {
    /// It is lost: another one may do.
    Lost(String),
    /// The peer does not keep to the protocol: another one would end the same way.
    Wrong(String),
}

impl From<SessionError> for Broken {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::TooLarge { .. } => Self::Wrong(error.to_string()),
            _ => Self::Lost(error.to_string()),
        }
    }
}

impl From<ProtocolError> for Broken {
    fn from(error: ProtocolError) -> Self {
        Self::Wrong(error.to_string())
    }
}

/// What a few bytes hold up goes before large tensors, and before gradients of shared parameters.
fn priority(channel: Channel) -> i32 {
    match channel {
        Channel::NormPart { .. } | Channel::NormTotal { .. } => URGENT,
        Channel::Activation(_) | Channel::Gradient(_) | Channel::Shared { .. } => 0,
    }
}

fn refused(links: &JobLinks, peer: usize, reason: &dyn std::fmt::Display) -> ExchangeError {
    ExchangeError::Peer { peer: links.name_of(peer), reason: reason.to_string() }
}

/// Opens the channel on a fresh stream; the number of the message that the receiver expects.
async fn open(
    links: &JobLinks,
    channel: Channel,
    sink: &mut FrameSink,
    source: &mut FrameSource,
) -> Result<u64, Broken> {
    let frame = encode(&PeerFrame::Open { key: links.key, channel })?;
    sink.send(&frame).await?;
    let answer = source.recv_limited(CONTROL_FRAME_BYTES).await?;
    match decode(&answer.ok_or_else(|| Broken::Lost("it closed the stream".to_owned()))?)? {
        PeerFrame::Resume { next } => Ok(next),
        _ => Err(Broken::Wrong("answered a new stream by a frame that says not where to go on".to_owned())),
    }
}

/// Reads confirmations apart from the sending, since reading a frame must not be cut short.
fn spawn_reader(links: &JobLinks, mut source: FrameSource) -> mpsc::Receiver<Result<u64, Broken>> {
    let (sender, receiver) = mpsc::channel(16);
    links.spawn(async move {
        loop {
            let next = confirmation(&mut source).await;
            let is_last = next.is_err();
            // Nobody listens any more when the stream was given up.
            if sender.send(next).await.is_err() || is_last {
                return;
            }
        }
    });
    receiver
}

async fn confirmation(source: &mut FrameSource) -> Result<u64, Broken> {
    let frame = source.recv_limited(CONTROL_FRAME_BYTES).await?;
    match decode(&frame.ok_or_else(|| Broken::Lost("it closed the stream".to_owned()))?)? {
        PeerFrame::Taken { next } => Ok(next),
        _ => Err(Broken::Wrong("sent a frame that confirms nothing where a confirmation was due".to_owned())),
    }
}

async fn send_all(window: &mut SendWindow<Encoded>, sink: &mut FrameSink) -> Result<(), Broken> {
    while let Some((number, message)) = window.next_to_send() {
        let message = message.clone();
        let frame = encode(&PeerFrame::Message { number, header: message.header })?;
        sink.send(&frame).await?;
        sink.send(&message.payload).await?;
    }
    Ok(())
}

/// Buffers that nobody holds are kept up to this number.
const SPARE_BUFFERS: usize = 2;

/// Memory of payloads, used again once the receiver has taken them. Each would else be allocated by another thread than
/// frees it, which leaves it with the first thread until that allocates again.
#[derive(Debug, Default)]
struct Buffers(Vec<Arc<Vec<u8>>>);

impl Buffers {
    /// An empty buffer, of memory that is no longer in use if there is any.
    fn free(&mut self) -> Vec<u8> {
        let free = self.0.iter().position(|buffer| Arc::strong_count(buffer) == 1);
        let mut buffer = free.and_then(|at| Arc::into_inner(self.0.swap_remove(at))).unwrap_or_default();
        buffer.clear();
        let mut spare = 0;
        self.0.retain(|buffer| {
            spare += usize::from(Arc::strong_count(buffer) == 1);
            Arc::strong_count(buffer) > 1 || spare <= SPARE_BUFFERS
        });
        buffer
    }

    /// Remembers a payload until nobody else holds it.
    fn lend(&mut self, payload: &Arc<Vec<u8>>) {
        self.0.push(Arc::clone(payload));
    }
}

/// Encodes a message where that may take long. The encoder goes there and comes back by value: no second message can be
/// encoded meanwhile, so what it remembers follows the order of the queue. If the work panics it is lost, and the job with it.
async fn encode_message(
    workers: &Workers,
    mut encoder: ChannelEncoder,
    message: Message,
    mut payload: Vec<u8>,
) -> Result<(ChannelEncoder, Encoded, Found), ExchangeError> {
    let encoded = workers.run(move || {
        let header = header_of(&message);
        let found = encoder.encode(&message.slot, message.codec, &message.tensor, &mut payload)?;
        Ok((encoder, Encoded { header, payload: Arc::new(payload) }, found))
    });
    let panicked =
        |e| Err(ExchangeError::Internal { reason: format!("encoding a message: {}", crate::join_message(e)) });
    encoded.await.unwrap_or_else(panicked)
}

pub(super) fn header_of(message: &Message) -> OpDataHeader {
    OpDataHeader {
        step: message.slot.step,
        pass: message.slot.pass,
        micro_batch: message.slot.micro_batch,
        codec: message.codec,
        element: message.tensor.element_type(),
        shape: message.tensor.shape().iter().map(|&d| d as u64).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_a_payload_is_used_again_when_nobody_holds_it() {
        let mut buffers = Buffers::default();
        let lend = |buffers: &mut Buffers| {
            let mut buffer = buffers.free();
            buffer.resize(1000, 1);
            let payload = Arc::new(buffer);
            buffers.lend(&payload);
            payload
        };
        let (one, two) = (lend(&mut buffers), lend(&mut buffers));
        let place = two.as_ptr();
        drop(two);
        let three = buffers.free();
        assert_eq!((three.as_ptr(), three.len()), (place, 0));
        assert!(buffers.free().capacity() == 0, "the other one is still held");
        drop(one);
        assert!(buffers.free().capacity() >= 1000);
        assert!(buffers.0.is_empty());
    }
}
