//! Numbers for people.

/// Seconds for people: `1.25 s`, `12.5 ms`.
pub fn format_seconds(seconds: f64) -> String {
    match seconds {
        s if s >= 10.0 => format!("{s:.1} s"),
        s if s >= 1.0 || s == 0.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.1} ms", s * 1e3),
        s => format!("{:.1} µs", s * 1e6),
    }
}

/// Bytes for people: `1.5 GB`.
pub fn format_bytes(bytes: f64) -> String {
    match bytes {
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b if b >= 1e3 => format!("{:.1} kB", b / 1e3),
        b => format!("{b:.0} B"),
    }
}

/// The perplexity of a loss in nats per token, for people.
pub fn format_perplexity(loss: f64) -> String {
    match loss.exp() {
        p if p < 1e6 => format!("{p:.2}"),
        p => format!("{p:.2e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_for_people() {
        assert_eq!(
            [format_seconds(100.0), format_seconds(1.5), format_seconds(0.0125), format_seconds(2e-5)],
            ["100.0 s", "1.50 s", "12.5 ms", "20.0 µs"]
        );
        assert_eq!([format_bytes(1.5e9), format_bytes(2e6), format_bytes(12.0)], ["1.50 GB", "2.0 MB", "12 B"]);
    }
}
