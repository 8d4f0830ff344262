//! The connection to the broker: one task reads, one writes, so that neither holds up the loop.

use std::collections::VecDeque;

use fusionllm_protocol::{
    ControlStream, FromBroker, FromCompNode, Hello, MOST_UNCONFIRMED, Numbered, ProtocolError, Role, Standing, decode,
    encode,
};
use fusionllm_transport::{Endpoint, FrameSink, FrameSource, PeerAddr, Session, StreamMeter};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::running::RunningJob;
use super::{CONTROL_MESSAGE_BYTES, Node};
use crate::CompNodeError;
use crate::knock::{Admitted, knock};
use crate::links::peer_record;

/// Messages that wait for the loop, or for the wire.
const QUEUE: usize = 64;
/// Messages that may wait for a broker that is away; jobs wait beyond that.
const OUTBOX: usize = 4096;

impl Node {
    /// What it says of itself when it joins, or comes back.
    pub(super) fn hello(&self, standing: Option<Standing>) -> Hello {
        let role = Role::CompNode {
            name: self.name.clone(),
            device: self.surveyor.backend.name().to_owned(),
            org: self.org.clone(),
            addr: peer_record(&self.endpoint.addr()),
            profile: self.profile.clone(),
            resume: self.has_joined.then(|| self.outbox.received()),
            standing,
        };
        Hello { secret: *self.ticket.secret.as_bytes(), role }
    }

    /// The job that it is at work on, if there is one.
    pub(super) fn standing(&self) -> Option<Standing> {
        self.job.as_ref().and_then(RunningJob::standing)
    }
}

/// What the broker is told, kept until it has it; and what it has said.
#[derive(Default)]
pub(super) struct Outbox {
    control: ControlStream<FromCompNode>,
    unsent: VecDeque<Numbered<FromCompNode>>,
}

impl Outbox {
    /// Whether another message may be told: jobs wait for a broker that takes none, or confirms none.
    pub(super) fn has_room(&self) -> bool {
        self.unsent.len() < OUTBOX && self.control.unconfirmed() < MOST_UNCONFIRMED / 2
    }

    /// Queues a message. One for which there is no room ends the session, see [`Self::check`].
    pub(super) fn push(&mut self, message: FromCompNode) {
        let frame = match message {
            // An old one is of no use.
            FromCompNode::Heartbeat { .. } => Ok(self.control.send_once(message)),
            message => self.control.send(message),
        };
        self.unsent.extend(frame);
    }

    /// Whether all that was told was kept.
    pub(super) fn check(&self) -> Result<(), ProtocolError> {
        self.control.check()
    }

    /// What a frame of the broker says; nothing if it was here before a break.
    pub(super) fn receive(&mut self, frame: Numbered<FromBroker>) -> Result<Option<FromBroker>, ProtocolError> {
        self.control.receive(frame)
    }

    /// Number of the last message that the broker has sent.
    pub(super) fn received(&self) -> u64 {
        self.control.received()
    }

    /// The broker has received so many before the break: all others go again.
    pub(super) fn resume(&mut self, received: u64) -> Result<(), ProtocolError> {
        self.unsent = self.control.resume(received)?.into();
        Ok(())
    }
}

/// A place at the broker.
pub(super) struct Connected {
    pub(super) name: String,
    /// How many of our messages it has, if it still knows us.
    pub(super) resumed: Option<u64>,
    pub(super) session: Session,
    pub(super) wire: BrokerWire,
}

/// Connects and is let in.
pub(super) async fn dial(endpoint: Endpoint, broker: PeerAddr, hello: Hello) -> Result<Connected, CompNodeError> {
    let session = endpoint.connect(&broker).await.map_err(|e| CompNodeError::Broker { reason: e.to_string() })?;
    let Admitted { name, resumed, sink, source } = knock(&session, &hello).await?;
    Ok(Connected { name, resumed, session, wire: BrokerWire::new(sink, source) })
}

