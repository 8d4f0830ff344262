//! Links with a name. A time in a name is the round trip, so that `ping` shows what the name says.

use crate::error::Error;

/// A link with a name.
#[derive(Debug, Clone, Copy)]
pub struct Preset {
    /// Its name.
    pub name: &'static str,
    /// Mbit/s from the rule's `from` to its `to`.
    pub mbit_per_s: f64,
    /// Mbit/s back.
    pub back_mbit_per_s: f64,
    /// Milliseconds there and back together.
    pub rtt_ms: f64,
    /// Most that a packet may be early or late, in milliseconds.
    pub jitter_ms: f64,
    /// Packets lost, in percent.
    pub loss_percent: f64,
}

/// All of them. Of the homes, `from` is the home: its uplink is the slow way.
pub const PRESETS: &[Preset] = &[
    even("8mbps-100ms", 8.0, 100.0),
    even("20mbps-60ms", 20.0, 60.0),
    even("100mbps-50ms", 100.0, 50.0),
    even("200mbps-100ms", 200.0, 100.0),
    even("1gbps-2ms", 1000.0, 2.0),
    even("1gbps-30ms", 1000.0, 30.0),
    Preset { jitter_ms: 0.3, back_mbit_per_s: 500.0, ..even("home-fibre", 100.0, 12.0) },
    Preset { jitter_ms: 2.0, back_mbit_per_s: 50.0, loss_percent: 0.05, ..even("home-dsl", 10.0, 35.0) },
    Preset { jitter_ms: 8.0, back_mbit_per_s: 60.0, loss_percent: 0.2, ..even("mobile-4g", 20.0, 60.0) },
    Preset { jitter_ms: 1.0, loss_percent: 0.02, ..even("cross-continent", 200.0, 150.0) },
];

const fn even(name: &'static str, mbit_per_s: f64, rtt_ms: f64) -> Preset {
    Preset { name, mbit_per_s, back_mbit_per_s: mbit_per_s, rtt_ms, jitter_ms: 0.0, loss_percent: 0.0 }
}

/// The preset of that name.
///
/// # Errors
/// [`Error::Input`] that lists the names there are.
pub fn find(name: &str) -> Result<&'static Preset, Error> {
    PRESETS.iter().find(|preset| preset.name == name).ok_or_else(|| {
        let names: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
        Error::input(format!("no preset is named `{name}`; there are {}", names.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_the_round_trip() {
        for preset in PRESETS {
            if let Some(ms) = preset.name.strip_suffix("ms").and_then(|name| name.rsplit_once('-')) {
                assert_eq!(ms.1.parse(), Ok(preset.rtt_ms), "{}", preset.name);
            }
        }
    }
}
