//! A job goes on by itself.

use super::*;
use crate::core::recovery::RETURN;

/// For so long a process that is started again is waited for, and a little more.
pub(super) const AFTER_RESTART: Duration = Duration::from_secs(6);

pub(super) fn left(connection: u64) -> CoreEvent {
    CoreEvent::Left { connection: ConnectionId(connection), reason: "its process ended".to_owned() }
}

/// What is asked for is read, if it is: the job goes on after `step`.
pub(super) fn load(core: &mut Core, mut actions: Vec<Action>, step: u64, now: Duration) -> Vec<Action> {
    let loading = actions.iter().find_map(|action| match action {
        Action::Load(loading) => Some(loading),
        _ => None,
    });
    let Some(loading) = loading else { return measure_at(core, actions, now) };
    let result = Box::new(Ok(start(&loading.record.spec, step)));
    let (job, number) = (loading.record.job, loading.number);
    actions.extend(core.handle(CoreEvent::Loaded { job, number, result }, now));
    measure_at(core, actions, now)
}

pub(super) fn tick(core: &mut Core, now: Duration) -> Vec<Action> {
    // One that gives no sign of life would be lost, too.
    let all: Vec<ConnectionId> = core.compnodes.all().collect();
    for connection in all {
        core.compnodes.seen(connection, now);
    }
    let actions = core.handle(CoreEvent::Tick, now);
    measure_at(core, actions, now)
}

fn assigned(actions: &[Action]) -> Vec<(u64, u64)> {
    let start = |(to, message): (u64, &FromBroker)| match message {
        FromBroker::Assign(assignment) => Some((to, assignment.start_step)),
        _ => None,
    };
    sent(actions).into_iter().filter_map(start).collect()
}

pub(super) fn waits_for(core: &Core) -> String {
    match state(core, 1) {
        JobState::Waiting { reason } => reason,
        other => panic!("the job is {other:?}"),
    }
}

pub(super) fn notices(actions: &[Action]) -> Vec<String> {
    let text = |action: &Action| match action {
        Action::Notice { notice, .. } => Some(notice.text.clone()),
        _ => None,
    };
    actions.iter().filter_map(text).collect()
}

/// Both CompNodes have done `steps` steps, and there is a checkpoint of step 3.
fn at_step(steps: u64) -> Core {
    let mut core = running();
    for number in 1..=steps {
        for connection in [1, 2] {
            say(&mut core, connection, step(KEY, number, Some(1.0)));
        }
    }
    let finished =
        CoreEvent::CheckpointFinished { key: KEY, step: 3, path: PathBuf::from("/c"), checksum: "c3".to_owned() };
    tell(&mut core, finished, NOW);
    core
}

#[test]
fn a_job_that_loses_a_compnode_goes_on_with_the_others() {
    let mut core = at_step(5);
    let actions = tell(&mut core, left(2), NOW);
    let told = "CompNode `b` vanished after step 5: its process ended";
    assert_eq!(states(&actions)[0], JobState::Waiting { reason: told.to_owned() });
    assert!(matches!(sent(&actions)[..], [(1, FromBroker::Abort { .. })]), "{actions:?}");
    assert_eq!(waits_for(&core), "what it starts from is being read");
    let actions = load(&mut core, actions, 3, NOW);
    assert_eq!(assigned(&actions), []);
    assert_eq!(waits_for(&core), "1 of 2 CompNodes are there, and the others may come back in a moment");
    let actions = tick(&mut core, NOW + AFTER_RESTART);
    assert_eq!(assigned(&actions), [(1, 3)]);
    let notices = notices(&actions);
    let expected = format!("{told}; the job goes on from the checkpoint of step 3, 2 steps are done again");
    assert!(notices.contains(&expected), "{notices:?}");
    let key = RunKey { generation: Generation(2), ..KEY };
    say(&mut core, 1, ready(key));
    say(&mut core, 1, step(KEY, 4, Some(9.0)));
    assert_eq!(core.record(JobId(1)).unwrap().step, 3, "a report of the lost placement counts no more");
    say(&mut core, 1, step(key, 4, Some(1.0)));
    assert_eq!((state(&core, 1), core.record(JobId(1)).unwrap().step), (JobState::Running, 4));
}

