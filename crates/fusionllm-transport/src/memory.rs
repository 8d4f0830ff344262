//! A network in memory, for tests: it drops, delays, cuts and reorders, all from a seed.
//!
//! It carries the same [`Endpoint`]s and [`Session`](crate::Session)s as QUIC does and keeps to what QUIC promises and to no
//! more. Within a stream bytes come in their order, between streams in any. A connection may break at any byte; of what was
//! on its way each stream loses its own part, both sides notice at different times, and a side that does not know yet sends into nothing.
//! Dials fail, hang, or reach the peer without the dialler knowing.
//!
//! Time is that of tokio. On a current-thread runtime whose clock is paused, a seed gives one history: [`Network::log`] is
//! the same byte for byte, as long as nothing else in the test leaves the runtime or depends on chance.

mod endpoint;
mod halves;
mod link;
mod packets;
mod state;
#[cfg(test)]
mod tests;

use std::fmt::Display;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::time::sleep_until;

use crate::{Admission, Endpoint};
use endpoint::MemoryEndpoint;
use state::Net;

/// What the links of a network do to those who use them.
#[derive(Clone, Debug, PartialEq)]
pub struct Weather {
    /// Least time from one side to the other.
    pub latency: Duration,
    /// The most that comes on top of it, drawn anew for each packet.
    pub jitter: Duration,
    /// Of each direction of a connection.
    pub bytes_per_s: u64,
    /// Bytes of a stream that may be sent and not read, at the least 1.
    pub window: usize,
    /// Until then, from the network's beginning, connections break and dials fail.
    pub stormy_for: Duration,
    /// How long a connection lasts that breaks.
    pub lifetime: Range<Duration>,
    /// Share of connections that break, if they last until then.
    pub breaking: f64,
    /// Share of dials that fail.
    pub failing_dials: f64,
    /// After this long a silent peer is lost.
    pub idle: Duration,
    /// After this long an unanswered dial fails.
    pub dial_limit: Duration,
    /// After a break no dial gets through for up to this long.
    pub outage: Duration,
}

impl Weather {
    /// Links of 10 ms and 10 MB/s on which nothing goes wrong.
    pub fn calm() -> Self {
        Self {
            latency: Duration::from_millis(10),
            jitter: Duration::from_millis(4),
            bytes_per_s: 10_000_000,
            window: 1 << 16,
            stormy_for: Duration::ZERO,
            lifetime: Duration::from_millis(1)..Duration::from_secs(3),
            breaking: 0.0,
            failing_dials: 0.0,
            idle: Duration::from_secs(10),
            dial_limit: Duration::from_secs(10),
            outage: Duration::ZERO,
        }
    }

    /// Some bad weather. It lasts for 15 s, and so ends well within what CompNodes and brokers endure.
    pub fn stormy(seed: u64) -> Self {
        let mut dice = ChaCha8Rng::seed_from_u64(seed ^ 0x5eed_0f57_0a45);
        let latency = Duration::from_millis(dice.random_range(1..150));
        let longest = Duration::from_millis(dice.random_range(50..3_000));
        // Most break again soon after they are made, and some stay broken for as long as QUIC lets them.
        let slowest = if dice.random_bool(0.25) { 10_000 } else { 1_500 };
        Self {
            latency,
            jitter: latency.mul_f64(dice.random_range(0.0..1.5)),
            bytes_per_s: 1u64 << dice.random_range(9..24u32),
            window: 1usize << dice.random_range(5..16u32),
            stormy_for: Duration::from_secs(15),
            lifetime: Duration::from_millis(1)..longest,
            breaking: dice.random_range(0.7..1.0),
            failing_dials: dice.random_range(0.0..0.5),
            idle: Duration::from_millis(dice.random_range(500..=slowest)),
            dial_limit: Duration::from_millis(dice.random_range(500..=slowest)),
            outage: Duration::from_millis(dice.random_range(0..1_000)),
        }
    }
}

/// Endpoints that reach each other, and nobody else. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Network(Net);

impl Network {
    /// One without endpoints. Its task runs on the present runtime and ends with the network.
    pub fn new(seed: u64, weather: Weather) -> Self {
        let net = Net::new(seed, weather);
        let (weak, changed) = (Arc::downgrade(&net.0), Arc::clone(&net.0.changed));
        tokio::spawn(async move {
            loop {
                let Some(inner) = weak.upgrade() else { return };
                let next = Net(inner).run_due();
                match next {
                    Some(at) => {
                        tokio::select! {
                            biased;
                            () = changed.notified() => {}
                            () = sleep_until(at) => {}
                        }
                    }
                    None => changed.notified().await,
                }
            }
        });
        Self(net)
    }

    /// A new endpoint. `admission` decides on every connection that others open.
    pub fn endpoint(&self, admission: Arc<dyn Admission>) -> Endpoint {
        Endpoint::new(MemoryEndpoint::new(self.0.clone(), admission))
    }

    /// Writes a line of the test's own into the log.
    pub fn note(&self, what: impl Display) {
        self.0.with(|state| state.note(&what));
    }

    /// All that has happened, a line for each event with the time in seconds.
    pub fn log(&self) -> String {
        self.0.with(|state| state.log.clone())
    }

    /// Connections of which something is still in use at either side.
    pub fn connections(&self) -> usize {
        self.0.with(|state| state.links.len())
    }

    /// From now on nothing breaks and every dial succeeds.
    pub fn calm_down(&self) {
        self.0.with(|state| {
            state.weather.stormy_for = Duration::ZERO;
            state.note(&"the storm is over");
        });
    }
}
