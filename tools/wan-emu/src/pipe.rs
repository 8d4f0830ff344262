//! A token bucket with a bounded drop-tail queue, as a virtual clock: no packet is kept here, only times are told.

use crate::packet::Unit;

/// Nanoseconds since the router started.
pub type Nanos = u64;

/// A rate with a queue before it.
#[derive(Debug, Clone)]
pub struct Pipe {
    bits_per_s: f64,
    queue_bytes: u64,
    burst: Nanos,
    /// When everything admitted so far has left.
    free_at: Nanos,
}

impl Pipe {
    /// An idle pipe.
    pub fn new(bits_per_s: f64, queue_bytes: u64, burst: Nanos) -> Self {
        Self { bits_per_s, queue_bytes, burst, free_at: 0 }
    }

    /// Changes the numbers; what was admitted leaves as it was told.
    pub fn set(&mut self, bits_per_s: f64, queue_bytes: u64, burst: Nanos) {
        (self.bits_per_s, self.queue_bytes, self.burst) = (bits_per_s, queue_bytes, burst);
    }

    /// Forgets what waits.
    pub fn clear(&mut self) {
        self.free_at = 0;
    }

    /// Bits per second.
    pub fn bits_per_s(&self) -> f64 {
        self.bits_per_s
    }

    /// How many of the unit's packets find room, and when the last of these has left. A packet that arrives at an empty
    /// queue always finds room.
    pub fn admit(&mut self, now: Nanos, unit: &Unit) -> (usize, Nanos) {
        let waiting = (self.free_at.saturating_sub(now) as f64 * self.bits_per_s / 8e9) as u64;
        let room = self.queue_bytes.saturating_sub(waiting);
        let mut fits = unit.segments();
        // Units are cut before they come here, so this loop is short.
        while fits > 0 && unit.wire_bytes_of_first(fits) > room && !(fits == 1 && waiting == 0) {
            fits -= 1;
        }
        if fits > 0 {
            let took = unit.wire_bytes_of_first(fits) as f64 * 8e9 / self.bits_per_s;
            self.free_at = self.free_at.max(now.saturating_sub(self.burst)) + took as Nanos;
        }
        (fits, self.free_at.max(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::testing::udp;

    const MS: Nanos = 1_000_000;

    #[test]
    fn a_busy_pipe_keeps_its_rate() {
        let mut pipe = Pipe::new(8e6, 100_000, 0);
        let times: Vec<Nanos> = (0..3).map(|_| pipe.admit(10 * MS, &udp(1, 972)).1).collect();
        assert_eq!(times, [11 * MS, 12 * MS, 13 * MS]);
        assert_eq!(pipe.admit(50 * MS, &udp(1, 972)).1, 51 * MS);
    }

    #[test]
    fn a_bucket_lets_a_burst_pass() {
        let mut pipe = Pipe::new(8e6, 100_000, 2 * MS);
        let times: Vec<Nanos> = (0..4).map(|_| pipe.admit(10 * MS, &udp(1, 972)).1).collect();
        assert_eq!(times, [10 * MS, 10 * MS, 11 * MS, 12 * MS]);
    }

    #[test]
    fn a_full_queue_drops_the_tail_of_a_unit() {
        let mut pipe = Pipe::new(8e6, 2500, 0);
        assert_eq!(pipe.admit(0, &udp(4, 972)), (2, 2 * MS));
        assert_eq!(pipe.admit(0, &udp(1, 972)).0, 0);
        assert_eq!(pipe.admit(MS, &udp(4, 972)), (1, 3 * MS));
        assert_eq!(Pipe::new(8e6, 0, 0).admit(0, &udp(2, 972)), (1, MS));
    }
}