/// What it has made is with its CompNodes and in its checkpoints: nothing is lost by waiting.
#[test]
fn a_job_that_goes_on_waits_for_its_files() {
    let mut core = at_step(5);
    let actions = tell(&mut core, left(2), NOW);
    load(&mut core, actions, 3, NOW);
    let mut now = NOW + AFTER_RESTART;
    let mut actions = tick(&mut core, now);
    let mut tries = Vec::new();
    for _ in 0..120 {
        if let [(1, 3)] = assigned(&actions)[..] {
            tries.push((now - NOW).as_secs());
            let key = RunKey { generation: Generation(1 + tries.len() as u32), ..KEY };
            if tries.len() == 6 {
                tell(&mut core, CoreEvent::RunOpened { key }, now);
                break;
            }
            let told = notices(&actions).iter().filter(|text| text.contains("thesis.tex is in the way")).count();
            assert_eq!(told, usize::from(tries.len() == 2), "it is told once, when it is tried again");
            let reason = "/runs/x/thesis.tex is in the way".to_owned();
            actions = tell(&mut core, CoreEvent::RunNotOpened { key, reason, by: FailedBy::Input }, now);
            actions = load(&mut core, actions, 3, now);
            assert_eq!(waits_for(&core), "its files cannot be written: /runs/x/thesis.tex is in the way");
            continue;
        }
        now += Duration::from_secs(1);
        actions = tick(&mut core, now);
    }
    let pauses: Vec<u64> = tries.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(pauses, [2, 4, 8, 16, 30], "less and less often");
    assert_eq!(state(&core, 1), JobState::Preparing);
}

#[test]
fn a_process_that_is_started_again_is_waited_for() {
    let mut core = at_step(3);
    let actions = tell(&mut core, left(2), NOW);
    load(&mut core, actions, 3, NOW);
    let actions = join(&mut core, 3, "b");
    assert_eq!(assigned(&actions), [(1, 3), (3, 3)]);
}

/// An asked-for number of CompNodes is what a job would like; what it must have is said apart.
#[test]
fn a_job_goes_on_with_no_fewer_compnodes_than_it_must_have() {
    for (least, expected) in [(1, vec![(1, 0)]), (2, vec![])] {
        let mut core = running_with(&["placement.compnodes=2", &format!("survive.min_compnodes={least}")]);
        let actions = tell(&mut core, left(2), NOW);
        load(&mut core, actions, 0, NOW);
        let actions = tick(&mut core, NOW + AFTER_RESTART);
        assert_eq!(assigned(&actions), expected);
    }
}

#[test]
fn what_always_fails_at_the_same_step_fails() {
    let mut core = running();
    let mut key = KEY;
    for time in 1..=4 {
        let failed = FromCompNode::Failed { key, reason: "no memory".to_owned(), bad_input: false };
        let actions = say(&mut core, 2, failed);
        if time == 4 {
            break;
        }
        let actions = load(&mut core, actions, 0, NOW);
        assert_eq!(assigned(&actions), [(1, 0), (2, 0)], "all are still there");
        key = RunKey { generation: Generation(key.generation.0 + 1), ..KEY };
        for connection in [1, 2] {
            say(&mut core, connection, ready(key));
        }
    }
    let reason = failure(&core);
    assert!(
        reason.starts_with("CompNode `b`: no memory; so it was 4 times at this step; `fusionllm resume 1`"),
        "{reason}"
    );
    // Whoever resumes it by hand starts counting anew.
    let spec = core.record(JobId(1)).unwrap().spec.clone();
    let actions = core.resume(JobId(1), spec.clone(), start(&spec, 0), None, NOW).unwrap();
    measure(&mut core, actions);
    let key = RunKey { generation: Generation(key.generation.0 + 1), ..KEY };
    say(&mut core, 2, FromCompNode::Failed { key, reason: "no memory".to_owned(), bad_input: false });
    assert!(matches!(state(&core, 1), JobState::Waiting { .. }));
}

