//! CompNodes that become slower, and new ones that pay for a move.

use super::recovery::{left, notices, tick};
use super::snapshots::{holds, snapshot};
use super::*;

/// A step of `key` a second, in which the CompNodes compute so long. Gives what the core asks for in the seconds `during`.
fn seconds(core: &mut Core, key: RunKey, busy_s: [f64; 2], during: std::ops::Range<u64>) -> Vec<Action> {
    let mut actions = Vec::new();
    for second in during {
        let now = NOW + Duration::from_secs(second);
        for (connection, busy_s) in [1, 2].into_iter().zip(busy_s) {
            let report = StepReport { step_s: 1.0, busy_s, ..report(second, Some(1.0)) };
            let message = FromCompNode::Step { key, report };
            actions
                .extend(core.handle(CoreEvent::Said { connection: ConnectionId(connection), message, at: now }, now));
        }
        let rest = tick(core, now);
        actions.extend(measure_at(core, rest, now));
    }
    actions
}

fn weighs(actions: &[Action]) -> Vec<u64> {
    let number = |action: &Action| match action {
        Action::Weigh { input, .. } => Some(input.number),
        _ => None,
    };
    actions.iter().filter_map(number).collect()
}

/// The step after which the job is to stand still.
fn halts(actions: &[Action]) -> Option<u64> {
    sent(actions).into_iter().find_map(|(_, message)| match message {
        FromBroker::Snapshot { step, halt: true, .. } => Some(*step),
        _ => None,
    })
}

/// The placement at work is held against a better one.
fn weighed(core: &mut Core, number: u64, then_s: f64, second: u64) -> Vec<Action> {
    let result = Some(Weighed { now_s: 1.0, then_s });
    core.handle(CoreEvent::Weighed { job: KEY.job, number, result }, NOW + Duration::from_secs(second))
}

/// Both CompNodes do the steps to `last`, stand still, and have their snapshots: the job moves. Gives what follows.
fn moves(core: &mut Core, busy_s: [f64; 2], steps: std::ops::RangeInclusive<u64>) -> Vec<Action> {
    let last = *steps.end();
    seconds(core, KEY, busy_s, *steps.start()..last + 1);
    let now = NOW + Duration::from_secs(last);
    let mut actions = Vec::new();
    for (connection, node) in [(1, 0), (2, 1)] {
        let message = holds(snapshot(KEY, last, node));
        actions.extend(core.handle(CoreEvent::Said { connection: ConnectionId(connection), message, at: now }, now));
    }
    measure_at(core, actions, now)
}

/// The job is slow on `b` until it moves.
fn slow_until_it_moves(core: &mut Core, mut from: u64) -> (u64, u64) {
    let [a, b] = as_planned(core);
    let mut asked = 0;
    loop {
        let actions = seconds(core, KEY, [a, 4.0 * b], from..from + 1);
        from += 1;
        assert!(from < 300 && halts(&actions).is_none());
        let [number] = weighs(&actions)[..] else { continue };
        asked += 1;
        if let Some(last) = halts(&weighed(core, number, 0.5, from)) {
            assert_eq!(asked, 3, "three windows");
            return (from, last);
        }
    }
}

fn at_work(overrides: &[&str]) -> Core {
    let long = ["train.steps=100000", "checkpoint.every=0", "train.eval_every=0"];
    running_with(&[&long, overrides].concat())
}

/// As long as the plan has it.
fn as_planned(core: &Core) -> [f64; 2] {
    let work = core.record(JobId(1)).unwrap().work.clone().unwrap();
    let prediction = &work.placement.prediction;
    [0, 1].map(|node| prediction.compnodes[node].busy * prediction.step_s)
}

#[test]
fn a_job_is_planned_anew_when_one_has_become_slower() {
    let mut core = at_work(&[]);
    let [a, b] = as_planned(&core);
    assert!(weighs(&seconds(&mut core, KEY, [a, b], 1..60)).is_empty(), "all is as planned");
    let (from, last) = slow_until_it_moves(&mut core, 60);
    assert!(from >= 120 && last >= from);
    let actions = moves(&mut core, [a, 4.0 * b], from..=last);
    let told = notices(&actions);
    let why = "the job moves, since CompNode `b` computes 4.0 times as long as planned: ";
    assert!(
        told.iter().any(|text| text.starts_with(why) && text.contains(&format!("the snapshots of step {last}"))),
        "{told:?}"
    );
    assert_eq!(core.record(JobId(1)).unwrap().generation, Generation(2));
    let work = core.record(JobId(1)).unwrap().work.clone().unwrap();
    let ops = |name: &str| work.placement.prediction.compnodes.iter().find(|c| c.name == name).map_or(0, |c| c.ops);
    assert!(ops("b") < ops("a"), "{:?}", work.placement.prediction);
}

