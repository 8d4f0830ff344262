//! What has arrived and was not taken yet. Network tasks put, the compute thread takes.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use fusionllm_codec::{Codec, HostTensor};
use fusionllm_protocol::{Channel, Pass};

use crate::ExchangeError;
use crate::stop::StopFlag;

/// Where a message belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot {
    /// The channel that it came over.
    pub channel: Channel,
    /// Whether it is of a training step or of an evaluation.
    pub pass: Pass,
    /// Updates done before the step that it belongs to.
    pub step: u64,
    /// The micro-batch; 0 for what is sent once a step.
    pub micro_batch: u32,
}

/// Arrived messages by slot. Its size is bounded by the senders' windows, to which [`crate::JobLinks`] holds them.
#[derive(Debug, Default)]
pub struct Mailbox {
    state: Mutex<State>,
    changed: Condvar,
    stop: StopFlag,
}

/// A message that has arrived.
#[derive(Clone, Debug)]
pub struct Arrived {
    /// The tensor, decoded.
    pub tensor: HostTensor,
    /// How it came. The sender may change codecs while training.
    pub codec: Codec,
    /// When it was there, decoded.
    pub at: Instant,
}

#[derive(Debug, Default)]
struct State {
    arrived: BTreeMap<Slot, Arrived>,
    closed: Option<ExchangeError>,
}

impl Mailbox {
    /// Delivers a message. False if one is there already, which stays.
    pub fn put(&self, slot: Slot, tensor: HostTensor, codec: Codec) -> bool {
        let mut state = self.lock();
        let is_new = !state.arrived.contains_key(&slot);
        if is_new {
            state.arrived.insert(slot, Arrived { tensor, codec, at: Instant::now() });
            self.changed.notify_all();
        }
        is_new
    }

    /// Waits for a message and takes it.
    ///
    /// # Errors
    /// Whatever the mailbox was closed with, if the message is not there.
    pub fn take(&self, slot: Slot) -> Result<Arrived, ExchangeError> {
        let mut state = self.lock();
        loop {
            if let Some(arrived) = state.arrived.remove(&slot) {
                return Ok(arrived);
            }
            if let Some(error) = &state.closed {
                return Err(error.clone());
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes a message if it is there.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn take_now(&self, slot: Slot) -> Result<Option<Arrived>, ExchangeError> {
        let mut state = self.lock();
        match (state.arrived.remove(&slot), &state.closed) {
            (None, Some(error)) => Err(error.clone()),
            (arrived, _) => Ok(arrived),
        }
    }

    /// Ends all waiting, now and later. The first reason stays.
    pub fn close(&self, error: ExchangeError) {
        self.lock().closed.get_or_insert(error);
        self.stop.set();
        self.changed.notify_all();
    }

    /// Is set once this is closed: for whoever computes and waits for nothing.
    pub(crate) fn stop_flag(&self) -> StopFlag {
        self.stop.clone()
    }

    /// Why it was closed, if it was.
    pub fn closed(&self) -> Option<ExchangeError> {
        self.lock().closed.clone()
    }

    /// A panic elsewhere cannot leave the map half-changed, so a poisoned lock is as good as any.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