/// What the rest cannot hold waits for another machine; it has been right before.
#[test]
fn a_job_that_does_not_fit_on_the_rest_waits() {
    let by_memory = ["placement.strategy=op-fence", "placement.recompute=never"];
    let (_, alone) = submit(&mut core(1), &by_memory);
    let planned = |(_, message): (u64, &FromBroker)| match message {
        FromBroker::Assign(assignment) => Some(assignment.planned_bytes),
        _ => None,
    };
    let needed = sent(&alone).into_iter().find_map(planned).unwrap();
    let mut core = core(2);
    for connection in [1, 2] {
        say(&mut core, connection, FromCompNode::Room { bytes: needed - 1 });
    }
    submit(&mut core, &by_memory);
    for connection in [1, 2] {
        say(&mut core, connection, ready(KEY));
    }
    assert_eq!(state(&core, 1), JobState::Running);
    let actions = tell(&mut core, left(2), NOW);
    load(&mut core, actions, 3, NOW);
    let actions = tick(&mut core, NOW + AFTER_RESTART);
    assert_eq!(assigned(&actions), []);
    let reason = waits_for(&core);
    assert!(reason.starts_with("it waits for more CompNodes: ") || reason.contains("needs at least"), "{reason}");
    let actions = tick(&mut core, NOW + AFTER_RESTART + Duration::from_secs(1));
    assert!(actions.is_empty(), "it is not tried again and again: {actions:?}");
    join(&mut core, 3, "c");
    let actions = tick(&mut core, NOW + AFTER_RESTART + Duration::from_secs(2));
    assert_eq!(assigned(&actions).len(), 2, "{actions:?}");
}

#[test]
fn a_restarted_broker_takes_its_jobs_back() {
    let record = JobRecord { step: 5, members: 2, ..at_step(5).record(JobId(1)).unwrap().clone() };
    let (mut core, actions) = Core::restore(
        vec![Restored {
            record,
            reached: Some((5, 1.5)),
            gone_for: Duration::ZERO,
            checkpoint: Some(3),
            placement: None,
        }],
        ResumedBy::default(),
    );
    let actions = measure(&mut core, actions);
    let told =
        "the broker restarted after step 5; the job goes on from the checkpoint of step 3, 2 steps are done again";
    assert_eq!(waits_for(&core), "the broker restarted after step 5");
    load(&mut core, actions, 3, NOW);
    assert_eq!(assigned(&join(&mut core, 1, "a")), [], "the other one may be on its way");
    let actions = join(&mut core, 2, "b");
    assert_eq!(assigned(&actions), [(1, 3), (2, 3)]);
    assert!(notices(&actions).contains(&told.to_owned()));
}

#[test]
fn a_compnode_that_stays_away_from_a_restarted_broker_is_done_without() {
    let state = JobState::Waiting { reason: "1 of 2 CompNodes are there".to_owned() };
    let record = JobRecord { state, members: 2, ..at_step(5).record(JobId(1)).unwrap().clone() };
    let (mut core, actions) = Core::restore(
        vec![Restored { record, reached: None, gone_for: Duration::ZERO, checkpoint: Some(3), placement: None }],
        ResumedBy::default(),
    );
    load(&mut core, actions, 3, NOW);
    assert_eq!(assigned(&join(&mut core, 1, "a")), []);
    assert_eq!(assigned(&tick(&mut core, RETURN + Duration::from_secs(1))), [(1, 3)]);
}

