//! What a link may do, and how soon its speed is back.

use super::super::MACHINE_DELAY;
use super::weather::{Dice, Weather};
use super::wire::Sky;

/// Windows in which speed is taken, in seconds.
const WINDOW: f64 = 0.5;

/// Speed is back at 90 % of the rate within two seconds or ten round trips, whatever is longer.
fn bound(weather: &Weather) -> f64 {
    (weather.round_trip_ms / 100.0).max(2.0)
}

/// One sender through fair weather, a storm from `begins` on for so long, and what comes after. Share of the rate that must
/// come back; less where packets that come late are taken for lost and sent twice.
fn weathers(name: &str, [fair, storm, after]: [Weather; 3], begins: f64, lasts: f64, share: f64) {
    let (ends, limit) = (begins + lasts, bound(&after));
    let until = ends + limit + 6.0;
    let mut sky = Sky::new(7, &[(0.0, fair), (begins, storm), (ends, after)]);
    let flow = sky.flow(0.0, None);
    sky.run(until);
    let back = sky.back_after(flow, ends, until, WINDOW, share);
    let settled = sky.share(flow, ends + limit, until);
    let what = format!(
        "{name} of {lasts} s at {begins} s, {} Mbit/s, {} ms: back after {back:.1} s, then {settled:.2} of the rate",
        fair.mbit_per_s, fair.round_trip_ms
    );
    assert!(back <= limit && settled > share - 0.02, "{what}");
}

const LINKS: [(f64, f64); 4] = [(20.0, 50.0), (8.0, 100.0), (40.0, 10.0), (10.0, 300.0)];

fn on_all_links(check: impl Fn(Weather)) {
    LINKS.iter().for_each(|&(mbit, trip)| check(Weather::fair(mbit, trip)));
}

#[test]
fn after_a_cut() {
    on_all_links(|fair| {
        let cut = Weather { is_cut: true, ..fair };
        let back_cut = Weather { is_back_cut: true, ..fair };
        for (begins, lasts) in [(4.0, 1.0), (4.0, 5.0), (4.0, 30.0), (0.4, 2.0), (1.0, 5.0)] {
            weathers("cut", [fair, cut, fair], begins, lasts, 0.9);
        }
        weathers("cut of the way back", [fair, back_cut, fair], 4.0, 5.0, 0.9);
        weathers(
            "cut, then a tenth",
            [fair, cut, Weather { mbit_per_s: fair.mbit_per_s / 10.0, ..fair }],
            4.0,
            3.0,
            0.9,
        );
        weathers("cut, then a fifth of loss", [fair, cut, Weather { loss: 0.2, ..fair }], 4.0, 3.0, 0.9);
        let lossy = Weather { loss: 0.1, ..fair };
        weathers("cut within loss", [lossy, Weather { is_cut: true, ..lossy }, lossy], 4.0, 5.0, 0.9);
    });
    let slow = Weather::fair(4.0, 200.0);
    let cut = Weather { is_cut: true, ..slow };
    weathers("cut, then tenfold", [slow, cut, Weather { mbit_per_s: 40.0, ..slow }], 4.0, 3.0, 0.9);
}

#[test]
fn when_the_rate_falls_and_comes_back() {
    on_all_links(|fair| {
        let at = |part: f64, queue_ms: f64| Weather { mbit_per_s: fair.mbit_per_s * part, queue_ms, ..fair };
        for (part, lasts) in [(0.1, 1.0), (0.1, 5.0), (0.01, 3.0), (0.5, 3.0)] {
            weathers("slow", [fair, at(part, 100.0), fair], 4.0, lasts, 0.9);
        }
        weathers("slow, long queue", [fair, at(0.1, 5_000.0), at(1.0, 2_000.0)], 4.0, 5.0, 0.9);
        weathers("slow, short queue", [fair, at(0.1, 5.0), at(1.0, 5.0)], 4.0, 5.0, 0.85);
        weathers("then slow", [fair, fair, at(0.1, 100.0)], 4.0, 1.0, 0.9);
        weathers("slow and lossy", [fair, Weather { loss: 0.2, ..at(0.1, 100.0) }, fair], 4.0, 3.0, 0.9);
    });
}

#[test]
fn under_loss() {
    on_all_links(|fair| {
        for loss in [0.01, 0.05, 0.1, 0.2] {
            let lossy = Weather { loss, ..fair };
            weathers("loss from the start", [lossy, lossy, lossy], 4.0, 1.0, 0.9);
            weathers("then loss", [fair, fair, lossy], 4.0, 1.0, 0.9);
            weathers("loss", [fair, lossy, fair], 4.0, 3.0, 0.9);
        }
        weathers("half lost", [fair, Weather { loss: 0.5, ..fair }, fair], 4.0, 3.0, 0.9);
    });
}

