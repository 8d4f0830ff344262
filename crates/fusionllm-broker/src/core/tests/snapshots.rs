//! Snapshots are taken, guarded, and gone on from.

use fusionllm_protocol::{Snapshot, SnapshotId, SnapshotSource, WeightSource};

use super::recovery::{AFTER_RESTART, left, load, notices, tick, waits_for};
use super::*;

pub(super) fn snapshot(key: RunKey, step: u64, node: u32) -> Snapshot {
    let id = SnapshotId { key, step, node: NodeIndex(node) };
    Snapshot { id, bytes: 1000, hash: [step as u8 + 10 * node as u8; 32] }
}

pub(super) fn holds(snapshot: Snapshot) -> FromCompNode {
    FromCompNode::Holds { snapshot, cost_s: 0.01 }
}

fn failed(snapshot: Snapshot, is_late: bool) -> FromCompNode {
    FromCompNode::SnapshotFailed { id: snapshot.id, is_late, reason: "the disk is full".to_owned() }
}

/// All CompNodes report a step.
fn do_step(core: &mut Core, key: RunKey, connections: &[u64], number: u64) -> Vec<Action> {
    let say = |&connection| say(core, connection, step(key, number, Some(number as f64)));
    connections.iter().flat_map(say).collect()
}

/// Two CompNodes train without checkpoints, each guards the other, and the snapshots of step 8 are whole.
fn with_snapshots() -> Core {
    let mut core = running_with(&[
        "survive.every=4",
        "model.n_layer=4",
        "model.vocab_size=256",
        "train.steps=100",
        "checkpoint.every=0",
    ]);
    let asked = do_step(&mut core, KEY, &[1, 2], 1);
    let order = FromBroker::Snapshot { key: KEY, step: 8, halt: false };
    assert_eq!(sent(&asked), [(1, &order), (2, &order)]);
    for number in 2..=8 {
        assert_eq!(sent(&do_step(&mut core, KEY, &[1, 2], number)), []);
    }
    for node in [0, 1] {
        let made = say(&mut core, u64::from(node) + 1, holds(snapshot(KEY, 8, node)));
        let guard = FromBroker::Guard { snapshot: snapshot(KEY, 8, node) };
        assert_eq!(sent(&made), [(2 - u64::from(node), &guard)]);
    }
    assert_eq!(sent(&say(&mut core, 2, holds(snapshot(KEY, 8, 0)))), []);
    let whole = say(&mut core, 1, holds(snapshot(KEY, 8, 1)));
    let release = FromBroker::Release { job: KEY.job, keep: vec![(KEY.generation, 8)] };
    assert!(sent(&whole).contains(&(1, &release)) && sent(&whole).contains(&(2, &release)), "{whole:?}");
    core
}

/// What each CompNode begins with.
fn sources(actions: &[Action]) -> Vec<(u64, u64, Vec<SnapshotSource>)> {
    let of = |(to, message): (u64, &FromBroker)| match message {
        FromBroker::Assign(assignment) => match &assignment.weights {
            WeightSource::Snapshots(sources) => Some((to, assignment.start_step, sources.clone())),
            other => panic!("{other:?}"),
        },
        _ => None,
    };
    sent(actions).into_iter().filter_map(of).collect()
}

/// What the owner of private data holds lies with it alone; of others it guards.
#[test]
fn the_owner_of_private_data_has_no_guardian() {
    let mut core = running_with(&[
        "data.private=true",
        "survive.every=4",
        "model.n_layer=4",
        "model.vocab_size=256",
        "train.steps=100",
        "checkpoint.every=0",
    ]);
    for number in 1..=8 {
        do_step(&mut core, KEY, &[1, 2], number);
    }
    assert_eq!(sent(&say(&mut core, 1, holds(snapshot(KEY, 8, 0)))), [], "nobody is to fetch it");
    let guard = FromBroker::Guard { snapshot: snapshot(KEY, 8, 1) };
    assert_eq!(sent(&say(&mut core, 2, holds(snapshot(KEY, 8, 1)))), [(1, &guard)]);
    say(&mut core, 1, holds(snapshot(KEY, 8, 1)));
    assert_eq!(core.record(JobId(1)).unwrap().snapshots.iter().map(|set| set.step).collect::<Vec<_>>(), [8]);
}

