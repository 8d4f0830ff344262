//! Control messages over a connection that may break: numbered, kept until the other end has them, sent again.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::ProtocolError;

/// Messages that are kept for an other end that confirms none: minutes of a fast job's reports, and memory for them. Every
/// frame of the other end confirms, heartbeats and their answers, too.
pub const MOST_UNCONFIRMED: usize = 1 << 14;

/// One frame of the control stream between broker and CompNode.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Numbered<M> {
    /// From 1, in the order of sending. 0: a message that is not sent again after a break, such as a heartbeat.
    pub number: u64,
    /// Number of the last message that the sender of this one has received.
    pub received: u64,
    /// The message that has this number.
    pub message: M,
}

/// One end of the control stream: what it has sent and the other end may not have, and what it has received.
#[derive(Debug)]
pub struct ControlStream<M> {
    sent: u64,
    /// Messages up to `sent` that the other end has not confirmed.
    unconfirmed: VecDeque<M>,
    received: u64,
    /// Whether a message could not be kept, so that nothing can go on from here.
    is_broken: bool,
}

impl<M> Default for ControlStream<M> {
    fn default() -> Self {
        Self { sent: 0, unconfirmed: VecDeque::new(), received: 0, is_broken: false }
    }
}

impl<M: Clone> ControlStream<M> {
    /// A message to send now, and again after a break if the other end has not received it by then.
    ///
    /// # Errors
    /// [`ProtocolError::Unconfirmed`] if [`MOST_UNCONFIRMED`] are kept already. The stream has a gap then: it can be neither
    /// gone on with nor resumed.
    pub fn send(&mut self, message: M) -> Result<Numbered<M>, ProtocolError> {
        self.is_broken |= self.unconfirmed.len() >= MOST_UNCONFIRMED;
        self.check()?;
        self.sent += 1;
        self.unconfirmed.push_back(message.clone());
        Ok(Numbered { number: self.sent, received: self.received, message })
    }

    /// Whether nothing was lost.
    ///
    /// # Errors
    /// [`ProtocolError::Unconfirmed`] if a message could not be kept.
    pub fn check(&self) -> Result<(), ProtocolError> {
        let unconfirmed = self.unconfirmed.len();
        if self.is_broken { Err(ProtocolError::Unconfirmed { unconfirmed }) } else { Ok(()) }
    }

    /// A message to send now or never.
    pub fn send_once(&self, message: M) -> Numbered<M> {
        Numbered { number: 0, received: self.received, message }
    }

    /// Takes in what the other end sent. Nothing if it was here before.
    ///
    /// # Errors
    /// [`ProtocolError::Gap`] if a message before it is missing, [`ProtocolError::Acknowledged`] if it confirms a message
    /// that was not sent.
    pub fn receive<R>(&mut self, frame: Numbered<R>) -> Result<Option<R>, ProtocolError> {
        self.confirm(frame.received)?;
        let expected = self.received + 1;
        match frame.number {
            0 => Ok(Some(frame.message)),
            number if number == expected => {
                self.received = number;
                Ok(Some(frame.message))
            }
            number if number < expected => Ok(None),
            got => Err(ProtocolError::Gap { got, expected }),
        }
    }

    /// Number of the last message received.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// How many messages the other end has not confirmed.
    pub fn unconfirmed(&self) -> usize {
        self.unconfirmed.len()
    }

    /// After a break the other end has received `received`: what must be sent again, in this order.
    ///
    /// # Errors
    /// [`ProtocolError::Acknowledged`] if so many were never sent: it is another stream's number.
    /// [`ProtocolError::Unconfirmed`] if a message could not be kept.
    pub fn resume(&mut self, received: u64) -> Result<Vec<Numbered<M>>, ProtocolError> {
        self.check()?;
        self.confirm(received)?;
        let last = self.received;
        let frame = |(number, message): (u64, &M)| Numbered { number, received: last, message: message.clone() };
        Ok((received + 1..).zip(&self.unconfirmed).map(frame).collect())
    }

    fn confirm(&mut self, received: u64) -> Result<(), ProtocolError> {
        let first = self.sent - self.unconfirmed.len() as u64 + 1;
        if received > self.sent {
            return Err(ProtocolError::Acknowledged { acknowledged: received, sent: self.sent });
        }
        let confirmed = (received + 1).saturating_sub(first) as usize;
        self.unconfirmed.drain(..confirmed.min(self.unconfirmed.len()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small generator, so that a failing seed can be run again.
    fn draw(seed: &mut u64, below: u64) -> u64 {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 33) % below
    }

    #[test]
    fn nothing_is_lost_or_doubled_however_often_the_connection_breaks() {
        for run in 0..500 {
            let mut seed = run;
            let (mut a, mut b) = (ControlStream::<u64>::default(), ControlStream::<u64>::default());
            let (mut to_b, mut to_a) = (VecDeque::new(), VecDeque::new());
            let (mut said, mut heard) = (0, Vec::new());
            for _ in 0..200 {
                match draw(&mut seed, 8) {
                    0..=2 => {
                        said += 1;
                        to_b.push_back(a.send(said).unwrap());
                    }
                    3 => to_a.push_back(b.send_once(0)),
                    4 | 5 => {
                        if let Some(frame) = to_b.pop_front() {
                            heard.extend(b.receive(frame).unwrap());
                        }
                    }
                    6 => {
                        if let Some(frame) = to_a.pop_front() {
                            assert_eq!(a.receive(frame).unwrap(), Some(0));
                        }
                    }
                    _ => {
                        // What was on its way is gone.
                        to_a.clear();
                        to_b = a.resume(b.received()).unwrap().into();
                        assert!(b.resume(a.received()).unwrap().is_empty());
                    }
                }
            }
            to_b = a.resume(b.received()).unwrap().into();
            for frame in to_b {
                heard.extend(b.receive(frame).unwrap());
            }
            assert_eq!(heard, (1..=said).collect::<Vec<_>>());
            a.receive(b.send_once(0)).unwrap();
            assert_eq!(a.unconfirmed(), 0);
        }
    }

    #[test]
    fn what_the_other_end_does_not_confirm_is_kept_within_bounds() {
        let mut stream = ControlStream::<u8>::default();
        for _ in 0..MOST_UNCONFIRMED {
            stream.send(1).unwrap();
        }
        // What is sent once is not kept.
        stream.send_once(1);
        let confirm = |received| Numbered { number: 0, received, message: 2u8 };
        stream.receive(confirm(1)).unwrap();
        stream.send(1).unwrap();
        assert_eq!(stream.send(1), Err(ProtocolError::Unconfirmed { unconfirmed: MOST_UNCONFIRMED }));
        // A message is missing, whatever is confirmed later.
        stream.receive(confirm(9)).unwrap();
        assert!(stream.send(1).is_err() && stream.resume(9).is_err());
        assert!(stream.unconfirmed() < MOST_UNCONFIRMED);
    }

    #[test]
    fn numbers_of_another_stream_are_errors() {
        let mut stream = ControlStream::<u8>::default();
        stream.send(1).unwrap();
        assert!(stream.resume(2).is_err());
        let frame = Numbered { number: 2, received: 0, message: 1u8 };
        assert_eq!(stream.receive(frame).unwrap_err().to_string(), "message 2 came where 1 was due");
    }
}