fn hears_of(core: &mut Core, peer: u32, ago_s: f64, now: Duration) {
    let message = FromCompNode::PeerHeard { key: KEY, peer: NodeIndex(peer), ago_s };
    tell(core, CoreEvent::Said { connection: ConnectionId(1), message, at: now }, now);
}

/// Seconds pass, in which CompNode `a` alone gives signs of life. Gives what `a` was asked in them.
fn only_a_speaks(core: &mut Core, seconds: std::ops::Range<u64>) -> Vec<Action> {
    let mut actions = Vec::new();
    for second in seconds {
        let now = NOW + Duration::from_secs(second);
        let message = FromCompNode::Heartbeat { number: second };
        tell(core, CoreEvent::Said { connection: ConnectionId(1), message, at: now }, now);
        actions.extend(tell(core, CoreEvent::Tick, now));
    }
    actions
}

fn asks_about_b(actions: &[Action]) -> usize {
    let question = FromBroker::CheckPeer { key: KEY, peer: NodeIndex(1) };
    sent(actions).iter().filter(|(to, message)| *to == 1 && **message == question).count()
}

#[test]
fn a_compnode_of_which_nobody_hears_is_lost_soon() {
    let mut core = at_step(3);
    assert_eq!(asks_about_b(&only_a_speaks(&mut core, 0..3)), 0);
    assert_eq!(asks_about_b(&only_a_speaks(&mut core, 3..4)), 1);
    assert_eq!(state(&core, 1), JobState::Running);
    hears_of(&mut core, 1, 3.2, NOW + Duration::from_secs(3));
    let actions = only_a_speaks(&mut core, 4..5);
    let JobState::Waiting { reason } = &states(&actions)[0] else { panic!("{actions:?}") };
    assert!(reason.contains("no sign of life for 4.0 s, nor do its peers hear of it"), "{reason}");
}

/// Its connection to the broker is what is broken.
#[test]
fn a_compnode_of_which_others_hear_has_its_lease() {
    let mut core = at_step(3);
    for second in 0..LEASE.as_secs() {
        only_a_speaks(&mut core, second..second + 1);
        hears_of(&mut core, 1, 0.4, NOW + Duration::from_secs(second));
        assert_eq!(state(&core, 1), JobState::Running, "after {second} s");
    }
    // Nobody who could be asked: it might be the broker that is cut off.
    let mut core = at_step(3);
    for second in 0..LEASE.as_secs() {
        let actions = tell(&mut core, CoreEvent::Tick, NOW + Duration::from_secs(second));
        assert_eq!((sent(&actions), state(&core, 1)), (vec![], JobState::Running), "after {second} s");
    }
}

/// To wait is cheaper than to do many steps again.
#[test]
fn a_silent_compnode_is_waited_for_as_long_as_its_loss_would_cost() {
    let mut core = running();
    for number in 1..=2 {
        for connection in [1, 2] {
            let report = StepReport { step_s: 6.0, ..report(number, Some(1.0)) };
            say(&mut core, connection, FromCompNode::Step { key: KEY, report });
        }
    }
    for second in 0..12 {
        only_a_speaks(&mut core, second..second + 1);
        hears_of(&mut core, 1, second as f64, NOW + Duration::from_secs(second));
        assert_eq!(state(&core, 1), JobState::Running, "after {second} s");
    }
    only_a_speaks(&mut core, 12..14);
    assert!(matches!(state(&core, 1), JobState::Waiting { .. }));
}

