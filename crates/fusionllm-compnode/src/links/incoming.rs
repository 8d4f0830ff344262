//! One channel from one peer: receive, drop what came twice, decode, deliver, confirm what was taken.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fusionllm_protocol::{Channel, LoanFrame, OpDataHeader, PeerFrame, ReceiveWindow, Received, decode, encode};
use fusionllm_transport::{FrameSink, FrameSource, Session, SessionError};
use tokio::sync::watch;
use tokio::time::timeout;

use super::bounds::{Position, shape_of};
use super::breach::Breach;
use super::meter::Meter;
use super::{CONTROL_FRAME_BYTES, JobLinks, URGENT};
use crate::ExchangeError;
use crate::channel_codec::{ChannelDecoder, ChannelOptions};
use crate::mailbox::{Mailbox, Slot};
use crate::snapshots;

/// A stream that does not say what it carries for this long is closed.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// Close code of a connection that has nothing of a job.
const NOT_OF_A_JOB: u32 = 400;

/// A connection from a peer, and whether it has opened a channel. Clones are the same one.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub(super) session: Session,
    has_opened: Arc<AtomicBool>,
}

impl Line {
    pub(super) fn new(session: Session) -> Self {
        Self { session, has_opened: Arc::default() }
    }

    /// A stream's first frame was none that opens a channel. On a connection that has opened others that is the peer's
    /// doing, and would come again; one that has not is none of a job.
    fn opens_nothing(&self, links: &JobLinks, peer: usize, what: &str) {
        if self.has_opened.load(Ordering::Relaxed) {
            return links.fail(peer, what);
        }
        tracing::warn!(peer = links.name_of(peer), what, "closing a connection that opens no channel");
        self.session.close(NOT_OF_A_JOB, what);
    }
}

/// What stays of a channel when its connection is lost.
#[derive(Debug)]
pub(super) struct Incoming {
    progress: Mutex<Progress>,
    taken: watch::Sender<u64>,
    decoder: Mutex<ChannelDecoder>,
    /// Number of the stream that serves the channel: a newer one takes its place.
    stream: watch::Sender<u64>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    window: ReceiveWindow,
    /// The message that was delivered last.
    last: Option<Position>,
}

impl Incoming {
    pub(super) fn new(options: ChannelOptions, channel: Channel) -> Self {
        let decoder = Mutex::new(ChannelDecoder::new(options, channel));
        Self { progress: Mutex::default(), taken: watch::Sender::default(), decoder, stream: watch::Sender::default() }
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
    ) -> Result<(), Breach> {
        let mut decoder = self.decoder.lock().unwrap_or_else(PoisonError::into_inner);
        if number < self.lock().window.next() {
            return Ok(());
        }
        let (place, shape) = (Position::of(&header), shape_of(&header));
        let OpDataHeader { step, pass, micro_batch, codec, element, .. } = header;
        let tensor = decoder.decode(pass, codec, shape, element, payload)?;
        let received = {
            let mut progress = self.lock();
            progress.last = Some(place);
            progress.window.receive(number)?
        };
        match received {
            Received::Deliver if mailbox.put(Slot { channel, pass, step, micro_batch }, tensor, codec) => Ok(()),
            Received::Deliver => Err(Breach::Plan(format!("sent {place} over {channel:?} twice"))),
            Received::Duplicate => Ok(()),
        }
    }

    /// Whether a message may come now: a new one must follow the one before in the plan's order, and no more may be
    /// under way than the window holds.
    fn check(&self, links: &JobLinks, channel: Channel, number: u64, header: &OpDataHeader) -> Result<(), Breach> {
        let Progress { window, last } = *self.lock();
        if number < window.next() {
            return Ok(());
        }
        let most = links.window(channel) as u64;
        if number >= window.taken().saturating_add(most) {
            let what = format!("sent more than the {most} messages that may be under way over {channel:?}");
            return Err(Breach::Plan(what));
        }
        links.check_place(channel, last, Position::of(header))
    }

    /// A stream begins to serve the channel; its number.
    fn begin(&self) -> u64 {
        let mut own = 0;
        self.stream.send_modify(|number| {
            *number += 1;
            own = *number;
        });
        own
    }

    /// Waits until another stream serves the channel.
    async fn superseded(&self, own: u64) {
        // The sender lives as long as self, so this cannot end early.
        let _ = self.stream.subscribe().wait_for(|&newest| newest != own).await;
    }

