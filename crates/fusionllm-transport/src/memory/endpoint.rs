//! Endpoints and connections of a network in memory.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;

use rand::RngExt;

use super::halves::{Receiver, Sender};
use super::link::{End, Receiving, Sending, Side, StreamId, gone};
use super::state::{Net, Outcome, Place, wait};
use crate::wire::{Connection, Halves, Later, ReceiveHalf, SendHalf, SessionStats, SharedConnection, Wire};
use crate::{Admission, ConnectError, PeerAddr, PeerId, Purpose, RelayState, SessionError};

/// One endpoint; dropped, its connections close.
#[derive(Debug)]
pub(super) struct MemoryEndpoint {
    net: Net,
    place: usize,
    id: PeerId,
}

impl MemoryEndpoint {
    pub(super) fn new(net: Net, admission: Arc<dyn Admission>) -> Self {
        let (place, id) = net.with(|state| {
            let id = PeerId::from_bytes(state.dice.random());
            let place = state.places.len();
            let (incoming, wakers) = (VecDeque::new(), Vec::new());
            state.places.push(Place { id, admission, is_closed: false, incoming, wakers });
            (place, id)
        });
        Self { net, place, id }
    }

    fn close_all(&self) {
        self.net.with(|state| {
            let Some(place) = state.places.get_mut(self.place) else { return };
            place.is_closed = true;
            let mut wake = std::mem::take(&mut place.wakers);
            state.wake.append(&mut wake);
            let waiting = std::mem::take(&mut place.incoming);
            let sides = state.links.iter().flat_map(|(&link, both)| {
                both.ends
                    .iter()
                    .enumerate()
                    .filter(|(_, end)| end.place == self.place)
                    .map(move |(side, _)| (link, side))
            });
            for (link, side) in sides.collect::<Vec<_>>() {
                state.close(link, side, 0, "");
            }
            waiting.into_iter().for_each(|link| state.release(link, 1));
        });
    }
}

impl Drop for MemoryEndpoint {
    fn drop(&mut self) {
        self.close_all();
    }
}

/// A dial that is given up when this is dropped.
struct Dialling {
    net: Net,
    dial: u64,
}

impl Drop for Dialling {
    fn drop(&mut self) {
        self.net.with(|state| state.hang_up(self.dial));
    }
}

impl Wire for MemoryEndpoint {
    fn id(&self) -> PeerId {
        self.id
    }

    fn addr(&self) -> PeerAddr {
        let port = u16::try_from(self.place).unwrap_or(u16::MAX);
        PeerAddr { id: self.id, addrs: vec![SocketAddr::from(([127, 0, 0, 1], port))] }
    }

    fn relay_state(&self) -> RelayState {
        RelayState::None
    }

    fn connect<'a>(
        &'a self,
        peer: &'a PeerAddr,
        purpose: Purpose,
    ) -> Later<'a, Result<SharedConnection, ConnectError>> {
        Box::pin(async move {
            let dial = self.net.with(|state| state.dial(self.place, peer.id, purpose));
            let dialling = Dialling { net: self.net.clone(), dial };
            let result = poll_fn(|cx| {
                self.net.with(|state| {
                    let Some(dial) = state.dials.get_mut(&dialling.dial) else {
                        return Poll::Ready(Err(Outcome::Silence));
                    };
                    match dial.result.take() {
                        Some(result) => Poll::Ready(result),
                        None => {
                            dial.waker = Some(cx.waker().clone());
                            Poll::Pending
                        }
                    }
                })
            });
            let (id, addrs) = (peer.id, peer.addrs.clone());
            match result.await {
                Ok(link) => Ok(MemoryConnection::of(&self.net, link, 0, id)),
                Err(Outcome::Refused) => {
                    Err(ConnectError::Failed { peer: id, addrs, reason: "somebody else answers".to_owned() })
                }
                Err(_) => {
                    let limit_s = self.net.with(|state| state.weather.dial_limit.as_secs());
                    Err(ConnectError::Unreachable { peer: id, addrs, limit_s, relay: RelayState::None })
                }
            }
        })
    }

    fn accept(&self) -> Later<'_, Option<SharedConnection>> {
        Box::pin(poll_fn(move |cx| {
            let accepted = self.net.with(|state| {
                let place = state.places.get_mut(self.place)?;
                if let Some(link) = place.incoming.pop_front() {
                    let from = state.links.get(&link).map(|both| both.ends[0].place)?;
                    return Some(Poll::Ready((link, state.places.get(from)?.id)));
                }
                if place.is_closed {
                    return None;
                }
                wait(&mut place.wakers, cx.waker());
                Some(Poll::Pending)
            });
            match accepted {
                None => Poll::Ready(None),
                Some(Poll::Pending) => Poll::Pending,
                Some(Poll::Ready((link, peer))) => Poll::Ready(Some(MemoryConnection::of(&self.net, link, 1, peer))),
            }
        }))
    }

    fn close(&self) -> Later<'_, ()> {
        self.close_all();
        Box::pin(async {})
    }
}

