//! CompNodes that become slower, and new ones that pay for a move.

use super::recovery::{notices, tick};
use super::*;
use crate::core::drift::Weighed;

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

fn halts(actions: &[Action]) -> bool {
    sent(actions).iter().any(|(_, message)| matches!(message, FromBroker::Snapshot { halt: true, .. }))
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
    let (mut from, mut asked) = (60, 0);
    while asked < 3 {
        let actions = seconds(&mut core, KEY, [a, 4.0 * b], from..from + 1);
        from += 1;
        assert!(from < 200 && !halts(&actions));
        let [number] = weighs(&actions)[..] else { continue };
        asked += 1;
        let now = NOW + Duration::from_secs(from);
        let result = Some(Weighed { now_s: 1.0, then_s: 0.5 });
        let actions = core.handle(CoreEvent::Weighed { job: KEY.job, number, result }, now);
        assert_eq!(halts(&actions), asked == 3, "{asked}: {actions:?}");
    }
    assert!(from >= 120, "three windows");
    // It stands still after a step soon, and is placed by what was seen.
    let mut actions = Vec::new();
    let mut last = 0;
    for second in from..from + 30 {
        actions = seconds(&mut core, KEY, [a, b], second..second + 1);
        last = second;
        let halted = core.jobs[&KEY.job].snapshots.newest();
        if halted.is_some() {
            break;
        }
    }
    let _ = (last, &actions);
    let key = RunKey { generation: Generation(2), ..KEY };
    let now = NOW + Duration::from_secs(from + 40);
    let moved = core.move_on(KEY, now);
    let moved = measure_at(&mut core, moved, now);
    assert_eq!(core.record(JobId(1)).unwrap().generation, key.generation, "{moved:?}");
    let told = notices(&moved);
    assert!(
        told.iter().any(|text| text.starts_with("the job moves, since CompNode `b` computes 4.0 times as long")),
        "{told:?}"
    );
    let work = core.record(JobId(1)).unwrap().work.clone().unwrap();
    let ops = |name: &str| work.placement.prediction.compnodes.iter().find(|c| c.name == name).map_or(0, |c| c.ops);
    assert!(ops("b") < ops("a"), "{:?}", work.placement.prediction);
}

#[test]
fn a_newcomer_is_measured_beside_the_work_and_taken_in_if_it_pays() {
    let mut core = at_work(&[]);
    let [a, b] = as_planned(&core);
    seconds(&mut core, KEY, [a, b], 1..5);
    let (_, actions) = core.join(ConnectionId(3), joining("c"), NOW + Duration::from_secs(5));
    measure_at(&mut core, actions, NOW + Duration::from_secs(5));
    let actions = seconds(&mut core, KEY, [a, b], 5..30);
    let [number] = weighs(&actions)[..] else { panic!("{actions:?}") };
    let weighed = actions.iter().find_map(|action| match action {
        Action::Weigh { input, .. } => Some(input.cluster.compnodes.iter().map(|c| c.name.clone()).collect::<Vec<_>>()),
        _ => None,
    });
    assert_eq!(weighed.unwrap(), ["a", "b", "c"]);
    let now = NOW + Duration::from_secs(30);
    let result = Some(Weighed { now_s: 1.0, then_s: 0.95 });
    assert!(core.handle(CoreEvent::Weighed { job: KEY.job, number, result }, now).is_empty(), "it does not pay");
    assert!(weighs(&seconds(&mut core, KEY, [a, b], 30..60)).is_empty(), "it is tried once");
    // Another one comes.
    let (_, actions) = core.join(ConnectionId(4), joining("d"), now);
    measure_at(&mut core, actions, now);
    let actions = seconds(&mut core, KEY, [a, b], 60..90);
    let [number] = weighs(&actions)[..] else { panic!("{actions:?}") };
    let result = Some(Weighed { now_s: 1.0, then_s: 0.5 });
    let now = NOW + Duration::from_secs(90);
    assert!(halts(&core.handle(CoreEvent::Weighed { job: KEY.job, number, result }, now)));
    let moved = core.move_on(KEY, now);
    let told = notices(&measure_at(&mut core, moved, now));
    assert!(
        told.iter().any(|text| text.starts_with("the job moves to more CompNodes, `c`, `d` may work for it")),
        "{told:?}"
    );
}

#[test]
fn a_job_that_is_pinned_or_not_to_move_stays() {
    for fixed in ["survive.enabled=false", "survive.every=0", "placement.compnodes=2"] {
        let mut core = at_work(&[fixed]);
        let [a, b] = as_planned(&core);
        let (_, actions) = core.join(ConnectionId(3), joining("c"), NOW);
        measure(&mut core, actions);
        assert!(weighs(&seconds(&mut core, KEY, [a, b], 1..60)).is_empty(), "{fixed}");
    }
}