    /// The task loop took one more message.
    pub(super) fn confirm_one(&self) {
        let next = self.lock().window.take();
        self.taken.send_replace(next);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves one stream that a peer has opened. A stream that is lost ends; the peer opens another. What no lost stream
/// explains ends the job: it would come again.
pub(super) async fn serve(
    links: &Arc<JobLinks>,
    peer: usize,
    line: &Line,
    mut sink: FrameSink,
    mut source: FrameSource,
) {
    let frame = match timeout(OPEN_LIMIT, source.recv_limited(CONTROL_FRAME_BYTES)).await {
        Ok(Ok(Some(frame))) => frame,
        Ok(Err(error @ SessionError::TooLarge { .. })) => return line.opens_nothing(links, peer, &error.to_string()),
        Ok(Ok(None) | Err(_)) | Err(_) => return,
    };
    let (key, channel) = match decode(&frame) {
        Ok(PeerFrame::Open { key, channel }) => (key, channel),
        Ok(PeerFrame::Loan(LoanFrame::Fetch { snapshot, params })) => {
            line.has_opened.store(true, Ordering::Relaxed);
            let Some(store) = &links.snapshots else { return };
            let may = snapshot.id.key.job == links.key.job;
            if let Err(error) = snapshots::lend(store, may, snapshot, params, sink).await {
                tracing::debug!(peer = links.name_of(peer), %error, "a snapshot that was lent broke off");
            }
            return;
        }
        Ok(_) => return line.opens_nothing(links, peer, "sent a frame that opens no channel"),
        Err(error) => return line.opens_nothing(links, peer, &error.to_string()),
    };
    line.has_opened.store(true, Ordering::Relaxed);
    if key != links.key {
        tracing::debug!(job = %key.job, "dropped a stream of another generation");
        return;
    }
    if links.sender_of(channel).map(|n| n.index()) != Some(peer) {
        return links.fail(peer, &format!("opened {channel:?}, which by the placement is not its to send"));
    }
    // On the way back there are only confirmations, for which the other's compute may wait.
    sink.set_priority(URGENT);
    let incoming = links.incoming(channel);
    let own = incoming.begin();
    let next = incoming.lock().window.next();
    let Ok(answer) = encode(&PeerFrame::Resume { next }) else { return };
    if sink.send(&answer).await.is_err() {
        return;
    }
    tokio::select! {
        biased;
        () = read(links, peer, channel, &incoming, source) => {}
        () = confirm(&incoming, &mut sink) => {}
        () = incoming.superseded(own) => {}
    }
}

async fn read(links: &Arc<JobLinks>, peer: usize, channel: Channel, incoming: &Arc<Incoming>, mut source: FrameSource) {
    let end = loop {
        let frame = match source.recv_limited(CONTROL_FRAME_BYTES).await {
            Ok(Some(frame)) => frame,
            Ok(None) => break None,
            Err(error) => break Some(error),
        };
        let (number, header) = match decode(&frame) {
            Ok(PeerFrame::Message { number, header }) => (number, header),
            Ok(_) => return links.fail(peer, "sent a frame that is no message"),
            Err(error) => return links.fail(peer, &error.to_string()),
        };
        let most = links.most_bytes(channel, &header);
        let most = match most.and_then(|most| incoming.check(links, channel, number, &header).map(|()| most)) {
            Ok(most) => most,
            Err(breach) => return links.fail(peer, &breach.to_string()),
        };
        let coming = links.meters.get(peer).map(Meter::begin);
        let payload = match source.recv_limited(most).await {
            Ok(Some(payload)) => payload,
            Ok(None) => break None,
            Err(error) => break Some(error),
        };
        if let Some(coming) = coming {
            coming.end(payload.len() as u64);
        }
        let (at, job) = (Arc::clone(incoming), Arc::clone(links));
        let deliver = move || at.deliver(&job.mailbox, channel, number, header, &payload);
        let delivered = links.workers.run(deliver).await;
        match delivered {
            Ok(Ok(())) => {}
            Ok(Err(breach)) => return links.fail(peer, &breach.to_string()),
            Err(error) => {
                let reason = format!("decoding a message of {}: {}", links.name_of(peer), crate::join_message(error));
                return links.mailbox.close(ExchangeError::Internal { reason });
            }
        }
    };
    if let Some(error @ SessionError::TooLarge { .. }) = end {
        return links.fail(peer, &format!("{channel:?}: {error}"));
    }
    // The sender closed the stream or is lost. If lost, it opens another.
    std::future::pending::<()>().await;
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
