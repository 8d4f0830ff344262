//! The most that this machine carries: `wan-emu up examples/peak.toml && cargo run --release --example peak`.

use std::io::{self, Write};
use std::time::Duration;

use wan_emu::Error;
use wan_emu::control;
use wan_emu::measure::{End, tcp_goodput, udp_flood};

/// Length of each measurement.
const WINDOW: Duration = Duration::from_secs(3);
/// Bytes of payload, whether handed over in batches, and what is offered in Mbit/s.
const FLOODS: &[(usize, bool, &[f64])] = &[
    (64, false, &[75.0, 100.0, 125.0, 150.0, 200.0]),
    (1400, false, &[1000.0, 1500.0, 2000.0, 2500.0, 3000.0]),
    (1400, true, &[2000.0, 3000.0, 4000.0, 5000.0]),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut out = io::stdout();
    let status = control::status("peak")?;
    let end = |index: usize| -> Result<End, Error> {
        let node = status.nodes.get(index).ok_or_else(|| Error::input("expected two nodes"))?;
        Ok(End { namespace: node.namespace.clone(), address: node.address })
    };
    let (a, b) = (end(0)?, end(1)?);
    writeln!(out, "TCP: {:.0} Mbit/s", tcp_goodput(&a, &b, Duration::from_secs(1), WINDOW)?)?;
    for (size, batched, offers) in FLOODS {
        for offered in *offers {
            let flood = udp_flood(&a, &b, *offered, WINDOW, *size, *batched)?;
            writeln!(
                out,
                "UDP of {size} bytes{}: sent {:.0} packets/s, received {:.0} ({:.0} Mbit/s), lost {:.1} %",
                if *batched { " in batches" } else { ", one by one" },
                flood.sent as f64 / WINDOW.as_secs_f64(),
                flood.received as f64 / WINDOW.as_secs_f64(),
                flood.mbit_per_s,
                flood.loss() * 100.0
            )?;
        }
    }
    let status = control::status("peak")?;
    let overrun: u64 = status.nodes.iter().map(|node| node.overrun).sum();
    Ok(writeln!(out, "packets that the router did not read in time: {overrun}")?)
}