/// One side of a connection, which closes when this and its streams are gone.
#[derive(Debug)]
struct MemoryConnection {
    net: Net,
    link: usize,
    side: Side,
    peer: PeerId,
}

impl MemoryConnection {
    /// Of a side that is counted already.
    fn of(net: &Net, link: usize, side: Side, peer: PeerId) -> SharedConnection {
        Arc::new(Self { net: net.clone(), link, side, peer })
    }

    /// Waits until something of this side can be had, or the connection is over.
    async fn get<T>(&self, mut look: impl FnMut(&mut End) -> Option<T>) -> Result<T, SessionError> {
        poll_fn(|cx| {
            self.net.with(|state| {
                let Some(end) = state.end(self.link, self.side) else { return Poll::Ready(Err(gone())) };
                if let Some(found) = look(end) {
                    return Poll::Ready(Ok(found));
                }
                if let Some(error) = &end.error {
                    return Poll::Ready(Err(error.clone()));
                }
                wait(&mut end.wakers, cx.waker());
                Poll::Pending
            })
        })
        .await
    }

    async fn open(&self, is_two_way: bool) -> Result<StreamId, SessionError> {
        let window = self.net.with(|state| state.weather.window.max(1));
        let kind = usize::from(is_two_way);
        self.get(|end| {
            if end.error.is_some() || end.opened[kind] >= end.may_open[kind] {
                return None;
            }
            let stream = StreamId { opener: self.side, is_two_way, index: end.opened[kind] };
            end.opened[kind] += 1;
            end.handles += 1 + kind;
            end.sending.insert(stream, Sending { room: window, ..Sending::default() });
            if is_two_way {
                end.receiving.insert(stream, Receiving::default());
            }
            Some(stream)
        })
        .await
    }

    async fn accept(&self, kind: usize) -> Result<StreamId, SessionError> {
        self.get(|end| {
            let stream = end.incoming[kind].pop_front()?;
            end.handles += 1 + kind;
            Some(stream)
        })
        .await
    }

    fn sender(&self, stream: StreamId) -> Box<dyn SendHalf> {
        Box::new(Sender { net: self.net.clone(), link: self.link, side: self.side, stream })
    }

    fn receiver(&self, stream: StreamId) -> Box<dyn ReceiveHalf> {
        Box::new(Receiver { net: self.net.clone(), link: self.link, side: self.side, stream })
    }
}

impl Drop for MemoryConnection {
    fn drop(&mut self) {
        self.net.with(|state| state.release(self.link, self.side));
    }
}

impl Connection for MemoryConnection {
    fn peer(&self) -> PeerId {
        self.peer
    }

    fn number(&self) -> usize {
        self.link
    }

    fn purpose(&self) -> Purpose {
        self.net.with(|state| state.links.get(&self.link).map_or(Purpose::Work, |link| link.purpose))
    }

    fn admit(&self) {
        self.net.with(|state| state.admit(self.link, self.side));
    }

    fn allow_streams(&self, streams: u32) {
        self.net.with(|state| state.allow(self.link, self.side, 1, streams.into()));
    }

    fn open_uni(&self) -> Later<'_, Result<Box<dyn SendHalf>, SessionError>> {
        Box::pin(async { Ok(self.sender(self.open(false).await?)) })
    }

    fn accept_uni(&self) -> Later<'_, Result<Box<dyn ReceiveHalf>, SessionError>> {
        Box::pin(async { Ok(self.receiver(self.accept(0).await?)) })
    }

    fn open_bi(&self) -> Later<'_, Result<Halves, SessionError>> {
        Box::pin(async {
            let stream = self.open(true).await?;
            Ok((self.sender(stream), self.receiver(stream)))
        })
    }

    fn accept_bi(&self) -> Later<'_, Result<Halves, SessionError>> {
        Box::pin(async {
            let stream = self.accept(1).await?;
            Ok((self.sender(stream), self.receiver(stream)))
        })
    }

    fn close(&self, code: u32, reason: &str) {
        self.net.with(|state| state.close(self.link, self.side, code, reason));
    }

    fn closed(&self) -> Later<'_, SessionError> {
        Box::pin(async { self.get(|_| None::<SessionError>).await.unwrap_or_else(|error| error) })
    }

    fn stats(&self) -> SessionStats {
        self.net.with(|state| {
            let rtt = state.weather.latency * 2;
            let counts = state.end(self.link, self.side).map(|end| (end.bytes_sent, end.bytes_received));
            let (bytes_sent, bytes_received) = counts.unwrap_or_default();
            SessionStats {
                rtt: Some(rtt),
                is_relayed: false,
                bytes_sent,
                bytes_received,
                sent_packets: 0,
                lost_packets: 0,
            }
        })
    }
}