/// An address that a router gives anew must not cost the connections between CompNodes.
#[test]
fn a_compnode_that_comes_back_elsewhere_is_told_of() {
    let mut core = at_step(3);
    let broken = CoreEvent::Broken { connection: ConnectionId(2), reason: "gone".to_owned() };
    tell(&mut core, broken, NOW);
    let there = PeerRecord { id: [7; 32], addrs: vec!["10.0.0.9:7711".parse().unwrap()] };
    let (_, actions) = core.rejoin(ConnectionId(2), Joining { addr: there.clone(), ..joining("b") }, NOW).unwrap();
    let moved = FromBroker::PeerMoved { key: KEY, peer: NodeIndex(1), addr: there.clone() };
    assert_eq!(sent(&actions), [(1, &moved)]);
    let (_, actions) = core.rejoin(ConnectionId(2), Joining { addr: there, ..joining("b") }, NOW).unwrap();
    assert_eq!(sent(&actions), []);
}

/// The first to come back is not who has the data, only because it is the first.
#[test]
fn the_data_stays_with_who_has_read_it() {
    let mut core = at_step(5);
    let actions = tell(&mut core, left(1), NOW);
    load(&mut core, actions, 3, NOW);
    let actions = tick(&mut core, NOW + AFTER_RESTART);
    assert_eq!(assigned(&actions), []);
    assert_eq!(waits_for(&core), "CompNode `a`, the data's owner, has not joined; joined are `b`");
    let actions = join(&mut core, 3, "a");
    let actions = if assigned(&actions).is_empty() { tick(&mut core, NOW + AFTER_RESTART) } else { actions };
    let nodes = sent(&actions).into_iter().filter_map(|(to, message)| match message {
        FromBroker::Assign(assignment) => Some((to, assignment.node)),
        _ => None,
    });
    assert_eq!(nodes.collect::<Vec<_>>()[0], (3, NodeIndex(0)));
}

/// All is done but that the broker checks the last checkpoint.
#[test]
fn who_leaves_after_the_last_shard_costs_nothing() {
    let mut core = running();
    for number in 1..=6 {
        for connection in [1, 2] {
            say(&mut core, connection, step(KEY, number, Some(1.0)));
        }
    }
    for (connection, node) in [(1, 0), (2, 1)] {
        let stored =
            |step| CoreEvent::ShardStored { key: KEY, step, node: NodeIndex(node), shard: StoredShard::default() };
        tell(&mut core, stored(3), NOW);
        tell(&mut core, stored(6), NOW);
        say(&mut core, connection, FromCompNode::Finished { key: KEY });
    }
    tell(&mut core, left(2), NOW);
    assert_eq!(state(&core, 1), JobState::Running);
    for step in [3, 6] {
        let (path, checksum) = (PathBuf::from("/c"), "c".to_owned());
        tell(&mut core, CoreEvent::CheckpointFinished { key: KEY, step, path, checksum }, NOW);
    }
    assert_eq!(state(&core, 1), JobState::Done);
}

/// What it began with is more than its own folder has: another run's checkpoint, a tokenizer.
#[test]
fn a_job_without_a_checkpoint_starts_again_where_it_started() {
    let mut core = core(2);
    let spec = testing::spec(&[]);
    let actions = core.submit(spec.clone(), start(&spec, 2), PathBuf::from("/runs/x"), NOW).unwrap().1;
    measure(&mut core, actions);
    for connection in [1, 2] {
        say(&mut core, connection, ready(KEY));
    }
    core.jobs.get_mut(&JobId(1)).unwrap().run.as_mut().unwrap().checkpoint = None;
    let actions = tell(&mut core, left(2), NOW);
    assert!(!actions.iter().any(|action| matches!(action, Action::Load(_))));
    assert_eq!(assigned(&tick(&mut core, NOW + AFTER_RESTART)), [(1, 2)]);
}

#[test]
fn a_start_that_was_read_for_an_earlier_loss_is_not_taken() {
    let mut core = at_step(5);
    let first = tell(&mut core, left(2), NOW);
    core.stop(JobId(1), NOW).unwrap();
    let spec = core.record(JobId(1)).unwrap().spec.clone();
    core.resume(JobId(1), spec.clone(), start(&spec, 3), Some(3), NOW).unwrap();
    load(&mut core, first, 0, NOW);
    assert_eq!(core.record(JobId(1)).unwrap().step, 3);
}

