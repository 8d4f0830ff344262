//! Connections to peers: the CompNode with the lower index dials, and again after each break.

use std::sync::Arc;

use fusionllm_planner::{NodeIndex, Route};
use fusionllm_protocol::Channel;
use fusionllm_transport::Session;
use tokio::time::{Instant, sleep, timeout_at};

use super::{BACK_OFF, JobLinks, REDIAL_LIMIT, unreached};
use crate::ExchangeError;

impl JobLinks {
    /// Dials every CompNode that is ours to dial and that a message may come from or go to, and again whenever the
    /// connection is lost. Who has nothing to send, or nothing yet, would else never dial, and the other end waits for it.
    pub fn dial_all(self: &Arc<Self>) {
        for peer in self.node.index() + 1..self.peers.len() {
            if !self.talks_to(peer) {
                continue;
            }
            let links = Arc::clone(self);
            self.spawn(async move {
                let error = links.stay_connected(peer).await;
                links.mailbox.close(error);
            });
        }
    }

    /// Keeps a connection to a peer that is ours to dial. Gives why that is not possible any more.
    async fn stay_connected(self: &Arc<Self>, peer: usize) -> ExchangeError {
        let mut pause = BACK_OFF.0;
        loop {
            let session = match self.session_to(peer).await {
                Ok(session) => session,
                Err(error) => return error,
            };
            let connected = Instant::now();
            session.closed().await;
            // A peer that closes each connection at once is not dialled in a circle; whether that is too much is for those
            // to say who send over it.
            pause = if connected.elapsed() > REDIAL_LIMIT { BACK_OFF.0 } else { (pause * 2).min(BACK_OFF.1) };
            sleep(pause).await;
        }
    }

    /// Whether a channel leads to this CompNode or from it.
    fn talks_to(&self, peer: usize) -> bool {
        let (own, peer) = (self.node, NodeIndex(u32::try_from(peer).unwrap_or(u32::MAX)));
        let between = |(from, to)| (from, to) == (own, peer) || (from, to) == (peer, own);
        Channel::all(&self.placement, self.rules.clip.is_some()).any(|(_, Route { from, to })| between((from, to)))
    }

    /// A live connection to a peer: the one there is, a new one if it is ours to dial, else the next that comes.
    pub(super) async fn session_to(self: &Arc<Self>, peer: usize) -> Result<Session, ExchangeError> {
        let node = NodeIndex(u32::try_from(peer).unwrap_or(u32::MAX));
        let lost = |reason: String| ExchangeError::Unreached { node, peer: self.name_of(peer), reason };
        let (Some(slot), Some(addr), Some(dialling)) =
            (self.sessions.get(peer), self.peers.get(peer), self.dialling.get(peer))
        else {
            return Err(lost("not of this job".to_owned()));
        };
        let deadline = Instant::now() + REDIAL_LIMIT;
        // One at a time: others find what comes of it.
        let _one_at_a_time = dialling.lock().await;
        if peer < self.node.index() {
            let mut current = slot.subscribe();
            let waited = timeout_at(deadline, current.wait_for(Option::is_some)).await;
            let session = waited.ok().and_then(Result::ok).and_then(|s| s.clone());
            return session.ok_or_else(|| lost(format!("did not connect within {} s", REDIAL_LIMIT.as_secs())));
        }
        let mut pause = BACK_OFF.0;
        loop {
            // A job that has ended is not dialled for.
            if let Some(error) = self.mailbox.closed() {
                return Err(error);
            }
            if let Some(session) = slot.borrow().clone() {
                return Ok(session);
            }
            let addr = addr.borrow().clone();
            match self.endpoint.connect(&addr).await {
                Ok(session) => {
                    self.install(peer, session.clone());
                    return Ok(session);
                }
                Err(error) if Instant::now() + pause > deadline => return Err(lost(unreached(&error))),
                Err(error) => tracing::debug!(peer = self.name_of(peer), %error, "dial failed, trying again"),
            }
            sleep(pause).await;
            pause = (pause * 2).min(BACK_OFF.1);
        }
    }
}