#[test]
fn a_set_is_remembered_before_the_ones_before_it_are_released() {
    let mut core = with_snapshots();
    let record = core.record(JobId(1)).unwrap();
    assert_eq!(record.snapshots.iter().map(|set| (set.step, set.loss)).collect::<Vec<_>>(), [(8, Some(8.0))]);
    // The next one takes its place, and nothing is said before the store has it.
    let asked = do_step(&mut core, KEY, &[1, 2], 9);
    assert!(sent(&asked).contains(&(1, &FromBroker::Snapshot { key: KEY, step: 12, halt: false })), "{asked:?}");
    for number in 10..=12 {
        do_step(&mut core, KEY, &[1, 2], number);
    }
    for (connection, node) in [(1, 0), (2, 1), (2, 0)] {
        say(&mut core, connection, holds(snapshot(KEY, 12, node)));
    }
    let last = CoreEvent::Said { connection: ConnectionId(1), message: holds(snapshot(KEY, 12, 1)), at: NOW };
    let actions = core.handle(last, NOW);
    let [Action::Persist { number, record, .. }, ..] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!(record.snapshots.iter().map(|set| set.step).collect::<Vec<_>>(), [12]);
    assert!(sent(&actions).iter().all(|(_, m)| !matches!(m, FromBroker::Release { .. })), "{actions:?}");
    let actions = core.handle(CoreEvent::Persisted { number: *number }, NOW);
    let release = FromBroker::Release { job: KEY.job, keep: vec![(KEY.generation, 12)] };
    assert!(sent(&actions).contains(&(2, &release)), "{actions:?}");
}

#[test]
fn a_job_goes_on_from_what_the_guardian_has() {
    let mut core = with_snapshots();
    do_step(&mut core, KEY, &[1, 2], 9);
    let actions = tell(&mut core, left(2), NOW);
    assert_eq!(sent(&actions).len(), 1, "{actions:?}");
    let actions = tick(&mut core, NOW + AFTER_RESTART);
    let all = sources(&actions);
    let [(1, 8, all)] = &all[..] else { panic!("{all:?}") };
    assert_eq!(all.iter().map(|source| source.snapshot).collect::<Vec<_>>(), [0, 1].map(|node| snapshot(KEY, 8, node)));
    assert!(all.iter().all(|source| source.from.is_none()), "both lie there: {all:?}");
    let told = notices(&actions);
    assert!(
        told.iter().any(|t| t.ends_with("goes on from the snapshots of step 8, one step is done again")),
        "{told:?}"
    );
    assert_eq!(core.record(JobId(1)).unwrap().step, 8);
    // They are kept until the next set is whole.
    assert_eq!(core.record(JobId(1)).unwrap().snapshots.len(), 1);
}

#[test]
fn a_process_that_is_started_again_has_what_it_kept() {
    let mut core = with_snapshots();
    tell(&mut core, left(2), NOW);
    let (_, actions) = core.join(ConnectionId(3), joining("b"), NOW);
    let other = Snapshot { hash: [0; 32], ..snapshot(KEY, 8, 1) };
    let release = FromBroker::Release { job: KEY.job, keep: vec![(KEY.generation, 8)] };
    assert_eq!(sent(&say(&mut core, 3, holds(other))), [(3, &release)], "that is none of this job");
    assert_eq!(sent(&say(&mut core, 3, holds(snapshot(KEY, 8, 1)))), []);
    let actions = measure(&mut core, actions);
    let all = sources(&actions);
    let owned: Vec<_> = all.iter().map(|(to, _, all)| (*to, all.len(), all[0].from.is_none())).collect();
    assert_eq!(owned, [(1, 1, true), (3, 1, true)], "nothing goes over a wire: {all:?}");
}

#[test]
fn who_is_new_fetches_from_who_has_it() {
    let mut core = with_snapshots();
    tell(&mut core, left(2), NOW);
    let actions = join(&mut core, 3, "c");
    let all = sources(&actions);
    let lent = all.iter().find(|(to, ..)| *to == 3).unwrap();
    assert!(lent.2.iter().all(|source| source.from.is_some()), "{all:?}");
    let lends = sent(&actions).into_iter().find(|(_, m)| matches!(m, FromBroker::Lend { .. })).unwrap();
    assert_eq!(lends.0, 1);
    let assigned = |(_, m): &(u64, &FromBroker)| matches!(m, FromBroker::Assign(_));
    let order: Vec<bool> = sent(&actions).iter().map(assigned).collect();
    assert!(order.is_sorted(), "the lender is told before it is asked: {actions:?}");
}

