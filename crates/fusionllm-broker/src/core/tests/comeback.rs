//! What is measured of a recovery, and what a status says meanwhile.

use fusionllm_protocol::{Fault, Recovery, Standstill};

use super::*;

fn at(second: u64) -> Duration {
    NOW + Duration::from_secs(second)
}

/// A CompNode says something at that second.
fn says(core: &mut Core, connection: u64, message: FromCompNode, second: u64) -> Vec<Action> {
    let now = at(second);
    let actions = core.handle(CoreEvent::Said { connection: ConnectionId(connection), message, at: now }, now);
    measure_at(core, actions, now)
}

/// The checkpoint of step 3, or the beginning, is read at that second.
fn loads(core: &mut Core, actions: Vec<Action>, second: u64) {
    let now = at(second);
    let mut loading = None;
    for action in &actions {
        if let Action::Load(asked) = action {
            loading = Some((**asked).clone());
        }
    }
    let actions = measure_at(core, actions, now);
    assert!(!actions.is_empty());
    let Some(loading) = loading else { return };
    let result = Box::new(Ok(start(&loading.record.spec, 3)));
    let actions = core.handle(CoreEvent::Loaded { job: JobId(1), number: loading.number, result }, now);
    measure_at(core, actions, now);
}

/// Nobody has died by that second, and time passes.
fn ticks(core: &mut Core, second: u64) -> Vec<Action> {
    let all: Vec<ConnectionId> = core.compnodes.all().collect();
    assert!(all.into_iter().all(|connection| core.compnodes.seen(connection, at(second))));
    let actions = core.handle(CoreEvent::Tick, at(second));
    measure_at(core, actions, at(second))
}

fn leaves(core: &mut Core, connection: u64, second: u64) -> Vec<Action> {
    let reason = "its process ended".to_owned();
    core.handle(CoreEvent::Left { connection: ConnectionId(connection), reason }, at(second))
}

/// What the lines of the metrics tell of recoveries.
fn recoveries(actions: &[Action]) -> Vec<Recovery> {
    let told = |action: &Action| match action {
        Action::AppendMetrics { metrics, .. } => metrics.recoveries.clone(),
        _ => Vec::new(),
    };
    actions.iter().flat_map(told).collect()
}

fn standstill(core: &Core) -> Option<Standstill> {
    core.status().jobs[0].standstill.clone()
}

/// A job on `compnodes` CompNodes has done five steps, and has a checkpoint of step 3.
fn at_step_five(compnodes: u64) -> Core {
    let mut core = core(compnodes);
    submit(&mut core, &[]);
    (1..=compnodes).for_each(|connection| drop(say(&mut core, connection, ready(KEY))));
    for number in 1..=5 {
        (1..=compnodes).for_each(|connection| drop(say(&mut core, connection, step(KEY, number, Some(1.0)))));
    }
    let (path, checksum) = (PathBuf::from("/c"), "c3".to_owned());
    tell(&mut core, CoreEvent::CheckpointFinished { key: KEY, step: 3, path, checksum }, NOW);
    core
}

fn again(generation: u32) -> RunKey {
    RunKey { generation: Generation(generation), ..KEY }
}

#[test]
fn the_phases_of_a_recovery_are_measured() {
    let mut core = at_step_five(2);
    assert_eq!(standstill(&core), None);
    let actions = leaves(&mut core, 2, 0);
    loads(&mut core, actions, 1);
    ticks(&mut core, 2);
    let shown = standstill(&core).unwrap();
    assert!(shown.is_recovering && (shown.for_s - 2.0).abs() < 1e-9, "{shown}");
    assert!(shown.reason.starts_with("CompNode `b` vanished after step 5; 1 of 2 CompNodes are there"), "{shown}");
    ticks(&mut core, 6);
    assert!(standstill(&core).unwrap().reason.ends_with("the CompNodes prepare their parts"));
    says(&mut core, 1, ready(again(2)), 8);
    assert_eq!(state(&core, 1), JobState::Running);
    let shown = standstill(&core).unwrap().to_string();
    assert_eq!(shown, "recovering for 8 s: CompNode `b` vanished after step 5; its first step is under way");
    let actions = says(&mut core, 1, step(again(2), 4, Some(1.0)), 9);
    let expected = Recovery {
        kind: Fault::Lost,
        who: vec!["b".to_owned()],
        step: 5,
        lost_steps: 2,
        compnodes: 1,
        detect_s: 0.0,
        decide_s: 6.0,
        build_s: 2.0,
        refill_s: 1.0,
    };
    assert_eq!((recoveries(&actions), standstill(&core)), (vec![expected], None));
    assert_eq!(recoveries(&says(&mut core, 1, step(again(2), 5, Some(1.0)), 9)), [], "once");
}