/// Both directions of the control stream. Dropped, both tasks end.
pub(super) struct BrokerWire {
    incoming: mpsc::Receiver<Result<Numbered<FromBroker>, String>>,
    outgoing: mpsc::Sender<Vec<u8>>,
    is_full: bool,
    heard: StreamMeter,
    _tasks: JoinSet<()>,
}

impl BrokerWire {
    pub(super) fn new(sink: FrameSink, source: FrameSource) -> Self {
        let (read, incoming) = mpsc::channel(QUEUE);
        let (outgoing, queue) = mpsc::channel(QUEUE);
        let heard = source.meter();
        let mut tasks = JoinSet::new();
        tasks.spawn(read_all(source, read.clone()));
        tasks.spawn(write_all(sink, queue, read));
        Self { incoming, outgoing, is_full: false, heard, _tasks: tasks }
    }

    /// The broker's next message, or why there will be none. May be dropped before it is done without losing one.
    pub(super) async fn receive(&mut self) -> Result<Numbered<FromBroker>, String> {
        self.incoming.recv().await.unwrap_or_else(|| Err("its connection is gone".to_owned()))
    }

    /// Bytes of the broker's messages so far.
    pub(super) fn heard(&self) -> u64 {
        self.heard.bytes()
    }

    /// Hands over what is new, as far as there is room.
    pub(super) fn flush(&mut self, outbox: &mut Outbox) -> Result<(), ProtocolError> {
        outbox.check()?;
        self.is_full = false;
        loop {
            let place = match self.outgoing.try_reserve() {
                Ok(place) => place,
                Err(mpsc::error::TrySendError::Full(())) => {
                    self.is_full = true;
                    return Ok(());
                }
                // The reason comes with `receive`.
                Err(mpsc::error::TrySendError::Closed(())) => return Ok(()),
            };
            let Some(frame) = outbox.unsent.pop_front() else { return Ok(()) };
            place.send(encode(&frame)?);
        }
    }

    /// Waits until there is room again; for ever if there was room all along.
    pub(super) fn room(&self) -> impl Future<Output = ()> + use<> {
        let full = self.is_full.then(|| self.outgoing.clone());
        async move {
            match full {
                // A closed queue has no room, and `receive` says why it is closed.
                Some(queue) => drop(queue.reserve().await),
                None => std::future::pending().await,
            }
        }
    }
}

async fn read_all(mut source: FrameSource, messages: mpsc::Sender<Result<Numbered<FromBroker>, String>>) {
    loop {
        let message = match source.recv_limited(CONTROL_MESSAGE_BYTES).await {
            Ok(Some(frame)) => decode(&frame).map_err(|e| e.to_string()),
            Ok(None) => Err("it closed the stream".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        let is_last = message.is_err();
        // If the loop is gone it needs no message.
        if messages.send(message).await.is_err() || is_last {
            return;
        }
    }
}

async fn write_all(
    mut sink: FrameSink,
    mut frames: mpsc::Receiver<Vec<u8>>,
    failed: mpsc::Sender<Result<Numbered<FromBroker>, String>>,
) {
    while let Some(frame) = frames.recv().await {
        if let Err(error) = sink.send(&frame).await {
            // If the loop is gone it needs no reason.
            let _ = failed.send(Err(error.to_string())).await;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_wait_for_a_broker_that_confirms_nothing_and_its_answers_have_a_bound() {
        let mut outbox = Outbox::default();
        let mut told = 0;
        while outbox.has_room() {
            outbox.push(FromCompNode::ProbeAwaited { probe: told });
            outbox.unsent.clear();
            told += 1;
        }
        assert_eq!(told, MOST_UNCONFIRMED as u64 / 2);
        // What the broker asks for is answered nevertheless.
        while outbox.check().is_ok() {
            outbox.push(FromCompNode::ProbeAwaited { probe: told });
            told += 1;
        }
        assert_eq!(told, MOST_UNCONFIRMED as u64 + 1);
        assert!(outbox.resume(told - 1).is_err(), "a message is missing");
    }
}