#[test]
fn without_a_part_the_job_goes_back_to_its_checkpoint() {
    let mut core = running_with(&["survive.every=4", "survive.copies=0", "train.steps=100"]);
    for number in 1..=8 {
        do_step(&mut core, KEY, &[1, 2], number);
    }
    for node in [0, 1] {
        let made = say(&mut core, u64::from(node) + 1, holds(snapshot(KEY, 8, node)));
        assert!(sent(&made).iter().all(|(_, m)| !matches!(m, FromBroker::Guard { .. })), "{made:?}");
    }
    assert_eq!(core.record(JobId(1)).unwrap().snapshots.len(), 1);
    tell(&mut core, left(2), NOW);
    tick(&mut core, NOW + AFTER_RESTART);
    assert!(waits_for(&core).contains("snapshots of step 8"), "{}", waits_for(&core));
    let actions = tick(&mut core, NOW + Duration::from_secs(60));
    let begins = sent(&actions).into_iter().find_map(|(_, message)| match message {
        FromBroker::Assign(assignment) => Some((assignment.start_step, assignment.weights.clone())),
        _ => None,
    });
    assert_eq!(begins, Some((0, WeightSource::Seed)));
    // Should its process come back now, what it has is of a future that is given up.
    join(&mut core, 3, "b");
    let release = FromBroker::Release { job: KEY.job, keep: Vec::new() };
    assert_eq!(sent(&say(&mut core, 3, holds(snapshot(KEY, 8, 1)))), [(3, &release)]);
}

#[test]
fn what_cannot_be_kept_is_told_once_and_what_comes_too_late_is_not() {
    let mut core = running_with(&["survive.every=4", "train.steps=100"]);
    for number in 1..=2 {
        do_step(&mut core, KEY, &[1, 2], number);
    }
    let told = say(&mut core, 1, failed(snapshot(KEY, 8, 0), true));
    assert!(notices(&told).is_empty(), "{told:?}");
    // A word that was too late comes earlier the next time.
    let asked = do_step(&mut core, KEY, &[1, 2], 3);
    assert!(sent(&asked).contains(&(1, &FromBroker::Snapshot { key: KEY, step: 12, halt: false })), "{asked:?}");
    let told = notices(&say(&mut core, 1, failed(snapshot(KEY, 12, 0), false)));
    assert!(told.len() == 1 && told[0].contains("`a` cannot keep a snapshot") && told[0].contains("disk"), "{told:?}");
    do_step(&mut core, KEY, &[1, 2], 4);
    assert!(notices(&say(&mut core, 2, failed(snapshot(KEY, 12, 1), false))).is_empty());
    assert_eq!(state(&core, 1), JobState::Running);
}

#[test]
fn a_restarted_broker_goes_on_from_what_its_compnodes_still_have() {
    let before = with_snapshots();
    let record = JobRecord { step: 9, members: 2, ..before.record(JobId(1)).unwrap().clone() };
    let restored =
        Restored { record, reached: Some((9, 1.5)), gone_for: Duration::ZERO, checkpoint: None, placement: None };
    let (mut core, actions) = Core::restore(vec![restored], ResumedBy::default());
    let actions = measure(&mut core, actions);
    load(&mut core, actions, 0, NOW);
    join(&mut core, 1, "a");
    for node in [0, 1] {
        assert_eq!(sent(&say(&mut core, 1, holds(snapshot(KEY, 8, node)))), []);
    }
    assert!(waits_for(&core).starts_with("1 of 2"), "{}", waits_for(&core));
    let all = sources(&join(&mut core, 2, "b"));
    let steps: Vec<_> = all.iter().map(|(to, from, all)| (*to, *from, all[0].from.is_none())).collect();
    assert_eq!(steps, [(1, 8, true), (2, 8, false)]);
}

#[test]
fn a_job_that_ends_has_its_snapshots_released() {
    let mut core = with_snapshots();
    let actions = core.stop(JobId(1), NOW).unwrap();
    let actions = measure(&mut core, actions);
    let release = FromBroker::Release { job: KEY.job, keep: Vec::new() };
    assert!([1, 2].iter().all(|&to| sent(&actions).contains(&(to, &release))), "{actions:?}");
    assert!(core.record(JobId(1)).unwrap().snapshots.is_empty());
}

