//! How fast the sender goes by what it believes, and how much it has on its way.

use std::time::Duration;

use super::{
    GROWTH_GAIN, GROWTH_WINDOW, HEADROOM_PACKETS, LEAST_PACKETS, LONGEST_PACING_PAUSE, LinkRate, MACHINE_DELAY,
    MOST_PIECE_BYTES, PIECE_TIME, PROBE_GAIN, Phase, SILENT_PACE, STARTUP_GAIN, WINDOW_GAIN, sampler,
};

impl LinkRate {
    /// The link's speed in bytes per second, as what is sent at it arrives; 0 if nothing is known.
    pub(super) fn bytes_per_s(&self) -> f64 {
        self.rates.iter().copied().fold(self.round.bytes_per_s, f64::max)
    }

    /// What has to be sent for it.
    pub(super) fn sending_rate(&self) -> f64 {
        self.bytes_per_s() / (1.0 - self.losses.usual())
    }

    /// The round trip without a queue of ours.
    pub(super) fn base_round_trip(&self) -> Option<Duration> {
        let shortest = self.round_trip.get()?;
        Some(self.standing.map_or(shortest, |(standing, _)| standing.max(shortest)))
    }

    /// What `trips` round trips hold, and some for late confirmations.
    pub(super) fn trips_worth(&self, trips: f64) -> u64 {
        let rate = self.sending_rate();
        let round_trip = self.base_round_trip().unwrap_or_default().as_secs_f64();
        let late = MACHINE_DELAY.max(self.spread * 2).as_secs_f64();
        let headroom = (rate * late).max((HEADROOM_PACKETS * self.packet_bytes) as f64);
        (trips * rate * round_trip + headroom) as u64
    }

    pub(super) fn window_bytes(&self) -> u64 {
        let least = LEAST_PACKETS * self.packet_bytes;
        if self.is_silent {
            // One more at a time, at a slow pace: something must be there to be confirmed when the link is back.
            return self.sampler.in_flight() + 2 * self.packet_bytes;
        }
        if self.is_cut {
            return least;
        }
        let window = match self.phase {
            Phase::Startup => self.startup_window,
            Phase::Growth => self.trips_worth(GROWTH_WINDOW),
            Phase::Drain => self.trips_worth(1.0),
            Phase::Sound => self.sounding.window(),
            Phase::Cruise(_) => self.trips_worth(WINDOW_GAIN),
            // Where the window and not the link is what bounds, only a larger one shows it.
            Phase::Probe | Phase::Probed(_) => (PROBE_GAIN * self.trips_worth(WINDOW_GAIN) as f64) as u64,
        };
        window.max(least)
    }

    /// Bytes per second at which packets go out, above 0; nothing before a round trip is known.
    pub(super) fn pacing(&self) -> Option<f64> {
        let round_trip = self.base_round_trip()?.as_secs_f64().max(1e-6);
        let packet_bytes = self.packet_bytes as f64;
        if self.is_silent {
            return Some(packet_bytes / SILENT_PACE);
        }
        let rate = self.sending_rate();
        let pacing = match self.phase {
            Phase::Startup => (rate * STARTUP_GAIN).max(2.0 * self.startup_window as f64 / round_trip),
            Phase::Growth => rate * GROWTH_GAIN,
            Phase::Probe => rate * PROBE_GAIN,
            // After a pause there is no queue, so a burst may begin with a probe.
            Phase::Drain | Phase::Cruise(_) | Phase::Probed(_) if self.sampler.is_fresh() => rate * PROBE_GAIN,
            // Nothing for what is lost: if sending that is why, it shows.
            Phase::Drain => self.bytes_per_s(),
            Phase::Cruise(_) | Phase::Probed(_) | Phase::Sound => rate,
        };
        // In each round trip as it is now, enough for a sample.
        let least = (sampler::LEAST_PACKETS as f64) * packet_bytes / self.latest.as_secs_f64().max(round_trip);
        (pacing > 0.0).then_some(pacing.max(least))
    }

    /// What is sent as one piece at this pace.
    pub(super) fn piece_bytes(&self, pacing: f64) -> u64 {
        ((pacing * PIECE_TIME) as u64).clamp(2 * self.packet_bytes, MOST_PIECE_BYTES)
    }

    /// Beyond which there was nothing to send.
    pub(super) fn longest_pacing_pause(&self) -> Duration {
        let seconds = self.pacing().map_or(0.0, |pacing| 2.0 * self.piece_bytes(pacing) as f64 / pacing);
        Duration::from_secs_f64(seconds.min(LONGEST_PACING_PAUSE))
    }
}
