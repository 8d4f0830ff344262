//! All that a network in memory is, and what is about to happen in it.

mod connections;
mod cuts;
mod deliveries;
mod dialling;

use std::collections::{BTreeMap, VecDeque};
use std::fmt::{Display, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Weather;
use super::link::{Link, Side};
use super::packets::Packet;
use crate::{Admission, PeerId};
use dialling::Dial;
pub(super) use dialling::Outcome;

/// Something that happens at its time.
#[derive(Debug)]
pub(super) enum Event {
    /// A packet reaches a side.
    Arrive { link: usize, to: Side, packet: Packet },
    /// A connection breaks.
    Cut { link: usize },
    /// A side finds out that its connection is broken.
    Notice { link: usize, side: Side },
    /// A dial ends.
    Dialled { dial: u64 },
    /// Who was dialled has a connection.
    Reached { link: usize },
}

/// One endpoint.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) id: PeerId,
    pub(super) admission: Arc<dyn Admission>,
    pub(super) is_closed: bool,
    /// Connections that wait to be accepted.
    pub(super) incoming: VecDeque<usize>,
    pub(super) wakers: Vec<Waker>,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) weather: Weather,
    pub(super) dice: ChaCha8Rng,
    /// Time since the network was made.
    pub(super) now: Duration,
    events: BTreeMap<(Duration, u64), Event>,
    /// Numbers events, connections and dials.
    next: u64,
    pub(super) places: Vec<Place>,
    pub(super) links: BTreeMap<usize, Link>,
    pub(super) dials: BTreeMap<u64, Dial>,
    /// Between two endpoints, the lower first: until when nothing gets through.
    pub(super) outages: BTreeMap<(usize, usize), Duration>,
    pub(super) log: String,
    /// To be woken once the lock is free.
    pub(super) wake: Vec<Waker>,
}

impl State {
    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub(super) fn note(&mut self, what: &dyn Display) {
        // A string takes all.
        let _ = writeln!(self.log, "{:.6} {what}", self.now.as_secs_f64());
    }

    pub(super) fn schedule(&mut self, after: Duration, event: Event) {
        let key = (self.now + after, self.number());
        self.events.insert(key, event);
    }

    pub(super) fn schedule_at(&mut self, at: Duration, event: Event) {
        self.schedule(at.saturating_sub(self.now), event);
    }

    fn first(&self) -> Option<Duration> {
        self.events.first_key_value().map(|((at, _), _)| *at)
    }

    /// What is on its way to a side, in the order of arrival.
    pub(super) fn on_the_way(&self, link: usize, to: Side) -> Vec<(Duration, u64)> {
        let is_ours = |event: &Event| matches!(event, Event::Arrive { link: l, to: t, .. } if (*l, *t) == (link, to));
        self.events.iter().filter(|(_, event)| is_ours(event)).map(|(key, _)| *key).collect()
    }

    pub(super) fn packet_mut(&mut self, key: (Duration, u64)) -> Option<&mut Packet> {
        match self.events.get_mut(&key) {
            Some(Event::Arrive { packet, .. }) => Some(packet),
            _ => None,
        }
    }

    pub(super) fn lose(&mut self, key: (Duration, u64)) {
        self.events.remove(&key);
    }

    /// A duration below `most`.
    pub(super) fn up_to(&mut self, most: Duration) -> Duration {
        most.mul_f64(self.dice.random_range(0.0..1.0))
    }

    pub(super) fn is_stormy(&self) -> bool {
        self.now < self.weather.stormy_for
    }

    fn run_due(&mut self) {
        while let Some(entry) = self.events.first_entry()
            && entry.key().0 <= self.now
        {
            match entry.remove() {
                Event::Arrive { link, to, packet } => self.arrive(link, to, packet),
                Event::Cut { link } => self.cut(link),
                Event::Notice { link, side } => self.notice(link, side),
                Event::Dialled { dial } => self.dialled(dial),
                Event::Reached { link } => self.reached(link),
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct Inner {
    state: Mutex<State>,
    pub(super) changed: Arc<Notify>,
    began: Instant,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The task looks, and ends.
        self.changed.notify_one();
    }
}

/// A handle to all of it.
#[derive(Clone, Debug)]
pub(super) struct Net(pub(super) Arc<Inner>);

impl Net {
    pub(super) fn new(seed: u64, weather: Weather) -> Self {
        let state = State {
            weather,
            dice: ChaCha8Rng::seed_from_u64(seed),
            now: Duration::ZERO,
            events: BTreeMap::new(),
            next: 0,
            places: Vec::new(),
            links: BTreeMap::new(),
            dials: BTreeMap::new(),
            outages: BTreeMap::new(),
            log: String::new(),
            wake: Vec::new(),
        };
        let (state, changed) = (Mutex::new(state), Arc::new(Notify::new()));
        Self(Arc::new(Inner { state, changed, began: Instant::now() }))
    }

    /// Changes something, and wakes whoever waits for it.
    pub(super) fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let Inner { state, changed, began } = &*self.0;
        let (result, wake, is_sooner) = {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            state.now = began.elapsed();
            let before = state.first();
            let result = work(&mut state);
            let first = state.first();
            let is_sooner = first.is_some_and(|first| before.is_none_or(|before| first < before));
            (result, std::mem::take(&mut state.wake), is_sooner)
        };
        wake.into_iter().for_each(Waker::wake);
        if is_sooner {
            changed.notify_one();
        }
        result
    }

    /// Does what is due; when the next thing is.
    pub(super) fn run_due(&self) -> Option<Instant> {
        let next = self.with(|state| {
            state.run_due();
            state.first()
        });
        next.map(|next| self.0.began + next)
    }
}

/// Has a task woken by what it waits for, once.
pub(super) fn wait(wakers: &mut Vec<Waker>, waker: &Waker) {
    if !wakers.iter().any(|w| w.will_wake(waker)) {
        wakers.push(waker.clone());
    }
}