#[test]
fn a_compnode_leaves_when_its_work_has_moved_and_nothing_is_done_again() {
    let mut core = with_snapshots();
    join(&mut core, 3, "c");
    do_step(&mut core, KEY, &[1, 2], 9);
    let asked = say(&mut core, 2, FromCompNode::Leaving);
    let order = FromBroker::Snapshot { key: KEY, step: 13, halt: true };
    assert_eq!(sent(&asked), [(1, &order), (2, &order)]);
    for number in 10..=13 {
        do_step(&mut core, KEY, &[1, 2], number);
    }
    assert!(sent(&say(&mut core, 1, holds(snapshot(KEY, 13, 0)))).is_empty(), "nobody need guard it");
    let actions = say(&mut core, 2, holds(snapshot(KEY, 13, 1)));
    let actions = measure(&mut core, actions);
    let begun: Vec<_> = sources(&actions).iter().map(|(to, step, _)| (*to, *step)).collect();
    assert_eq!(begun, [(1, 13), (3, 13)], "{actions:?}");
    let told = notices(&actions);
    let expected = "CompNode `b` leaves; the job goes on from the snapshots of step 13";
    assert!(told.iter().any(|text| text == expected), "{told:?}");
    let lends = |(to, message): &(u64, &FromBroker)| *to == 2 && matches!(message, FromBroker::Lend { .. });
    assert!(sent(&actions).iter().any(lends), "who leaves lends what it has: {actions:?}");
    let key = RunKey { generation: Generation(2), ..KEY };
    assert!(!sent(&say(&mut core, 1, ready(key))).contains(&(2, &FromBroker::Dismiss { keep: false })));
    say(&mut core, 3, ready(key));
    // Until the others have snapshots of their own, part of the newest is with it alone: these come at once.
    let asked = do_step(&mut core, key, &[1, 3], 14);
    let order = FromBroker::Snapshot { key, step: 16, halt: false };
    assert!(
        sent(&asked).contains(&(3, &order)) && !sent(&asked).contains(&(2, &FromBroker::Dismiss { keep: false })),
        "{asked:?}"
    );
    for number in 15..=16 {
        do_step(&mut core, key, &[1, 3], number);
    }
    for (connection, node) in [(1, 0), (3, 1), (3, 0)] {
        say(&mut core, connection, holds(snapshot(key, 16, node)));
    }
    let last = CoreEvent::Said { connection: ConnectionId(1), message: holds(snapshot(key, 16, 1)), at: NOW };
    let actions = core.handle(last, NOW);
    let [Action::Persist { number, .. }, ..] = actions[..] else { panic!("{actions:?}") };
    let dismissed = (2, &FromBroker::Dismiss { keep: false });
    assert!(!sent(&core.handle(CoreEvent::Tick, NOW)).contains(&dismissed), "the store does not have it yet");
    core.handle(CoreEvent::Persisted { number }, NOW);
    assert!(sent(&tick(&mut core, NOW)).contains(&dismissed));
}

#[test]
fn who_has_no_work_may_leave_at_once_and_gets_none() {
    let mut core = core(2);
    assert_eq!(sent(&core.drain("b", NOW).unwrap()), [(2, &FromBroker::Dismiss { keep: false })]);
    let (_, actions) = submit(&mut core, &[]);
    let assigned: Vec<u64> =
        sent(&actions).iter().filter(|(_, m)| matches!(m, FromBroker::Assign(_))).map(|(to, _)| *to).collect();
    assert_eq!(assigned, [1]);
    assert_eq!(core.drain("x", NOW).unwrap_err().to_string(), "no CompNode is named `x`; joined are a, b");
    let mut core = running_mortal();
    let refused = core.drain("b", NOW).unwrap_err();
    assert!(refused.to_string().starts_with("job 1 works on `b` and is not to go on without it"), "{refused}");
    assert!(refused.is_bad_input());
}

/// Nobody may take one for gone in order that went before its work had moved. If it was only held up, it leaves then.
#[test]
fn who_is_lost_while_it_is_to_leave_is_told_apart_from_who_has_left() {
    let mut core = with_snapshots();
    do_step(&mut core, KEY, &[1, 2], 9);
    core.drain("b", NOW).unwrap();
    assert_eq!(core.status().lost_leaving, Vec::<String>::new());
    core.lost("b", "no heartbeat", NOW);
    assert_eq!(core.status().lost_leaving, ["b"]);
    // The same process is back, at work on what it had.
    let standing = Standing { key: KEY, placement: "x".to_owned(), kept_from: 9, done: 9, settled: 0, halts: false };
    let joining = Joining { standing: Some(standing), ..joining("b") };
    core.join(ConnectionId(3), joining, NOW);
    assert_eq!(core.status().lost_leaving, Vec::<String>::new());
    assert!(core.compnodes.is_leaving(ConnectionId(3)));
}

