//! A bounded, resumable stream of numbered messages, without the stream.
//!
//! The sender keeps each message until the receiver's task loop has taken it, and has at most `limit` of them
//! outstanding. After a lost connection the receiver names the number it expects, the sender drops what came
//! through and sends the rest again: nothing is lost and nothing is delivered twice.

use std::collections::VecDeque;

use crate::ProtocolError;

/// The sender's half.
#[derive(Debug)]
pub struct SendWindow<T> {
    limit: usize,
    /// Number of the first message in `unconfirmed`.
    first: u64,
    unconfirmed: VecDeque<T>,
    /// How many of `unconfirmed` have gone over the present connection.
    sent: usize,
}

impl<T> SendWindow<T> {
    /// A window of at most `limit` outstanding messages (at least one).
    pub fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), first: 0, unconfirmed: VecDeque::new(), sent: 0 }
    }

    /// Whether another message may be pushed.
    pub fn has_room(&self) -> bool {
        self.unconfirmed.len() < self.limit
    }

    /// Whether every message was taken by the receiver.
    pub fn is_empty(&self) -> bool {
        self.unconfirmed.is_empty()
    }

    /// Appends a message. Gives it back if there is no room.
    ///
    /// # Errors
    /// The message itself, when [`Self::has_room`] is false.
    pub fn push(&mut self, message: T) -> Result<(), T> {
        if self.has_room() {
            self.unconfirmed.push_back(message);
            Ok(())
        } else {
            Err(message)
        }
    }

    /// The next message to put on the wire, with its number. It counts as sent once asked for.
    pub fn next_to_send(&mut self) -> Option<(u64, &T)> {
        let message = self.unconfirmed.get(self.sent)?;
        let number = self.first + self.sent as u64;
        self.sent += 1;
        Some((number, message))
    }

    /// The receiver has taken every message before `next`. Whether that is news: a message more than it said before.
    ///
    /// # Errors
    /// [`ProtocolError::Acknowledged`] if it claims messages that were never sent.
    pub fn taken(&mut self, next: u64) -> Result<bool, ProtocolError> {
        let sent = self.first + self.unconfirmed.len() as u64;
        if next > sent {
            return Err(ProtocolError::Acknowledged { acknowledged: next, sent });
        }
        let is_news = next > self.first;
        while self.first < next {
            self.unconfirmed.pop_front();
            self.first += 1;
            self.sent = self.sent.saturating_sub(1);
        }
        Ok(is_news)
    }

    /// A new connection: the receiver expects message `next`. What it has but has not yet taken is kept, and not
    /// sent again.
    ///
    /// # Errors
    /// [`ProtocolError::Acknowledged`] or [`ProtocolError::Gap`] if that cannot be.
    pub fn resume(&mut self, next: u64) -> Result<(), ProtocolError> {
        let end = self.first + self.unconfirmed.len() as u64;
        if next > end {
            return Err(ProtocolError::Acknowledged { acknowledged: next, sent: end });
        }
        if next < self.first {
            return Err(ProtocolError::Gap { expected: next, got: self.first });
        }
        self.sent = (next - self.first) as usize;
        Ok(())
    }
}

/// What to do with a message that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// It is the one that was due: deliver it.
    Deliver,
    /// It came before: drop it.
    Duplicate,
}

/// The receiver's half.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReceiveWindow {
    next: u64,
    taken: u64,
}

impl ReceiveWindow {
    /// Number of the message that is due.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Number of the first message that the task loop has not taken.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// A message came.
    ///
    /// # Errors
    /// [`ProtocolError::Gap`] if one before it is missing.
    pub fn receive(&mut self, number: u64) -> Result<Received, ProtocolError> {
        if number > self.next {
            return Err(ProtocolError::Gap { expected: self.next, got: number });
        }
        if number < self.next {
            return Ok(Received::Duplicate);
        }
        self.next += 1;
        Ok(Received::Deliver)
    }

    /// The task loop took one more message; returns the number to confirm.
    pub fn take(&mut self) -> u64 {
        self.taken = (self.taken + 1).min(self.next);
        self.taken
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_full_window_gives_the_message_back() {
        let mut window = SendWindow::new(1);
        window.push('a').unwrap();
        assert_eq!(window.push('b'), Err('b'));
        window.next_to_send().unwrap();
        assert!(!window.taken(0).unwrap() && window.taken(1).unwrap() && !window.taken(1).unwrap());
        assert_eq!(window.push('b'), Ok(()));
    }

    #[test]
    fn a_peer_cannot_confirm_what_was_never_sent() {
        let mut window: SendWindow<char> = SendWindow::new(4);
        assert_eq!(window.taken(1), Err(ProtocolError::Acknowledged { acknowledged: 1, sent: 0 }));
        assert_eq!(window.resume(1), Err(ProtocolError::Acknowledged { acknowledged: 1, sent: 0 }));
    }

    proptest! {
        /// A wire that loses connections and confirmations at any point.
        #[test]
        fn resume_delivers_each_message_once_and_in_order(
            limit in 1usize..6,
            events in prop::collection::vec(0u8..5, 0..400),
        ) {
            let (mut sender, mut receiver) = (SendWindow::new(limit), ReceiveWindow::default());
            let (mut produced, mut delivered, mut consumed) = (0u64, Vec::new(), 0usize);
            for event in events {
                match event {
                    0 => if sender.push(produced).is_ok() { produced += 1 },
                    1 => if let Some((number, &message)) = sender.next_to_send()
                        && receiver.receive(number).unwrap() == Received::Deliver { delivered.push(message) },
                    // The message is lost with its connection.
                    2 => {
                        sender.next_to_send();
                        sender.resume(receiver.next()).unwrap();
                    }
                    3 => if consumed < delivered.len() { consumed += 1; sender.taken(receiver.take()).unwrap(); },
                    // The confirmation is lost; a later one covers it.
                    _ => if consumed < delivered.len() { consumed += 1; receiver.take(); },
                }
                prop_assert!(produced - sender.first <= limit as u64);
            }
            sender.resume(receiver.next()).unwrap();
            while let Some((number, &message)) = sender.next_to_send() {
                if receiver.receive(number).unwrap() == Received::Deliver { delivered.push(message) }
            }
            prop_assert_eq!(delivered, (0..produced).collect::<Vec<_>>());
        }
    }
}
