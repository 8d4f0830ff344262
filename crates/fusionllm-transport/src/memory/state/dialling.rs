//! How connections come about.

use std::task::Waker;
use std::time::Duration;

use rand::RngExt;

use super::{Event, State};
use crate::{Admit, PeerId, Purpose};

/// Close code of a refused peer.
const REFUSED: u32 = 403;

/// What a dial comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// A connection.
    Connected,
    /// Somebody says no.
    Refused,
    /// Nobody answers.
    Silence,
    /// The peer has a connection, and the dialler does not know.
    HalfOpen,
}

/// A dial that somebody waits for.
#[derive(Debug)]
pub(crate) struct Dial {
    pub(super) from: usize,
    pub(super) to: Option<usize>,
    pub(super) purpose: Purpose,
    pub(super) outcome: Outcome,
    /// The connection, or why there is none.
    pub(crate) result: Option<Result<usize, Outcome>>,
    pub(crate) waker: Option<Waker>,
}

impl State {
    /// Begins to dial a peer.
    pub(crate) fn dial(&mut self, from: usize, peer: PeerId, purpose: Purpose) -> u64 {
        let dial = self.number();
        let to = self.places.iter().position(|place| place.id == peer && !place.is_closed);
        let round_trip = (self.weather.latency + self.up_to(self.weather.jitter)) * 2;
        let limit = self.weather.dial_limit;
        let pair = to.map(|to| (from.min(to), from.max(to)));
        let outage = pair
            .and_then(|pair| self.outages.get(&pair))
            .map_or(Duration::ZERO, |&until| until.saturating_sub(self.now));
        let fails = self.is_stormy() && self.dice.random_bool(self.weather.failing_dials.clamp(0.0, 1.0));
        let (outcome, after) = match (to, fails) {
            (None, _) => (Outcome::Silence, limit),
            (Some(_), true) => match self.dice.random_range(0..3) {
                0 => (Outcome::Refused, round_trip),
                1 => (Outcome::Silence, limit),
                _ => (Outcome::HalfOpen, limit),
            },
            (Some(_), false) if outage + round_trip > limit => (Outcome::Silence, limit),
            (Some(_), false) => (Outcome::Connected, outage + round_trip),
        };
        let dialling = Dial { from, to, purpose, outcome, result: None, waker: None };
        self.dials.insert(dial, dialling);
        self.note(&format_args!("dial {dial} from {from} to {to:?}"));
        if let (Outcome::HalfOpen, Some(to)) = (outcome, to) {
            let link = self.connect(from, to, purpose);
            self.lose_part(link, 0);
            self.lose_part(link, 1);
            self.schedule(round_trip, Event::Reached { link });
            self.schedule(round_trip, Event::Notice { link, side: 0 });
            let after = round_trip + self.up_to(self.weather.idle);
            self.schedule(after, Event::Notice { link, side: 1 });
        }
        self.schedule(after, Event::Dialled { dial });
        dial
    }

    /// A dial ends, if somebody still waits for it.
    pub(super) fn dialled(&mut self, dial: u64) {
        let Some(&Dial { from, to, purpose, outcome, .. }) = self.dials.get(&dial) else { return };
        self.note(&format_args!("dial {dial}: {outcome:?}"));
        let result = match (outcome, to) {
            (Outcome::Connected, Some(to)) => {
                let link = self.connect(from, to, purpose);
                let way = self.weather.latency + self.up_to(self.weather.jitter);
                self.schedule(way, Event::Reached { link });
                if let Some(end) = self.end(link, 0) {
                    end.handles = 1;
                }
                // Whoever was dialled by key is known.
                self.admit(link, 0);
                Ok(link)
            }
            _ => Err(outcome),
        };
        if let Some(dial) = self.dials.get_mut(&dial) {
            dial.result = Some(result);
            self.wake.extend(dial.waker.take());
        }
    }

    /// Nobody waits for a dial any more.
    pub(crate) fn hang_up(&mut self, dial: u64) {
        if let Some(Dial { result: Some(Ok(link)), .. }) = self.dials.remove(&dial) {
            self.release(link, 0);
        }
    }

    /// The peer that was dialled learns of the connection.
    pub(super) fn reached(&mut self, link: usize) {
        let Some(link_state) = self.links.get(&link) else { return };
        let [from, to] = [link_state.ends[0].place, link_state.ends[1].place];
        // It is over before it began here.
        if link_state.ends[1].error.is_some() {
            return;
        }
        let Some(from) = self.places.get(from).map(|place| place.id) else { return };
        self.note(&format_args!("#{link} of {from} reaches {to}"));
        match self.places.get(to).filter(|place| !place.is_closed).map(|place| place.admission.admit(from)) {
            None => return self.close(link, 1, 0, "the endpoint is closed"),
            Some(Admit::Refuse { reason }) => return self.close(link, 1, REFUSED, &reason),
            Some(Admit::Accept) => self.admit(link, 1),
            Some(Admit::OnTrial) => {}
        }
        if let Some(end) = self.end(link, 1) {
            end.handles = 1;
        }
        if let Some(place) = self.places.get_mut(to) {
            place.incoming.push_back(link);
            self.wake.append(&mut place.wakers);
        }
    }
}