/// If one cannot make its part, the others stand still already: the job moves with what was kept before.
#[test]
fn a_move_without_a_snapshot_goes_back_to_the_one_before() {
    let mut core = with_snapshots();
    join(&mut core, 3, "c");
    do_step(&mut core, KEY, &[1, 2], 9);
    say(&mut core, 2, FromCompNode::Leaving);
    let actions = say(&mut core, 1, failed(snapshot(KEY, 13, 0), false));
    let actions = measure(&mut core, actions);
    let begun: Vec<_> = sources(&actions).iter().map(|(to, step, _)| (*to, *step)).collect();
    assert_eq!(begun, [(1, 8), (3, 8)], "{actions:?}");
}

/// A machine that is restarted without another to take its work: the job waits for it, and nothing is lost.
#[test]
fn who_is_the_last_keeps_what_it_has() {
    let mut core = running_with(&["survive.every=4", "train.steps=100", "checkpoint.every=0"]);
    do_step(&mut core, KEY, &[1, 2], 1);
    let asked = say(&mut core, 1, FromCompNode::Leaving);
    let [(1, FromBroker::Snapshot { step: last, halt: true, .. }), ..] = sent(&asked)[..] else { panic!("{asked:?}") };
    assert!(sent(&say(&mut core, 2, FromCompNode::Leaving)).is_empty(), "it stands still there already");
    let last = *last;
    for number in 2..=last {
        do_step(&mut core, KEY, &[1, 2], number);
    }
    say(&mut core, 1, holds(snapshot(KEY, last, 0)));
    say(&mut core, 2, holds(snapshot(KEY, last, 1)));
    let actions = tick(&mut core, NOW);
    let dismissed: Vec<u64> = sent(&actions)
        .into_iter()
        .filter(|(_, message)| **message == FromBroker::Dismiss { keep: true })
        .map(|(to, _)| to)
        .collect();
    assert_eq!(dismissed, [1, 2], "{actions:?}");
    for connection in [1, 2] {
        tell(&mut core, left(connection), NOW);
    }
    for (connection, name, node) in [(3, "a", 0), (4, "b", 1)] {
        let (_, actions) = core.join(ConnectionId(connection), joining(name), NOW);
        say(&mut core, connection, holds(snapshot(KEY, last, node)));
        let actions = measure(&mut core, actions);
        let begun: Vec<_> = sources(&actions).iter().map(|(to, step, _)| (*to, *step)).collect();
        assert_eq!(begun, if node == 1 { vec![(3, last), (4, last)] } else { Vec::new() }, "{actions:?}");
    }
}

/// A copy that is not to be had is not asked for again, and the others are not given up for it.
#[test]
fn the_next_copy_is_taken_where_one_is_not_to_be_had() {
    let mut core = with_snapshots();
    tell(&mut core, left(2), NOW);
    let actions = join(&mut core, 3, "c");
    assert_eq!(sources(&actions).len(), 2);
    let id = snapshot(KEY, 8, 1).id;
    let key = RunKey { generation: Generation(2), ..KEY };
    let gone = FromCompNode::SnapshotFailed { id, is_late: false, reason: "it is not here any more".to_owned() };
    say(&mut core, 3, gone);
    let failed = FromCompNode::Failed { key, reason: "the snapshot is gone".to_owned(), bad_input: false };
    say(&mut core, 3, failed);
    tick(&mut core, NOW + AFTER_RESTART);
    let actions = tick(&mut core, NOW + Duration::from_secs(60));
    let begins = |(_, message): (u64, &FromBroker)| match message {
        FromBroker::Assign(assignment) => Some((assignment.start_step, assignment.weights.clone())),
        _ => None,
    };
    let begun: Vec<_> = sent(&actions).into_iter().filter_map(begins).collect();
    assert!(begun.iter().all(|b| *b == (0, WeightSource::Seed)) && begun.len() == 2, "{begun:?}");
}

