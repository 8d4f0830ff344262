//! Values of options that make sense, and what would be right where one does not.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// Threads of a CPU device: no machine has as many cores.
pub(crate) const MOST_THREADS: i64 = 4096;
/// Tokens that `generate` writes in one go.
pub(crate) const MOST_TOKENS: u64 = 1_000_000;
/// No failure is waited for as long.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
/// Memory that jobs may fill, in GB: from a megabyte to a petabyte.
const MEMORY_GB: std::ops::RangeInclusive<f64> = 0.001..=1e6;

/// An address to listen at.
pub(crate) fn bind_address(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr =
        text.parse().map_err(|_| "expected an IP address and a port, such as 0.0.0.0:7710 or [::]:7710".to_owned())?;
    if is_for_many(address.ip()) {
        return Err("it is no address of one machine, expected such as 0.0.0.0:7710 or [::]:7710".to_owned());
    }
    Ok(address)
}

/// An address under which others reach this machine.
pub(crate) fn outer_address(text: &str) -> Result<SocketAddr, String> {
    let expected = "expected the IP address and port that others connect to, such as 203.0.113.9:7710";
    let address: SocketAddr = text.parse().map_err(|_| expected.to_owned())?;
    if address.ip().is_unspecified() {
        return Err(format!("nobody can connect to {}, {expected}", address.ip()));
    }
    if is_for_many(address.ip()) {
        return Err(format!("{} is no address of one machine, {expected}", address.ip()));
    }
    if address.port() == 0 {
        return Err(format!("port 0 is none, {expected}"));
    }
    Ok(address)
}

fn is_for_many(ip: IpAddr) -> bool {
    ip.is_multicast() || matches!(ip, IpAddr::V4(ip) if ip.is_broadcast())
}

/// Gigabytes of memory.
pub(crate) fn memory_gb(text: &str) -> Result<f64, String> {
    let (least, most) = (MEMORY_GB.start(), MEMORY_GB.end());
    let expected = format!("expected a number of gigabytes from {least} to {most}, such as 8");
    text.parse().ok().filter(|gb| MEMORY_GB.contains(gb)).ok_or(expected)
}

/// How long it is from one failure to the next.
pub(crate) fn time_between(text: &str) -> Result<Duration, String> {
    let expected = "expected a duration of a second to 100 years, such as 4h or 30m";
    let is_sane = |time: &Duration| (Duration::from_secs(1)..=LONGEST).contains(time);
    humantime::parse_duration(text).ok().filter(is_sane).ok_or_else(|| expected.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_refused() {
        for wrong in
            ["0.0.0.0:1", "[::]:1", "224.0.0.1:1", "[ff02::1]:1", "255.255.255.255:1", "10.0.0.1:0", "10.0.0.1"]
        {
            assert!(outer_address(wrong).unwrap_err().contains("such as 203.0.113.9:7710"), "{wrong}");
        }
        assert!(outer_address("10.0.0.1:1").is_ok() && outer_address("[2001:db8::1]:1").is_ok());
        for wrong in ["224.0.0.1:1", "255.255.255.255:0", "here", "127.0.0.1"] {
            assert!(bind_address(wrong).is_err(), "{wrong}");
        }
        assert!(bind_address("0.0.0.0:0").is_ok() && bind_address("[::]:7710").is_ok());
        for wrong in ["0", "-1", "nan", "inf", "1e30", "1e-9", "", "8GB"] {
            assert!(memory_gb(wrong).unwrap_err().contains("from 0.001 to 1000000"), "{wrong}");
        }
        assert_eq!(memory_gb("1.5"), Ok(1.5));
        for wrong in ["0s", "500ms", "1000years", "4", "soon", "", "-1h"] {
            assert!(time_between(wrong).unwrap_err().contains("such as 4h or 30m"), "{wrong}");
        }
        assert_eq!(time_between("1h 30m"), Ok(Duration::from_secs(5400)));
    }
}