/// What goes wrong before the job is back belongs to the same recovery, and no second is counted twice.
#[test]
fn a_fault_in_a_recovery_makes_it_longer() {
    let mut core = at_step_five(2);
    let actions = leaves(&mut core, 2, 0);
    loads(&mut core, actions, 0);
    let (_, actions) = core.join(ConnectionId(3), joining("c"), at(1));
    measure_at(&mut core, actions, at(1));
    assert_eq!(state(&core, 1), JobState::Preparing);
    let actions = leaves(&mut core, 3, 3);
    loads(&mut core, actions, 3);
    ticks(&mut core, 9);
    says(&mut core, 1, ready(again(3)), 9);
    let told = recoveries(&says(&mut core, 1, step(again(3), 4, Some(1.0)), 10));
    let [Recovery { who, decide_s, build_s, refill_s, lost_steps, .. }] = &told[..] else { panic!("{told:?}") };
    assert_eq!(*who, ["b", "c"]);
    assert_eq!((*decide_s, *build_s, *refill_s, *lost_steps), (1.0 + 6.0, 2.0, 1.0, 2));
}

#[test]
fn all_who_are_lost_at_once_are_named() {
    let mut core = at_step_five(3);
    let heard = |core: &mut Core, second: u64| {
        for peer in [1, 2] {
            let message = FromCompNode::PeerHeard { key: KEY, peer: NodeIndex(peer), ago_s: second as f64 };
            says(core, 1, message, second);
        }
    };
    let mut actions = Vec::new();
    for second in 0..6 {
        says(&mut core, 1, FromCompNode::Heartbeat { number: second }, second);
        actions.extend(tell(&mut core, CoreEvent::Tick, at(second)));
        if second == 3 {
            let shown = standstill(&core).unwrap().to_string();
            assert_eq!(shown, "running, no step for 3 s: no sign of life of CompNode `b`, `c`");
        }
        heard(&mut core, second);
    }
    let JobState::Waiting { reason } = &states(&actions)[0] else { panic!("{actions:?}") };
    assert!(reason.contains("`b` vanished after step 5: no sign of life for 4.0 s"), "{reason}");
    assert!(reason.ends_with("no sign of life of `c` either"), "{reason}");
    loads(&mut core, actions, 6);
    let shown = standstill(&core).unwrap().to_string();
    assert!(shown.starts_with("recovering for 5 s: CompNodes `b`, `c` vanished after step 5; "), "{shown}");
}

/// Its connection is closed a moment after that of another.
#[test]
fn who_goes_right_after_another_is_named_too() {
    let mut core = at_step_five(3);
    leaves(&mut core, 2, 0);
    let actions = leaves(&mut core, 3, 0);
    let told = |action: &Action| matches!(action, Action::Notice { notice, .. } if notice.text == "CompNode `c` vanished, too");
    assert!(actions.iter().any(told), "{actions:?}");
    assert!(standstill(&core).unwrap().reason.starts_with("CompNodes `b`, `c` vanished after step 5"));
}

#[test]
fn after_a_restart_the_time_counts_for_which_the_broker_was_gone() {
    let record = JobRecord { members: 2, ..at_step_five(2).record(JobId(1)).unwrap().clone() };
    let gone_for = Duration::from_secs(7);
    let known = Restored { record, reached: Some((5, 1.5)), gone_for, checkpoint: Some(3), placement: None };
    let (mut core, actions) = Core::restore(vec![known], ResumedBy::default());
    loads(&mut core, actions, 0);
    for (connection, name) in [(1, "a"), (2, "b")] {
        let (_, actions) = core.join(ConnectionId(connection), joining(name), at(0));
        measure_at(&mut core, actions, at(0));
    }
    (1..=2).for_each(|connection| drop(says(&mut core, connection, ready(again(2)), 2)));
    says(&mut core, 1, step(again(2), 4, Some(1.0)), 3);
    let told = recoveries(&says(&mut core, 2, step(again(2), 4, Some(1.0)), 3));
    let [Recovery { kind, who, step, lost_steps, detect_s, build_s, .. }] = &told[..] else { panic!("{told:?}") };
    assert_eq!((*kind, who.len(), *step, *lost_steps), (Fault::BrokerRestart, 0, 5, 2));
    assert_eq!((*detect_s, *build_s), (7.0, 2.0));
}

#[test]
fn what_fails_or_stalls_is_named() {
    let mut core = at_step_five(2);
    says(&mut core, 2, FromCompNode::Failed { key: KEY, reason: "no memory".to_owned(), bad_input: false }, 0);
    assert!(standstill(&core).unwrap().reason.starts_with("CompNode `b` failed after step 5; "));
    let mut core = at_step_five(2);
    says(&mut core, 1, step(KEY, 6, Some(1.0)), 0);
    for second in 1..200 {
        ticks(&mut core, second);
        if let Some(shown) = standstill(&core) {
            assert!(shown.is_recovering && shown.for_s >= 60.0, "{shown}");
            assert!(shown.reason.starts_with("nothing came from CompNode `b` after step 5"), "{shown}");
            return;
        }
    }
    panic!("it did not count as stalled");
}
