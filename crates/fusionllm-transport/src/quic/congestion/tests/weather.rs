//! What a simulated wire does, and dice to draw it by.

/// Numbers that look random, from a seed (SplitMix64).
#[derive(Clone, Debug)]
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below 1.
    pub(super) fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(super) fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.share()
    }
}

/// What the wire does from a time on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weather {
    pub(super) mbit_per_s: f64,
    pub(super) round_trip_ms: f64,
    /// What may wait before the link, in time at its rate.
    pub(super) queue_ms: f64,
    pub(super) loss: f64,
    /// Packets are up to this much early or late.
    pub(super) jitter_ms: f64,
    /// Whether they may overtake each other by it.
    pub(super) reorders: bool,
    /// The same of what is confirmed, which may overtake.
    pub(super) back_jitter_ms: f64,
    /// The receiver drops packets that come after so many later ones.
    pub(super) remembers_packets: u64,
    /// One of ten packets comes so many packets later than it should.
    pub(super) detour_packets: f64,
    pub(super) is_cut: bool,
    /// Only what is confirmed is lost.
    pub(super) is_back_cut: bool,
}

impl Weather {
    pub(super) fn fair(mbit_per_s: f64, round_trip_ms: f64) -> Self {
        Self {
            mbit_per_s,
            round_trip_ms,
            queue_ms: 100.0,
            loss: 0.0,
            jitter_ms: 0.0,
            reorders: false,
            back_jitter_ms: 0.0,
            remembers_packets: u64::MAX,
            detour_packets: 0.0,
            is_cut: false,
            is_back_cut: false,
        }
    }

    /// Of payload that can come through.
    pub(super) fn bytes_per_s(&self) -> f64 {
        self.mbit_per_s * 1e6 / 8.0 * (1.0 - self.loss)
    }
}