/// The first that waits is the one that has just lost a machine.
#[test]
fn a_job_behind_does_not_take_the_machines_of_one_that_recovers() {
    let mut core = at_step(5);
    submit(&mut core, &[]);
    let actions = tell(&mut core, left(2), NOW);
    let actions = load(&mut core, actions, 3, NOW);
    assert_eq!(assigned(&actions), []);
    let actions = tick(&mut core, NOW + AFTER_RESTART);
    assert_eq!(assigned(&actions), [(1, 3)]);
    assert!(matches!(state(&core, 2), JobState::Waiting { .. }));
}

/// It comes back before the one that it was counts as lost.
#[test]
fn a_process_that_is_started_again_has_its_name_back() {
    let mut core = at_step(5);
    join(&mut core, 3, "a");
    assert_eq!(core.compnodes.name(ConnectionId(3)), "a-2");
    let actions = tell(&mut core, left(1), NOW);
    assert_eq!(core.compnodes.name(ConnectionId(3)), "a");
    let actions = load(&mut core, actions, 3, NOW);
    assert!(assigned(&actions).contains(&(3, 3)), "{}", waits_for(&core));
}

/// Machines cloned from one image all ask for the same name.
#[test]
fn another_machine_does_not_inherit_the_name_of_who_has_the_data() {
    let elsewhere = |ip: &str, host: &str| {
        let mut joining = joining("a");
        joining.profile.host = host.to_owned();
        joining.addr.addrs = vec![format!("{ip}:7711").parse().unwrap()];
        joining
    };
    let mut core = at_step(5);
    let (name, actions) = core.join(ConnectionId(3), elsewhere("10.0.0.9", "a-2f"), NOW);
    measure(&mut core, actions);
    assert_eq!(name, "a-2");
    let actions = tell(&mut core, left(1), NOW);
    assert_eq!(core.compnodes.name(ConnectionId(3)), "a-2");
    load(&mut core, actions, 3, NOW);
    assert_eq!(assigned(&tick(&mut core, NOW + AFTER_RESTART)), []);
    assert_eq!(waits_for(&core), "CompNode `a`, the data's owner, has not joined; joined are `b`, `a-2`");
    // The machine itself was started again: only its address is the same.
    let (_, actions) = core.join(ConnectionId(4), elsewhere("10.0.0.7", "a-30"), NOW);
    measure(&mut core, actions);
    let (name, actions) = core.join(ConnectionId(5), elsewhere("10.0.0.7", "a-31"), NOW);
    measure(&mut core, actions);
    assert_ne!(name, "a");
    core.lost("a", "its machine ended", NOW);
    assert_eq!(core.compnodes.name(ConnectionId(5)), "a");
}

/// Nobody is left to say that they hear nothing, but each process is there again: no lease need be waited for.
#[test]
fn processes_that_were_all_started_again_are_known_by_those_in_their_places() {
    let mut core = at_step(5);
    let second = Duration::from_secs;
    for (connection, name) in [(3, "a"), (4, "b")] {
        let (_, actions) = core.join(ConnectionId(connection), joining(name), NOW + second(2));
        measure_at(&mut core, actions, NOW + second(2));
    }
    for after in [3, 4, 5] {
        for connection in [3, 4] {
            core.compnodes.seen(ConnectionId(connection), NOW + second(after));
        }
        let actions = core.handle(CoreEvent::Tick, NOW + second(after));
        let actions = measure_at(&mut core, actions, NOW + second(after));
        load(&mut core, actions, 3, NOW + second(after));
    }
    let names: Vec<String> = core.status().compnodes.into_iter().map(|compnode| compnode.name).collect();
    assert_eq!(names, ["a", "b"], "the others are gone, and their names are given back");
    assert_eq!(state(&core, 1), JobState::Preparing);
}