#[test]
fn a_newcomer_is_measured_beside_the_work_and_taken_in_if_it_pays() {
    let mut core = at_work(&[]);
    let [a, b] = as_planned(&core);
    seconds(&mut core, KEY, [a, b], 1..5);
    joins(&mut core, 3, "c", 5);
    let actions = seconds(&mut core, KEY, [a, b], 5..30);
    let [number] = weighs(&actions)[..] else { panic!("{actions:?}") };
    let over = actions.iter().find_map(|action| match action {
        Action::Weigh { input, .. } => Some(input.cluster.compnodes.iter().map(|c| c.name.clone()).collect::<Vec<_>>()),
        _ => None,
    });
    assert_eq!(over.unwrap(), ["a", "b", "c"]);
    assert!(weighed(&mut core, number, 0.95, 30).is_empty(), "it does not pay");
    assert!(weighs(&seconds(&mut core, KEY, [a, b], 30..60)).is_empty(), "it is tried once");
    joins(&mut core, 4, "d", 60);
    let actions = seconds(&mut core, KEY, [a, b], 60..90);
    let [number] = weighs(&actions)[..] else { panic!("{actions:?}") };
    let last = halts(&weighed(&mut core, number, 0.5, 90)).unwrap();
    let told = notices(&moves(&mut core, [a, b], 90..=last));
    assert!(
        told.iter().any(|text| text.starts_with("the job moves to more CompNodes, `c`, `d` may work for it")),
        "{told:?}"
    );
}

fn joins(core: &mut Core, connection: u64, name: &str, second: u64) {
    let now = NOW + Duration::from_secs(second);
    let (_, actions) = core.join(ConnectionId(connection), joining(name), now);
    measure_at(core, actions, now);
}

/// A plan takes a while: what was free may be so no more when it is there.
#[test]
fn what_has_changed_meanwhile_moves_nothing() {
    let at_weighing = || {
        let mut core = at_work(&[]);
        let [a, b] = as_planned(&core);
        seconds(&mut core, KEY, [a, b], 1..5);
        joins(&mut core, 3, "c", 5);
        let actions = seconds(&mut core, KEY, [a, b], 5..30);
        let [number] = weighs(&actions)[..] else { panic!("{actions:?}") };
        (core, number)
    };
    let now = NOW + Duration::from_secs(30);
    let (mut core, number) = at_weighing();
    core.handle(left(3), now);
    assert_eq!(halts(&weighed(&mut core, number, 0.5, 30)), None, "the newcomer has gone");
    let (mut core, number) = at_weighing();
    let spec = testing::spec(&["placement.compnodes=3"]);
    let start = start(&spec, 0);
    core.submit(spec, start, PathBuf::from("/runs/y"), now).unwrap();
    assert_eq!(halts(&weighed(&mut core, number, 0.5, 30)), None, "another job waits");
    let (mut core, number) = at_weighing();
    core.handle(CoreEvent::Unpersisted { reason: "the disk is full".to_owned() }, now);
    assert_eq!(halts(&weighed(&mut core, number, 0.5, 30)), None, "the store cannot take it down");
    let (mut core, number) = at_weighing();
    assert_eq!(halts(&weighed(&mut core, number + 1, 0.5, 30)), None, "it is another one's answer");
    assert!(halts(&weighed(&mut core, number, 0.5, 30)).is_some());
}

#[test]
fn a_job_that_is_not_to_move_stays() {
    for fixed in ["survive.enabled=false", "survive.every=0", "placement.compnodes=2"] {
        let mut core = at_work(&[fixed]);
        let [a, b] = as_planned(&core);
        joins(&mut core, 3, "c", 0);
        assert!(weighs(&seconds(&mut core, KEY, [a, 3.0 * b], 1..60)).is_empty(), "{fixed}");
    }
}