/// What all had made when one was lost is used, and still known after a restart of the broker.
#[test]
fn a_set_that_a_loss_completes_is_written() {
    let mut core = running_with(&["survive.every=4", "train.steps=100", "checkpoint.every=0"]);
    for number in 1..=8 {
        do_step(&mut core, KEY, &[1, 2], number);
    }
    for node in [0, 1] {
        say(&mut core, u64::from(node) + 1, holds(snapshot(KEY, 8, node)));
    }
    assert!(core.record(JobId(1)).unwrap().snapshots.is_empty(), "guardians have not answered");
    let actions = core.handle(left(2), NOW);
    let written = actions.iter().find_map(|action| match action {
        Action::Persist { record, .. } => Some(record.snapshots.iter().map(|set| set.step).collect::<Vec<_>>()),
        _ => None,
    });
    assert_eq!(written, Some(vec![8]));
}

#[test]
fn what_some_have_made_of_a_set_that_is_given_up_is_released() {
    let mut core = with_snapshots();
    for number in 9..=12 {
        do_step(&mut core, KEY, &[1, 2], number);
    }
    say(&mut core, 1, holds(snapshot(KEY, 12, 0)));
    let actions = say(&mut core, 2, failed(snapshot(KEY, 12, 1), false));
    let release = FromBroker::Release { job: KEY.job, keep: vec![(KEY.generation, 8)] };
    assert!(sent(&actions).contains(&(1, &release)), "{actions:?}");
}

/// A machine takes longer to start again than a process: the job goes on without it, and takes it in when it is there.
#[test]
fn a_job_moves_to_those_who_are_there_again() {
    let mut core = with_snapshots();
    tell(&mut core, left(2), NOW);
    tick(&mut core, NOW + AFTER_RESTART);
    let key = RunKey { generation: Generation(2), ..KEY };
    say(&mut core, 1, ready(key));
    do_step(&mut core, key, &[1], 9);
    let minute = Duration::from_secs(60);
    join(&mut core, 3, "b");
    let asked = tick(&mut core, NOW + minute);
    let halts = |(_, message): (u64, &FromBroker)| match message {
        FromBroker::Snapshot { step, halt: true, .. } => Some(*step),
        _ => None,
    };
    let Some(last) = sent(&asked).into_iter().find_map(halts) else { panic!("{asked:?}") };
    for number in 10..=last {
        do_step(&mut core, key, &[1], number);
    }
    let actions = say(&mut core, 1, holds(snapshot(key, last, 0)));
    let actions = measure(&mut core, actions);
    let begun: Vec<_> = sources(&actions).iter().map(|(to, step, _)| (*to, *step)).collect();
    assert_eq!(begun, [(1, last), (3, last)], "{actions:?}");
    let told = notices(&actions);
    assert!(told.iter().any(|text| text.starts_with("the job moves to more CompNodes, `b` may work")), "{told:?}");
    // Whoever the plan leaves out is not moved to again and again.
    let key = RunKey { generation: Generation(3), ..KEY };
    for connection in [1, 3] {
        say(&mut core, connection, ready(key));
    }
    do_step(&mut core, key, &[1, 3], last + 1);
    let asked = tick(&mut core, NOW + 10 * minute);
    assert!(!sent(&asked).into_iter().any(|m| halts(m).is_some()), "{asked:?}");
}

/// What has been right before may only be away, and one machine that fails does not end what others can do.
#[test]
fn who_fails_a_job_that_has_worked_is_left_out_for_a_while() {
    let mut core = with_snapshots();
    let failed = |key| FromCompNode::Failed { key, reason: "there is no room".to_owned(), bad_input: true };
    say(&mut core, 2, failed(KEY));
    let actions = tick(&mut core, NOW + AFTER_RESTART);
    let begun: Vec<_> = sources(&actions).iter().map(|(to, step, _)| (*to, *step)).collect();
    assert_eq!(begun, [(1, 8)], "the other can do it: {actions:?}");
    // The owner of the data is not to be replaced, but waited for.
    let key = RunKey { generation: Generation(2), ..KEY };
    say(&mut core, 1, failed(key));
    assert!(
        waits_for(&core).contains("CompNode `a`: there is no room; it is tried again within"),
        "{}",
        waits_for(&core)
    );
    let actions = tick(&mut core, NOW + Duration::from_secs(30));
    assert!(!sources(&actions).is_empty(), "{actions:?}");
}