#[test]
fn under_jitter_and_reordering() {
    on_all_links(|fair| {
        for part in [0.1, 0.2, 0.4] {
            let jitter_ms = fair.round_trip_ms * part;
            let (late, mixed) = (Weather { jitter_ms, ..fair }, Weather { jitter_ms, reorders: true, ..fair });
            // Of which the later ones count as lost.
            let share = if part > 0.2 { 0.5 } else { 0.9 };
            weathers("then jitter", [fair, fair, late], 4.0, 1.0, 0.9);
            weathers("then jitter that reorders", [fair, fair, mixed], 4.0, 1.0, share);
            weathers("jitter that reorders from the start", [mixed, mixed, mixed], 4.0, 1.0, share);
            weathers("jitter that reorders", [fair, mixed, fair], 4.0, 3.0, 0.9);
            let cut = Weather { is_cut: true, ..mixed };
            weathers("cut within jitter", [mixed, cut, mixed], 4.0, 3.0, share);
        }
        for detour_packets in [3.0, 10.0, 50.0] {
            let mixed = Weather { detour_packets, ..fair };
            weathers("detours", [mixed, mixed, mixed], 4.0, 1.0, 0.85);
            weathers("then no detours", [fair, mixed, fair], 4.0, 3.0, 0.9);
        }
    });
}

/// Jitter of both ways, so that some packets and what confirms them take a fifth of the round trip, to a receiver that drops
/// what comes after 128 later packets, as noq's does.
#[test]
fn after_jitter_that_hides_the_round_trip() {
    for (mbit, trip) in LINKS.into_iter().chain([(100.0, 50.0)]) {
        for (seed, lasts) in [(0, 5.0), (1, 5.0), (2, 5.0), (0, 1.0), (2, 15.0)] {
            let fair = Weather { remembers_packets: 128, ..Weather::fair(mbit, trip) };
            let jitter_ms = 0.4 * trip;
            let storm = Weather { jitter_ms, back_jitter_ms: jitter_ms, reorders: true, ..fair };
            let ends = 4.0 + lasts;
            let mut sky = Sky::new(seed, &[(0.0, fair), (4.0, storm), (ends, fair)]);
            let flow = sky.flow(0.0, None);
            let (from, until) = (ends + bound(&fair), ends + bound(&fair) + 15.0);
            sky.run(until);
            let back = sky.back_after(flow, ends, until, WINDOW, 0.9);
            let (settled, at_last) = (sky.share(flow, from, until), sky.share(flow, until - 5.0, until));
            assert!(
                back <= bound(&fair) && settled > 0.93 && at_last > 0.95,
                "{mbit} Mbit/s, {trip} ms, {lasts} s, seed {seed}: back after {back:.1} s, then {settled:.2} of the rate, \
                 {at_last:.2} at last"
            );
        }
    }
}

#[test]
fn on_a_longer_and_a_shorter_way() {
    on_all_links(|fair| {
        let long = Weather { round_trip_ms: fair.round_trip_ms * 2.0, ..fair };
        weathers("long way", [fair, long, fair], 4.0, 3.0, 0.9);
        weathers("then long way", [fair, fair, long], 4.0, 1.0, 0.9);
        weathers("then short way", [long, long, fair], 4.0, 1.0, 0.9);
    });
}

#[test]
fn at_a_gigabit() {
    let fair = Weather::fair(1_000.0, 4.0);
    weathers("cut at a gigabit", [fair, Weather { is_cut: true, ..fair }, fair], 1.0, 1.0, 0.9);
}

/// Of what a settled sender sends, a queue has room for all but this share: a probe asks for a quarter more, one round of
/// five on a long link, and a queue of 5 ms takes little of that.
const MOST_OVERFLOW: f64 = 0.06;

