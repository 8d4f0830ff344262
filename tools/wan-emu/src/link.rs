//! The numbers of one directed link, and the rules that set and change them.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::preset::{self, Preset};

/// The longest latency, jitter or queue that may be asked for, in milliseconds: it bounds what is in flight.
const LONGEST_MS: f64 = 10_000.0;
/// The fastest rate that may be asked for, in Mbit/s; no machine reaches it.
const FASTEST_MBIT: f64 = 100_000.0;

/// How much may wait before a link.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Queue {
    /// As much as the link carries in this time.
    Time(Duration),
    /// So many bytes.
    Bytes(u64),
}

impl Queue {
    /// In bytes, before a link of that rate.
    pub fn bytes(self, bits_per_s: f64) -> u64 {
        match self {
            Self::Time(time) => (time.as_secs_f64() * bits_per_s / 8.0) as u64,
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// One directed link.
#[derive(Debug, Clone, PartialEq)]
pub struct Link {
    /// Rate at the IP level: headers of IP, TCP and UDP count, Ethernet's do not.
    pub bits_per_s: f64,
    /// Delay one way.
    pub latency: Duration,
    /// Most that a packet may be early or late.
    pub jitter: Duration,
    /// Share of packets lost, 0 to 1.
    pub loss: f64,
    /// Mean packets in a run of losses; below 1, losses are independent.
    pub loss_burst: f64,
    /// Drop-tail queue before the link.
    pub queue: Queue,
    /// Depth of the token bucket, as time at the link's rate.
    pub burst: Duration,
    /// Whether jitter may reorder packets.
    pub reorder: bool,
    /// Whether the link is cut: nothing passes and what was under way is lost.
    pub cut: bool,
}

impl Link {
    /// Takes the numbers of a preset, `back` those of the way back.
    fn apply(&mut self, preset: &Preset, back: bool) {
        self.bits_per_s = if back { preset.back_mbit_per_s } else { preset.mbit_per_s } * 1e6;
        self.latency = Duration::from_secs_f64(preset.rtt_ms / 2e3);
        self.jitter = Duration::from_secs_f64(preset.jitter_ms / 1e3);
        self.loss = preset.loss_percent / 100.0;
    }
}

impl Default for Link {
    fn default() -> Self {
        Self {
            bits_per_s: 0.0,
            latency: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
            loss_burst: 0.0,
            queue: Queue::Time(Duration::from_millis(100)),
            burst: Duration::from_millis(1),
            reorder: false,
            cut: false,
        }
    }
}

/// A rule for links, and likewise a change to links: what is left out stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkRule {
    /// Name of a node, of a site, or `*`.
    pub from: String,
    /// Name of the node at the other end.
    pub to: String,
    /// Only from `from` to `to`, not back.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub one_way: bool,
    /// Numbers to start from, see [`preset::PRESETS`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// Delay one way in milliseconds; a round trip takes it twice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<f64>,
    /// Rate in Mbit/s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mbit_per_s: Option<f64>,
    /// Rate of the way back where it differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub back_mbit_per_s: Option<f64>,
    /// Most that a packet may be early or late, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jitter_ms: Option<f64>,
    /// Packets lost, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_percent: Option<f64>,
    /// Mean packets in a run of losses; without it each is lost or not independently.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_burst: Option<f64>,
    /// Queue before the link, in milliseconds at its rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_ms: Option<f64>,
    /// Queue before the link, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_bytes: Option<u64>,
    /// Depth of the token bucket, in milliseconds at the link's rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst_ms: Option<f64>,
    /// Whether jitter may reorder packets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reorder: Option<bool>,
    /// `true` cuts the link, `false` heals it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut: Option<bool>,
}

impl LinkRule {
    /// A link made by this rule alone.
    ///
    /// # Errors
    /// [`Error::Input`] without rate or latency, and as [`LinkRule::apply`].
    pub fn link(&self, back: bool) -> Result<Link, Error> {
        if self.preset.is_none() && (self.latency_ms.is_none() || self.mbit_per_s.is_none()) {
            return Err(self.fault("needs `latency_ms` and `mbit_per_s`, or a `preset`"));
        }
        let mut link = Link::default();
        self.apply(&mut link, back)?;
        Ok(link)
    }

    /// Changes a link; `back` says that the link goes from the rule's `to` to its `from`.
    ///
    /// # Errors
    /// [`Error::Input`] for an unknown preset and for numbers out of range.
    pub fn apply(&self, link: &mut Link, back: bool) -> Result<(), Error> {
        if let Some(name) = &self.preset {
            link.apply(preset::find(name)?, back);
        }
        let rate = if back { self.back_mbit_per_s.or(self.mbit_per_s) } else { self.mbit_per_s };
        if let Some(mbit) = rate {
            link.bits_per_s = self.number("mbit_per_s", mbit, 0.001, FASTEST_MBIT)? * 1e6;
        }
        if let Some(ms) = self.latency_ms {
            link.latency = self.time("latency_ms", ms)?;
        }
        if let Some(ms) = self.jitter_ms {
            link.jitter = self.time("jitter_ms", ms)?;
        }
        if let Some(percent) = self.loss_percent {
            link.loss = self.number("loss_percent", percent, 0.0, 100.0)? / 100.0;
        }
        if let Some(packets) = self.loss_burst {
            link.loss_burst = self.number("loss_burst", packets, 1.0, 1e6)?;
        }
        match (self.queue_ms, self.queue_bytes) {
            (Some(_), Some(_)) => return Err(self.fault("has both `queue_ms` and `queue_bytes`, expected one of them")),
            (Some(ms), None) => link.queue = Queue::Time(self.time("queue_ms", ms)?),
            (None, Some(bytes)) => link.queue = Queue::Bytes(bytes),
            (None, None) => {}
        }
        if let Some(ms) = self.burst_ms {
            link.burst = self.time("burst_ms", ms)?;
        }
        link.reorder = self.reorder.unwrap_or(link.reorder);
        link.cut = self.cut.unwrap_or(link.cut);
        Ok(())
    }

    fn time(&self, what: &str, ms: f64) -> Result<Duration, Error> {
        Ok(Duration::from_secs_f64(self.number(what, ms, 0.0, LONGEST_MS)? / 1e3))
    }

    fn number(&self, what: &str, got: f64, least: f64, most: f64) -> Result<f64, Error> {
        if (least..=most).contains(&got) {
            return Ok(got);
        }
        Err(self.fault(&format!("has {what} = {got}, expected {least} to {most}")))
    }

    fn fault(&self, what: &str) -> Error {
        Error::input(format!("link `{}` to `{}` {what}", self.from, self.to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preset_gives_each_way_its_numbers() {
        let mut link = Link::default();
        link.apply(preset::find("home-fibre").unwrap(), true);
        assert_eq!((link.bits_per_s, link.latency), (5e8, Duration::from_millis(6)));
    }

    #[test]
    fn what_a_change_leaves_out_stays() {
        let rule = LinkRule { preset: Some("100mbps-50ms".to_owned()), loss_percent: Some(1.0), ..LinkRule::default() };
        let mut link = rule.link(false).unwrap();
        assert_eq!((link.bits_per_s, link.latency, link.loss), (1e8, Duration::from_millis(25), 0.01));
        let change = LinkRule { cut: Some(true), back_mbit_per_s: Some(5.0), ..LinkRule::default() };
        change.apply(&mut link, false).unwrap();
        assert_eq!((link.bits_per_s, link.cut, link.loss), (1e8, true, 0.01));
        change.apply(&mut link, true).unwrap();
        assert_eq!(link.bits_per_s, 5e6);
    }

    #[test]
    fn faults_name_the_number_and_its_range() {
        let fault = |rule: LinkRule| rule.link(false).unwrap_err().to_string();
        let full = LinkRule {
            from: "a".to_owned(),
            to: "b".to_owned(),
            latency_ms: Some(1.0),
            mbit_per_s: Some(1.0),
            ..LinkRule::default()
        };
        assert!(full.link(false).is_ok());
        assert!(fault(LinkRule { latency_ms: None, ..full.clone() }).contains("needs `latency_ms`"));
        assert!(
            fault(LinkRule { mbit_per_s: Some(0.0), ..full.clone() }).contains("mbit_per_s = 0, expected 0.001 to")
        );
        assert!(
            fault(LinkRule { loss_percent: Some(f64::NAN), ..full.clone() }).contains("`a` to `b` has loss_percent")
        );
        let both = LinkRule { queue_ms: Some(1.0), queue_bytes: Some(1), ..full.clone() };
        assert!(fault(both).contains("expected one of them"));
        assert!(fault(LinkRule { preset: Some("100mbps".to_owned()), ..full }).contains("100mbps-50ms"));
    }

    #[test]
    fn a_queue_in_time_follows_the_rate() {
        assert_eq!(Queue::Time(Duration::from_millis(100)).bytes(8e6), 100_000);
        assert_eq!(Queue::Bytes(5).bytes(8e6), 5);
    }
}
