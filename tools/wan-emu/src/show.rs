//! What commands print.

use std::io::{self, Write};
use std::time::Duration;

use anyhow::Context;
use serde_json::json;
use wan_emu::Error;
use wan_emu::control::{LinkStatus, NodeStatus, Status};
use wan_emu::measure::{End, round_trips, tcp_goodput, udp_goodput};
use wan_emu::preset::PRESETS;
use wan_emu::router::Health;

/// Round trips measured.
const ROUND_TRIPS: usize = 20;
/// What is offered to a link, compared with its rate, so that it is full.
const OFFERED: f64 = 1.1;

pub(crate) fn presets() -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{:<18}{:>10}{:>10}{:>9}{:>12}{:>8}", "preset", "Mbit/s", "back", "RTT ms", "jitter ms", "loss %")?;
    for p in PRESETS {
        writeln!(
            out,
            "{:<18}{:>10}{:>10}{:>9}{:>12}{:>8}",
            p.name, p.mbit_per_s, p.back_mbit_per_s, p.rtt_ms, p.jitter_ms, p.loss_percent
        )?;
    }
    Ok(())
}

pub(crate) fn status(status: &Status, all: bool, json: bool) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        return Ok(writeln!(out, "{}", serde_json::to_string_pretty(status)?)?);
    }
    writeln!(out, "network `{}`, process {}, up for {:.0} s", status.net, status.pid, status.up_s)?;
    let Health { latest_ms, late, real_time } = status.health;
    writeln!(out, "deliveries more than 1 ms late: {late}, the latest {latest_ms:.2} ms")?;
    if !real_time {
        writeln!(out, "the router has no real-time priority, other processes may hold it up")?;
    }
    for node in &status.nodes {
        write!(out, "  {:<20} {:<12} {:<12} {}", node.name, node.address, node.site, node.namespace)?;
        if node.overrun > 0 {
            write!(out, "  sent {} packets too fast for this machine", node.overrun)?;
        }
        writeln!(out)?;
    }
    writeln!(
        out,
        "{:<34}{:>9}{:>9}{:>8}{:>8}{:>10}{:>9}{:>9}{:>7}{:>7}",
        "link", "Mbit/s", "ms", "jitter", "loss %", "packets", "MB", "dropped", "lost", "cut"
    )?;
    let is_shown = |link: &&LinkStatus| all || link.cut || link.counters != Default::default();
    for link in status.links.iter().filter(is_shown) {
        let c = link.counters;
        writeln!(
            out,
            "{:<34}{:>9}{:>9.2}{:>8.2}{:>8.2}{:>10}{:>9.1}{:>9}{:>7}{:>7}{}",
            format!("{} > {}", link.from, link.to),
            link.mbit_per_s,
            link.latency_ms,
            link.jitter_ms,
            link.loss_percent,
            c.packets,
            c.bytes as f64 / 1e6,
            c.dropped,
            c.lost,
            c.cut,
            if link.cut { "  is cut" } else { "" }
        )?;
    }
    Ok(())
}

pub(crate) fn measure(status: &Status, from: &str, to: &str, seconds: f64, json: bool) -> anyhow::Result<()> {
    let (from, to) = (node(status, from)?, node(status, to)?);
    let link =
        |a: &NodeStatus, b: &NodeStatus| status.links.iter().find(|link| link.from == a.name && link.to == b.name);
    let (Some(there), Some(back)) = (link(from, to), link(to, from)) else {
        return Err(Error::input("a node has no link to itself").into());
    };
    let (near, far) = (end(from), end(to));
    let window = Duration::from_secs_f64(seconds);
    let times = round_trips(&near, &far, ROUND_TRIPS)?;
    let median = times.get(times.len() / 2).context("no answer came back")?.as_secs_f64() * 1e3;
    let asked_ms = there.latency_ms + back.latency_ms;
    // The slowest of uplink, link and downlink.
    let access = [from.up_mbit_per_s, to.down_mbit_per_s].into_iter().flatten();
    let asked = access.fold(there.mbit_per_s, f64::min);
    // A short transfer would mostly show how TCP starts.
    let warm_up = Duration::from_secs_f64((asked_ms / 1e3 * 20.0).clamp(0.5, 5.0));
    let tcp = tcp_goodput(&near, &far, warm_up, window)?;
    let udp = udp_goodput(&near, &far, asked * OFFERED, window)?;
    let mut out = io::stdout().lock();
    if json {
        let document = json!({
            "from": from.name, "to": to.name, "asked_rtt_ms": asked_ms, "rtt_ms": median, "asked_mbit_per_s": asked,
            "tcp_mbit_per_s": tcp, "udp_mbit_per_s": udp.mbit_per_s, "udp_sent": udp.sent, "udp_received": udp.received,
        });
        return Ok(writeln!(out, "{document}")?);
    }
    writeln!(out, "{} > {}: round trip {median:.2} ms, asked {asked_ms:.2} ms without jitter", from.name, to.name)?;
    writeln!(out, "goodput TCP {tcp:.1}, UDP {:.1} Mbit/s, asked {asked} Mbit/s with headers", udp.mbit_per_s)?;
    Ok(writeln!(out, "UDP at {OFFERED} times the rate: {:.1} % did not arrive", udp.loss() * 100.0)?)
}

fn node<'a>(status: &'a Status, name: &str) -> Result<&'a NodeStatus, Error> {
    let node = status.nodes.iter().find(|node| node.name == name);
    node.ok_or_else(|| Error::input(format!("no node is named `{name}`")))
}

fn end(node: &NodeStatus) -> End {
    End { namespace: node.namespace.clone(), address: node.address }
}