/// What a sender itself makes the link lose, and the queue that it keeps, once it has settled: on any queue, beside what
/// the link loses at any speed, and whatever came before.
#[test]
fn little_is_lost_and_little_waits_for_the_senders_own_sake() {
    on_all_links(|fair| {
        for (queue_ms, loss) in [5.0, 20.0, 100.0, 1_000.0].into_iter().flat_map(|q| [(q, 0.0), (q, 0.05), (q, 0.2)]) {
            let steady = Weather { queue_ms, loss, ..fair };
            let faster = Weather { mbit_per_s: fair.mbit_per_s * 4.0, ..steady };
            let lossy = Weather { loss: 0.4, ..steady };
            for (name, before) in [("steady", steady), ("was faster", faster), ("was lossy", lossy)] {
                let mut sky = Sky::new(11, &[(0.0, before), (6.0, steady)]);
                let flow = sky.flow(0.0, None);
                let from = 6.0 + bound(&steady) + 4.0;
                sky.run(from + 20.0);
                let (overflowed, waits_ms) = sky.queued(flow, from, from + 20.0);
                let share = sky.share(flow, from, from + 20.0);
                // The window holds two round trips, and more while it probes.
                let most_ms = 1.2 * fair.round_trip_ms + MACHINE_DELAY.as_secs_f64() * 1e3;
                assert!(
                    overflowed < MOST_OVERFLOW && waits_ms < most_ms && share > 0.9,
                    "{name}: {} Mbit/s, {} ms, queue {queue_ms} ms, loss {loss}: {overflowed:.3} lost, waits {waits_ms:.0} ms, \
                     {share:.2} of the rate",
                    fair.mbit_per_s,
                    fair.round_trip_ms
                );
            }
        }
    });
}

/// Storms one after another, drawn by lot; after the last one the speed must be back, whatever came before.
#[test]
fn after_any_storms() {
    for seed in 0..60 {
        let mut dice = Dice(seed);
        let fair = Weather {
            queue_ms: dice.between(20.0, 1_000.0),
            ..Weather::fair(dice.between(4.0, 20.0), dice.between(2.0, 200.0))
        };
        let mut at = dice.between(0.2, 3.0);
        let mut weather = vec![(0.0, fair)];
        for _ in 0..4 {
            let mut storm = fair;
            for _ in 0..2 {
                match dice.next() % 6 {
                    0 => storm.is_cut = true,
                    1 => storm.is_back_cut = true,
                    2 => storm.loss = dice.between(0.0, 0.4),
                    3 => storm.mbit_per_s *= dice.between(0.01, 1.0),
                    4 => (storm.jitter_ms, storm.reorders) = (fair.round_trip_ms * dice.between(0.0, 0.4), true),
                    _ => storm.queue_ms = dice.between(2.0, 3_000.0),
                }
            }
            weather.push((at, storm));
            at += dice.between(0.1, 4.0);
        }
        weather.push((at, fair));
        let mut sky = Sky::new(seed, &weather);
        let flow = sky.flow(0.0, None);
        let until = at + bound(&fair) + 5.0;
        sky.run(until);
        let back = sky.back_after(flow, at, until, WINDOW, 0.9);
        assert!(back <= bound(&fair), "seed {seed}: back after {back} s, {weather:#?}");
    }
}

/// Three senders through one bottleneck, which is cut for three seconds.
#[test]
fn three_senders_share_a_link() {
    for (mbit, trip) in [(30.0, 50.0), (8.0, 100.0)] {
        let fair = Weather::fair(mbit, trip);
        let mut sky = Sky::new(3, &[(0.0, fair), (6.0, Weather { is_cut: true, ..fair }), (9.0, fair)]);
        let flows: Vec<usize> = (0..3).map(|n| sky.flow(f64::from(n), None)).collect();
        sky.run(30.0);
        let together = |from: f64, to: f64| flows.iter().map(|&flow| sky.share(flow, from, to)).sum::<f64>();
        assert!(
            together(4.0, 6.0) > 0.9 && together(11.0, 13.0) > 0.9,
            "{} {}",
            together(4.0, 6.0),
            together(11.0, 13.0)
        );
        let shares: Vec<f64> = flows.iter().map(|&flow| sky.share(flow, 15.0, 30.0)).collect();
        assert!(shares.iter().sum::<f64>() > 0.95 && shares.iter().all(|share| *share > 0.1), "{shares:?}");
    }
}

/// Messages with pauses, as training sends them: a cut in a pause, and one during a message, cost no later message anything.
#[test]
fn messages_after_a_cut_are_as_fast_as_before() {
    for (begins, lasts) in [(10.2, 5.0), (10.05, 5.0), (10.2, 0.5), (0.3, 2.0)] {
        let fair = Weather::fair(50.0, 40.0);
        let ends = begins + lasts;
        let mut sky = Sky::new(5, &[(0.0, fair), (begins, Weather { is_cut: true, ..fair }), (ends, fair)]);
        let flow = sky.flow(0.0, Some(200_000));
        let mut at = 0.0;
        let mut slow = Vec::new();
        for n in 0..60 {
            sky.run(at + 0.2);
            // 200 kB take 32 ms and half a round trip.
            if !sky.is_done(flow) {
                slow.push(n);
            }
            at += 0.5;
            sky.write(flow, at, 200_000);
            sky.run(at);
        }
        let late = slow.iter().filter(|&&n| f64::from(n) * 0.5 > ends + 2.0).count();
        assert!(late == 0, "cut at {begins} for {lasts}: slow {slow:?}");
    }
}
