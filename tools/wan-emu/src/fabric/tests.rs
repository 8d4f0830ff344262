//! Packets over one fabric, by a clock of the test.

use super::*;
use crate::packet::testing::udp;

const MS: Nanos = 1_000_000;

fn link(mbit: f64, latency_ms: u64) -> Link {
    Link {
        bits_per_s: mbit * 1e6,
        latency: Duration::from_millis(latency_ms),
        burst: Duration::ZERO,
        ..Link::default()
    }
}

fn two(access: Access, link: &Link, seed: u64) -> Fabric {
    Fabric::new(&[access, Access::default()], &vec![link.clone(); 4], seed)
}

/// Sends units of `segments` datagrams back to back at `offered` times the link's rate for `time`; returns when each
/// came out and how many packets it held.
fn flood(fabric: &mut Fabric, mbit: f64, offered: f64, segments: usize, time: Nanos) -> Vec<(Nanos, usize)> {
    let unit = udp(segments, 1172);
    let gap = unit.wire_bytes() as f64 * 8e3 / mbit / offered;
    for i in 0..(time as f64 / gap) as u64 {
        fabric.arrive((i as f64 * gap) as Nanos, 0, 1, unit.clone());
    }
    drain(fabric)
}

fn drain(fabric: &mut Fabric) -> Vec<(Nanos, usize)> {
    let mut out = Vec::new();
    while let Some(at) = fabric.next_due() {
        if let Some((to, unit)) = fabric.next_out(at) {
            assert_eq!(to, 1);
            out.push((at, unit.segments()));
        }
    }
    assert_eq!(fabric.in_flight, 0);
    out
}

fn mbit(out: &[(Nanos, usize)]) -> f64 {
    let packets: usize = out.iter().map(|(_, segments)| segments).sum();
    (packets * 1200 * 8) as f64 * 1e3 / (out[out.len() - 1].0 - out[0].0) as f64
}

#[test]
fn a_lone_packet_takes_serialisation_and_latency() {
    let mut fabric = two(Access::default(), &link(8.0, 50), 0);
    fabric.arrive(7 * MS, 0, 1, udp(1, 972));
    assert_eq!(drain(&mut fabric), [(58 * MS, 1)]);
}

#[test]
fn goodput_is_the_rate_and_the_queue_drops_the_rest() {
    for (rate, segments) in [(8.0, 1), (100.0, 10), (1000.0, 50)] {
        let mut fabric = two(Access::default(), &link(rate, 25), 0);
        let out = flood(&mut fabric, rate, 1.5, segments, 2_000 * MS);
        assert!((mbit(&out) / rate - 1.0).abs() < 0.02, "{rate}: {}", mbit(&out));
        let counters = fabric.counters()[1];
        let sent = counters.packets + counters.dropped;
        assert!((counters.packets as f64 / sent as f64 - 0.70).abs() < 0.03, "{counters:?}");
    }
}

#[test]
fn a_slow_access_bounds_all_links_of_its_node_together() {
    let access = Access { up: Some(20e6), down: None, queue: Duration::from_millis(50) };
    let mut fabric = Fabric::new(&[access, Access::default(), Access::default()], &vec![link(100.0, 10); 9], 0);
    for i in 0..2_000 {
        fabric.arrive(i * MS / 2, 0, 1 + (i % 2) as usize, udp(2, 1172));
    }
    let mut bytes = [0.0; 3];
    while let Some(at) = fabric.next_due() {
        if let Some((to, unit)) = fabric.next_out(at) {
            bytes[to] += unit.wire_bytes() as f64;
        }
    }
    let both = (bytes[1] + bytes[2]) * 8.0 / 1.05e6;
    assert!((both / 20.0 - 1.0).abs() < 0.05, "{both}");
    assert!((bytes[1] / bytes[2] - 1.0).abs() < 0.2);
}

#[test]
fn a_slow_downlink_bounds_what_all_send() {
    let down = Access { up: None, down: Some(10e6), queue: Duration::from_millis(50) };
    let mut fabric = Fabric::new(&[Access::default(), down], &vec![link(100.0, 10); 4], 0);
    let out = flood(&mut fabric, 100.0, 1.0, 4, 1_000 * MS);
    assert!((mbit(&out) / 10.0 - 1.0).abs() < 0.02);
}

#[test]
fn loss_has_the_asked_share_and_the_same_seed_loses_the_same() {
    let run = |seed, burst| {
        let lossy = Link { loss: 0.02, loss_burst: burst, ..link(100.0, 1) };
        let mut fabric = two(Access::default(), &lossy, seed);
        let out = flood(&mut fabric, 100.0, 0.9, 10, 5_000 * MS);
        let counters = fabric.counters()[1];
        (out, counters.lost as f64 / (counters.lost + counters.packets) as f64)
    };
    let (first, share) = run(1, 0.0);
    assert!((share - 0.02).abs() < 0.003, "{share}");
    assert_eq!(run(1, 0.0).0, first);
    assert_ne!(run(2, 0.0).0, first);
    let (bursts, share) = run(1, 5.0);
    assert!((share - 0.02).abs() < 0.006, "{share}");
    assert!(bursts.len() < first.len());
}

#[test]
fn jitter_spreads_but_reorders_only_when_asked() {
    let order = |reorder| {
        let jittery = Link { jitter: Duration::from_millis(5), reorder, ..link(100.0, 20) };
        let mut fabric = two(Access::default(), &jittery, 3);
        for i in 0..1_000_u64 {
            fabric.arrive(i * MS, 0, 1, udp(1, 100 + (i % 900) as usize));
        }
        let mut sizes = Vec::new();
        while let Some(at) = fabric.next_due() {
            sizes.extend(fabric.next_out(at).map(|(_, unit)| (unit.wire_bytes() - 128, at)));
        }
        sizes
    };
    let kept = order(false);
    assert!(kept.iter().enumerate().all(|(i, (size, _))| *size == (i % 900) as u64));
    let delays: Vec<Nanos> = kept.iter().enumerate().map(|(i, (_, at))| at - i as u64 * MS).collect();
    assert!(delays.iter().all(|delay| (15 * MS..=26 * MS).contains(delay)));
    assert!(delays.iter().max().unwrap() - delays.iter().min().unwrap() > 5 * MS);
    assert!(order(true).iter().enumerate().any(|(i, (size, _))| *size != (i % 900) as u64));
}

#[test]
fn a_cut_loses_what_travels_and_a_healed_link_carries_again() {
    let mut fabric = two(Access::default(), &link(8.0, 50), 0);
    fabric.arrive(0, 0, 1, udp(1, 972));
    assert!(fabric.next_out(10 * MS).is_none());
    fabric.change(0, 1, Link { cut: true, ..link(8.0, 50) });
    fabric.arrive(20 * MS, 0, 1, udp(1, 972));
    assert!(drain(&mut fabric).is_empty());
    fabric.change(0, 1, link(80.0, 5));
    fabric.arrive(100 * MS, 0, 1, udp(1, 972));
    assert_eq!(drain(&mut fabric), [(105 * MS + MS / 10, 1)]);
    assert_eq!((fabric.counters()[1].cut, fabric.counters()[1].packets), (2, 1));
}

#[test]
fn a_fast_link_keeps_units_whole_and_a_slow_one_cuts_them() {
    let units = |mbit| {
        let mut fabric = two(Access::default(), &link(mbit, 1), 0);
        fabric.arrive(0, 0, 1, udp(40, 1172));
        drain(&mut fabric).len()
    };
    assert_eq!((units(10_000.0), units(1000.0), units(100.0), units(8.0)), (1, 2, 20, 40));
}
