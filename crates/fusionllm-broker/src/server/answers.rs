//! Answers that wait until what was asked for is on disk.

use std::collections::VecDeque;

use tokio::sync::oneshot;

use crate::BrokerError;
use crate::core::Core;

/// Gives an answer, or why the request could not be written.
type Answer = Box<dyn FnOnce(Option<String>) + Send>;

/// Answers that wait for a writing, oldest first.
#[derive(Default)]
pub(super) struct Answers(VecDeque<(u64, Answer)>);

impl Answers {
    /// Answers once all that follows from a request is on disk, or with what `unwritten` makes of why it cannot be written.
    pub(super) fn once_written<T: Send + 'static>(
        &mut self,
        core: &Core,
        reply: oneshot::Sender<Result<T, BrokerError>>,
        result: Result<T, BrokerError>,
        unwritten: fn(String) -> BrokerError,
    ) {
        let answer = move |trouble: Option<String>| {
            let result = match trouble {
                Some(reason) => result.and(Err(unwritten(reason))),
                None => result,
            };
            // Nobody may be waiting for it any more.
            let _ = reply.send(result);
        };
        self.0.push_back((core.last_write(), Box::new(answer)));
        self.give(core);
    }

    /// Gives the answers that waited for what is on disk now.
    pub(super) fn give(&mut self, core: &Core) {
        while let Some((number, _)) = self.0.front() {
            let trouble = core.trouble().map(str::to_owned);
            if !core.is_written(*number) && trouble.is_none() {
                return;
            }
            let trouble = trouble.filter(|_| !core.is_written(*number));
            if let Some((_, answer)) = self.0.pop_front() {
                answer(trouble);
            }
        }
    }
}
