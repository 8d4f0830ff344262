//! What noq tells and asks.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use noq_proto::RttEstimator;
use noq_proto::congestion::{Controller, ControllerFactory, ControllerMetrics};

use super::{INITIAL_PACKETS, LinkRate};

/// Makes a [`LinkRate`] for each path of a connection.
#[derive(Debug, Default)]
pub(crate) struct LinkRateConfig;

impl ControllerFactory for LinkRateConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(LinkRate::new(now, u64::from(current_mtu)))
    }
}

impl Controller for LinkRate {
    fn on_packet_sent(&mut self, now: Instant, bytes: u16, pn: u64) {
        self.on_sent(now, u64::from(bytes), pn);
    }

    fn on_cwnd_limited(&mut self) {
        self.round.was_window_full = true;
    }

    fn on_ack(&mut self, _now: Instant, sent: Instant, bytes: u64, _pn: u64, _app_limited: bool, _rtt: &RttEstimator) {
        self.on_confirmed(sent, bytes);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, _app_limited: bool, _largest: Option<u64>) {
        self.on_batch_end(now, in_flight);
    }

    fn on_congestion_event(
        &mut self,
        _now: Instant,
        _sent: Instant,
        is_persistent_congestion: bool,
        _is_ecn: bool,
        _lost_bytes: u64,
        _largest_lost_pn: u64,
    ) {
        self.is_cut |= is_persistent_congestion;
    }

    fn on_packet_lost(&mut self, lost_bytes: u16, pn: u64, _now: Instant) {
        if pn > self.forgiven {
            self.round.lost += u64::from(lost_bytes);
            self.lean.lost(pn);
        }
        self.sampler.lost(u64::from(lost_bytes));
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.packet_bytes = u64::from(new_mtu);
        self.sampler.set_packet_bytes(self.packet_bytes);
    }

    fn window(&self) -> u64 {
        self.window_bytes()
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.window_bytes();
        if let Some(pacing) = self.pacing() {
            metrics.pacing_rate = Some(pacing as u64);
            metrics.send_quantum = Some(self.piece_bytes(pacing));
        }
        let rate = self.bytes_per_s();
        metrics.bandwidth_estimate = (rate > 0.0).then_some((rate * 8.0) as u64);
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        INITIAL_PACKETS * self.packet_bytes
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
