//! A restarted broker takes a job back as it is.

use super::recovery::{load, notices, tick, waits_for};
use super::*;
use crate::run_dir::PlacementFile;

/// A CompNode, by connection, that joins a broker and says that.
fn comes(core: &mut Core, connection: u64, name: &str, standing: Option<Standing>) -> Vec<Action> {
    let joining = Joining { key: [connection as u8 % 10; 32], standing, ..joining(name) };
    let (_, actions) = core.join(ConnectionId(connection), joining, NOW);
    measure(core, actions)
}

/// The broker is killed after it has written five steps of a job on CompNodes `a` and `b`, of which one has a checkpoint.
struct Killed {
    record: JobRecord,
    placement: PlacementFile,
}

fn killed(overrides: &[&str]) -> Killed {
    let mut core = Core::default();
    for (connection, name) in [(1, "a"), (2, "b")] {
        comes(&mut core, connection, name, None);
    }
    let spec = testing::spec(&[&["train.steps=40", "checkpoint.every=3"], overrides].concat());
    let start = start(&spec, 0);
    let (_, actions) = core.submit(spec, start, PathBuf::from("/runs/x"), NOW).unwrap();
    let placement = measure(&mut core, actions).into_iter().find_map(|action| match action {
        Action::OpenRun(open) => Some(open.placement),
        _ => None,
    });
    for connection in [1, 2] {
        say(&mut core, connection, ready(KEY));
    }
    for number in 1..=5 {
        for connection in [1, 2] {
            say(&mut core, connection, step(KEY, number, Some(1.0)));
        }
    }
    let record = core.record(JobId(1)).unwrap().clone();
    // As it comes out of the store, which has what it is at work with in a table of its own.
    let read: JobRecord = serde_json::from_slice(&serde_json::to_vec(&record).unwrap()).unwrap();
    Killed { record: JobRecord { work: record.work, ..read }, placement: placement.unwrap() }
}

impl Killed {
    /// What a broker finds that is started again.
    fn restored(&self) -> Restored {
        Restored {
            record: self.record.clone(),
            reached: Some((5, 1.5)),
            gone_for: Duration::from_secs(7),
            checkpoint: Some(3),
            placement: Some(self.placement.clone()),
        }
    }

    /// The broker is there again, and has read what the job starts from.
    fn restart(self) -> Core {
        let (mut core, actions) = Core::restore(vec![self.restored()], ResumedBy::default());
        let actions = measure(&mut core, actions);
        load(&mut core, actions, 3, NOW);
        core
    }

    /// The same, where what it starts from is not there any more.
    fn restart_without_checkpoint(self) -> Core {
        let restored = Restored { checkpoint: None, ..self.restored() };
        let (mut core, actions) = Core::restore(vec![restored], ResumedBy::default());
        let actions = measure(&mut core, actions);
        let (job, number) = loading(&actions).unwrap();
        let unread = Unread { reason: "it is gone".to_owned(), bad_input: true };
        let start = StartPoint { unread: Some(unread), ..start(&self.record.spec, 0) };
        core.handle(CoreEvent::Loaded { job, number, result: Box::new(Ok(start)) }, NOW);
        core
    }

    /// What a CompNode says that has done so many steps.
    fn standing(&self, done: u64) -> Standing {
        let placement = self.record.placed.clone().unwrap().placement;
        Standing { key: KEY, placement, kept_from: 4, done, settled: 3, halts: false }
    }
}

fn is_aborted(actions: &[Action], to: u64) -> bool {
    let is_of_job = |message: &FromBroker| matches!(message, FromBroker::Abort { key, .. } if key.job == KEY.job);
    sent(actions).iter().any(|(who, message)| *who == to && is_of_job(message))
}

/// What is asked to be read: of which job, and by which number.
fn loading(actions: &[Action]) -> Option<(JobId, u64)> {
    actions.iter().find_map(|action| match action {
        Action::Load(loading) => Some((loading.record.job, loading.number)),
        _ => None,
    })
}

fn opened(actions: &[Action]) -> Option<u64> {
    actions.iter().find_map(|action| match action {
        Action::OpenRun(open) => Some(open.start_step),
        _ => None,
    })
}

#[test]
fn a_job_whose_compnodes_are_all_at_work_goes_on_as_it_is() {
    let killed = killed(&[]);
    let (a, b) = (killed.standing(9), killed.standing(8));
    let mut core = killed.restart();
    assert_eq!(opened(&comes(&mut core, 11, "a", Some(a))), None);
    assert_eq!(waits_for(&core), "its CompNodes may still be at work: 1 of 2 are back");
    // A stranger does not get in between.
    comes(&mut core, 13, "c", None);
    let actions = comes(&mut core, 12, "b", Some(b));
    assert_eq!(opened(&actions), Some(5), "nothing that is written is dropped");
    let back = FromBroker::TakenBack { key: KEY, recorded: 5 };
    assert_eq!(sent(&actions), [(11, &back), (12, &back)]);
    assert_eq!(states(&actions).last(), Some(&JobState::Running));
    let told = notices(&actions);
    assert!(told[0].starts_with("the broker restarted after step 5: ") && told.len() == 1, "{told:?}");
    assert_eq!(core.record(JobId(1)).unwrap().step, 5);

    let mut written = Vec::new();
    for number in 6..=9 {
        for connection in [11, 12] {
            written.extend(say(&mut core, connection, step(KEY, number, Some(1.0))));
        }
    }
    let lines = written.iter().filter_map(|action| match action {
        Action::AppendMetrics { metrics, .. } => Some(metrics),
        _ => None,
    });
    let lines: Vec<_> = lines.collect();
    assert_eq!(lines.iter().map(|line| line.step).collect::<Vec<_>>(), [6, 7, 8, 9]);
    let [recovery] = &lines[0].recoveries[..] else { panic!("{lines:?}") };
    let told = (recovery.kind, recovery.lost_steps, recovery.compnodes, recovery.total_s());
    assert_eq!(told, (fusionllm_protocol::Fault::BrokerRestart, 0, 2, 0.0), "it did not stand still");
    // The next checkpoint comes as if nothing had been.
    for node in [0, 1] {
        let shard = StoredShard::default();
        written = tell(&mut core, CoreEvent::ShardStored { key: KEY, step: 6, node: NodeIndex(node), shard }, NOW);
    }
    assert!(written.iter().any(|action| matches!(action, Action::FinishCheckpoint { .. })), "{written:?}");
    // What happens later is dealt with as ever.
    let actions = tell(&mut core, recovery::left(12), NOW);
    assert!(is_aborted(&actions, 11), "{actions:?}");
    assert_eq!(core.record(JobId(1)).unwrap().placed, None);
}

#[test]
fn who_has_other_names_by_now_has_the_ones_of_the_placement() {
    let killed = killed(&[]);
    let (a, b) = (killed.standing(9), killed.standing(8));
    let mut core = killed.restart();
    comes(&mut core, 13, "b", Some(Standing { key: RunKey { job: JobId(7), ..KEY }, ..a.clone() }));
    comes(&mut core, 12, "x", Some(b));
    let joined = Joining { key: [1; 32], standing: Some(a), ..joining("b") };
    let (name, _) = core.join(ConnectionId(11), joined, NOW);
    let names: Vec<String> = [11, 12, 13].map(|c| core.compnodes.name(ConnectionId(c))).to_vec();
    assert_eq!((name.as_str(), &names[..2]), ("a", &["a".to_owned(), "b".to_owned()][..]), "{names:?}");
}

#[test]
fn what_does_not_fit_what_is_written_is_dropped_and_the_job_is_placed_anew() {
    let says = |change: &dyn Fn(&mut Standing)| {
        let killed = killed(&[]);
        let (mut a, b) = (killed.standing(9), killed.standing(9));
        change(&mut a);
        let mut core = killed.restart();
        comes(&mut core, 12, "b", Some(b));
        let mut actions = comes(&mut core, 11, "a", Some(a));
        assert!(is_aborted(&actions, 11) && is_aborted(&actions, 12));
        actions.extend(tick(&mut core, NOW));
        let told = notices(&actions);
        let told = told.iter().find(|text| text.starts_with("the broker restarted after step 5, and "));
        assert_eq!(state(&core, 1), JobState::Preparing);
        assert_eq!(core.record(JobId(1)).unwrap().generation, Generation(2));
        told.unwrap().clone()
    };
    let told = says(&|standing| standing.placement = "another".to_owned());
    let on = "is at work on another placement; the job goes on from the checkpoint of step 3, 2 steps are done again";
    assert!(told.ends_with(on), "{told}");
    says(&|standing| standing.key.generation = Generation(4));
    assert!(says(&|standing| standing.done = 4).contains("has done fewer steps than are written"));
    // The other one has done nine, and has not kept the reports of all of them.
    let far = says(&|standing| (standing.kept_from, standing.done) = (12, 12));
    assert!(far.contains("not at the same step"), "{far}");
    assert!(says(&|standing| standing.halts = true).contains("stands still"));
    assert!(says(&|standing| (standing.done, standing.settled) = (40, 40)).contains("the last checkpoint"));
    for (done, settled) in [(41, 3), (9, 10), (u64::MAX, 3)] {
        assert!(says(&|standing| (standing.done, standing.settled) = (done, settled)).contains("where it cannot be"));
    }
}

#[test]
fn a_compnode_that_has_failed_or_was_started_again_or_goes_again_ends_the_wait() {
    let gone = |ends: &dyn Fn(&mut Core) -> Vec<Action>, why: &str| {
        let killed = killed(&[]);
        let b = killed.standing(9);
        let mut core = killed.restart();
        comes(&mut core, 12, "b", Some(b));
        let actions = ends(&mut core);
        let waits = states(&actions);
        let JobState::Waiting { reason } = &waits[0] else { panic!("{waits:?}") };
        assert!(reason.contains(why), "{reason}");
        assert_eq!(core.record(JobId(1)).unwrap().placed, None);
        actions
    };
    let actions = gone(&|core| comes(core, 11, "a", None), "`a` is at work on it no more");
    assert!(is_aborted(&actions, 12));
    let actions = gone(&|core| comes(core, 14, "a", None), "`a` was started again, too");
    assert!(is_aborted(&actions, 12));
    gone(&|core| tell(core, recovery::left(12), NOW), "`b` vanished: its process ended");
    let failed = FromCompNode::Failed { key: KEY, reason: "no memory".to_owned(), bad_input: false };
    gone(&|core| say(core, 12, failed.clone()), "`b`: no memory");
    let actions = gone(&|core| tick(core, Duration::from_secs(31)), "`a` did not come back in 30 s");
    assert!(is_aborted(&actions, 12));
    // A process of that name on another machine is another one.
    let killed = killed(&[]);
    let (a, b) = (killed.standing(9), killed.standing(9));
    let mut core = killed.restart();
    let mut elsewhere = Joining { key: [9; 32], ..joining("a") };
    elsewhere.profile.host = "elsewhere".to_owned();
    core.join(ConnectionId(19), elsewhere, NOW);
    comes(&mut core, 12, "b", Some(b));
    assert_eq!(opened(&comes(&mut core, 11, "a", Some(a))), Some(5));
}

#[test]
fn a_broker_that_is_killed_twice_still_takes_its_job_back() {
    let before = killed(&[]);
    let (a, b, placement) = (before.standing(9), before.standing(9), before.placement.clone());
    let once = before.restart();
    let waiting = once.record(JobId(1)).unwrap().clone();
    assert!(matches!(waiting.state, JobState::Waiting { .. }));
    let mut core = Killed { record: waiting, placement }.restart();
    comes(&mut core, 11, "a", Some(a));
    assert_eq!(opened(&comes(&mut core, 12, "b", Some(b))), Some(5));
    assert_eq!(state(&core, 1), JobState::Running);
}

/// All steps are done and written: only the last checkpoint is still to come.
#[test]
fn the_end_that_came_meanwhile_is_not_lost() {
    let killed = killed(&["train.steps=5"]);
    let (a, b) = (killed.standing(5), killed.standing(5));
    let mut core = killed.restart();
    comes(&mut core, 11, "a", Some(a));
    comes(&mut core, 12, "b", Some(b));
    for connection in [11, 12] {
        say(&mut core, connection, FromCompNode::Finished { key: KEY });
    }
    for node in [0, 1] {
        let kind = BlobKind::Shard { step: 5, node: NodeIndex(node) };
        let header = BlobHeader { key: KEY, kind, bytes: 1 };
        assert_eq!(core.wants_shard(ConnectionId(u64::from(node) + 11), &header), Ok(true));
        let shard = StoredShard::default();
        tell(&mut core, CoreEvent::ShardStored { key: KEY, step: 5, node: NodeIndex(node), shard }, NOW);
    }
    let checksum = "c5".to_owned();
    let finished = CoreEvent::CheckpointFinished { key: KEY, step: 5, path: PathBuf::from("/c"), checksum };
    assert_eq!(states(&tell(&mut core, finished, NOW)), [JobState::Done]);
}

/// Reports and shards come by different streams: a shard may be there before the reports of all steps before it.
#[test]
fn a_shard_that_comes_before_what_is_told_again_is_wanted() {
    let killed = killed(&["train.steps=4000"]);
    let (a, b) = (killed.standing(3000), killed.standing(3000));
    let mut core = killed.restart();
    comes(&mut core, 11, "a", Some(a));
    comes(&mut core, 12, "b", Some(b));
    let wants = |step| {
        let header = BlobHeader { key: KEY, kind: BlobKind::Shard { step, node: NodeIndex(1) }, bytes: 1 };
        core.wants_shard(ConnectionId(12), &header).unwrap()
    };
    assert!(wants(6) && wants(3003) && !wants(3900));
}

/// Of a checkpoint of which a broker had stored a part, the rest does not come again.
#[test]
fn a_checkpoint_that_was_half_there_is_given_up() {
    let killed = killed(&[]);
    let (a, b) = (Standing { settled: 6, ..killed.standing(9) }, killed.standing(9));
    let mut core = killed.restart();
    comes(&mut core, 11, "a", Some(a));
    let told = notices(&comes(&mut core, 12, "b", Some(b)));
    assert_eq!(told[1], "there is no checkpoint of step 6: the broker ended before it was whole");
    for number in 6..=9 {
        for connection in [11, 12] {
            say(&mut core, connection, step(KEY, number, Some(1.0)));
        }
    }
    let wants = |step| {
        let header = BlobHeader { key: KEY, kind: BlobKind::Shard { step, node: NodeIndex(1) }, bytes: 1 };
        core.wants_shard(ConnectionId(12), &header).unwrap()
    };
    assert!(!wants(6) && wants(9));
}

#[test]
fn a_broker_says_how_much_is_written_and_asks_for_no_snapshot_before_it_knows_how_far_all_are() {
    let killed = killed(&["survive.every=2"]);
    let (a, b) = (killed.standing(9), killed.standing(9));
    let mut core = killed.restart();
    comes(&mut core, 11, "a", Some(a));
    comes(&mut core, 12, "b", Some(b));
    let mut asked = Vec::new();
    for number in 6..=9 {
        let mut has_asked = false;
        for connection in [11, 12] {
            let actions = say(&mut core, connection, step(KEY, number, Some(1.0)));
            has_asked |= sent(&actions).iter().any(|(_, message)| matches!(message, FromBroker::Snapshot { .. }));
        }
        asked.push(has_asked);
    }
    assert_eq!(asked, [false, false, false, true]);
    tell(&mut core, CoreEvent::Recorded { key: KEY, step: 8 }, NOW);
    let answer = say(&mut core, 11, FromCompNode::Heartbeat { number: 1 });
    let acks = |(_, message): &(u64, &FromBroker)| {
        matches!(message, FromBroker::HeartbeatAck { recorded: Some((KEY, 8)), .. })
    };
    assert!(sent(&answer).iter().any(acks), "{answer:?}");
}

/// Others have removed lines that were written, or the whole file: the steps are done all the same.
#[test]
fn where_only_figures_are_missing_nothing_is_done_again() {
    let killed = killed(&[]);
    let (a, b) = (Standing { kept_from: 7, ..killed.standing(9) }, killed.standing(8));
    let mut core = killed.restart();
    comes(&mut core, 11, "a", Some(a));
    let actions = comes(&mut core, 12, "b", Some(b));
    assert_eq!(opened(&actions), Some(6), "those of step 6 are not to be had any more");
    let back = FromBroker::TakenBack { key: KEY, recorded: 6 };
    assert_eq!(sent(&actions), [(11, &back), (12, &back)]);
    assert_eq!(state(&core, 1), JobState::Running);
}

#[test]
fn a_job_of_which_no_checkpoint_is_left_is_taken_back_and_goes_on_with_snapshots_if_there_are_any() {
    let killed = killed(&["placement.compnodes=2"]);
    let (a, b) = (killed.standing(9), killed.standing(9));
    let gone = JobRecord { checkpoint: Some((3, "c3".to_owned())), ..killed.record };
    let mut core = Killed { record: gone, ..killed }.restart_without_checkpoint();
    comes(&mut core, 11, "a", Some(a));
    let actions = comes(&mut core, 12, "b", Some(b));
    assert_eq!((opened(&actions), state(&core, 1)), (Some(5), JobState::Running));
    let told = notices(&actions);
    assert_eq!(
        told[1],
        "the checkpoint of step 3 is not there any more: training goes on, and there is no other one yet"
    );
    assert_eq!(told.len(), 2, "{told:?}");
    // Without snapshots there is nothing to go on from.
    tell(&mut core, recovery::left(12), NOW);
    let JobState::Failed { reason, bad_input: true } = state(&core, 1) else { panic!("{:?}", state(&core, 1)) };
    assert_eq!(reason, "it is gone");
}

#[test]
fn a_run_whose_files_cannot_be_written_waits_and_its_compnodes_train_on() {
    let killed = killed(&[]);
    let (a, b) = (killed.standing(9), killed.standing(9));
    let mut core = killed.restart();
    comes(&mut core, 11, "a", Some(a));
    let joined = Joining { key: [2; 32], standing: Some(b), ..joining("b") };
    let (_, actions) = core.join(ConnectionId(12), joined, NOW);
    assert_eq!(opened(&actions), Some(5));
    let fails = |core: &mut Core, now| {
        let reason = "/runs/x is in use by process 7".to_owned();
        let actions = tell(core, CoreEvent::RunNotOpened { key: KEY, reason, by: FailedBy::Input }, now);
        assert_eq!(sent(&actions), [], "nobody is told anything");
        let why = "its CompNodes train on, and its files cannot be written: /runs/x is in use by process 7";
        assert_eq!(waits_for(core), why);
    };
    fails(&mut core, NOW);
    let mut tries = 0;
    for second in 1..=60 {
        let now = NOW + Duration::from_secs(second);
        for connection in [11, 12] {
            core.compnodes.seen(ConnectionId(connection), now);
        }
        let actions = tell(&mut core, CoreEvent::Tick, now);
        if opened(&actions).is_some() {
            tries += 1;
            fails(&mut core, now);
        }
    }
    assert!(tries > 20, "{tries}");
    let now = NOW + Duration::from_secs(62);
    for connection in [11, 12] {
        core.compnodes.seen(ConnectionId(connection), now);
    }
    assert_eq!(opened(&tell(&mut core, CoreEvent::Tick, now)), Some(5));
    let actions = tell(&mut core, CoreEvent::RunOpened { key: KEY }, now);
    let back = FromBroker::TakenBack { key: KEY, recorded: 5 };
    assert_eq!(sent(&actions), [(11, &back), (12, &back)]);
    assert_eq!(state(&core, 1), JobState::Running);
}

#[test]
fn a_run_with_which_another_process_has_gone_on_goes_on_from_there() {
    let killed = killed(&[]);
    let (a, b) = (killed.standing(9), killed.standing(9));
    let mut core = killed.restart();
    comes(&mut core, 11, "a", Some(a));
    core.join(ConnectionId(12), Joining { key: [2; 32], standing: Some(b), ..joining("b") }, NOW);
    let reason = "another process has gone on with the run meanwhile".to_owned();
    let actions = tell(&mut core, CoreEvent::GoneOn { key: KEY, reason }, NOW);
    assert!(is_aborted(&actions, 11) && is_aborted(&actions, 12));
    assert_eq!(opened(&actions), None, "where it is now must be read first");
    let actions = load(&mut core, actions, 12, NOW);
    assert_eq!(opened(&actions), Some(12));
    let told = notices(&actions);
    let why = "the broker restarted after step 5, and another process has gone on with the run meanwhile; the job goes on \
               from the checkpoint of step 12";
    assert!(told.iter().any(|text| text == why), "{told:?}");
}

/// While somebody is at work there, what is read may be gone in a moment.
#[test]
fn a_folder_in_which_another_process_is_at_work_is_waited_for() {
    let killed = killed(&[]);
    let restored = Restored { placement: None, ..killed.restored() };
    let (mut core, actions) = Core::restore(vec![restored], ResumedBy::default());
    let actions = measure(&mut core, actions);
    let (job, number) = loading(&actions).unwrap();
    let in_use = || crate::BrokerError::InUse { path: "/runs/x".into(), holder: "process 7".to_owned() };
    let result = Box::new(Err(in_use()));
    assert_eq!(sent(&tell(&mut core, CoreEvent::Loaded { job, number, result }, NOW)), []);
    comes(&mut core, 11, "a", None);
    comes(&mut core, 12, "b", None);
    assert!(waits_for(&core).starts_with("/runs/x is in use by process 7: wait until"), "{}", waits_for(&core));
    let actions = tick(&mut core, NOW + Duration::from_secs(2));
    assert!(waits_for(&core).starts_with("/runs/x is in use by process 7"), "it says so while it looks again");
    let actions = load(&mut core, actions, 3, NOW + Duration::from_secs(2));
    assert_eq!(opened(&actions), Some(3));
}

#[test]
fn a_job_that_must_not_go_on_without_one_is_taken_back_or_fails() {
    let mortal = || killed(&["survive.enabled=false"]);
    let (a, b) = (mortal().standing(9), mortal().standing(9));
    let mut core = mortal().restart();
    comes(&mut core, 11, "a", Some(a.clone()));
    assert_eq!(opened(&comes(&mut core, 12, "b", Some(b))), Some(5));
    assert_eq!(state(&core, 1), JobState::Running);
    // A broker that was killed while it waited finds it waiting.
    let waiting = JobRecord { state: JobState::Waiting { reason: "x".to_owned() }, ..mortal().record };
    for record in [mortal().record, waiting] {
        let placement = mortal().placement;
        let mut core = Killed { record: record.clone(), placement: placement.clone() }.restart();
        comes(&mut core, 11, "a", Some(a.clone()));
        let actions = tick(&mut core, Duration::from_secs(31));
        assert!(is_aborted(&actions, 11));
        let reason = failure(&core);
        let expected = "the broker restarted after step 5, and `b` did not come back in 30 s; `fusionllm resume 1` goes on \
                        from the checkpoint of step 3";
        assert_eq!(reason, expected);
        // One with which another process has gone on cannot be taken back at all.
        let other = Restored { placement: None, ..Killed { record, placement }.restored() };
        let (core, _) = Core::restore(vec![other], ResumedBy::default());
        assert!(failure(&core).starts_with("the broker restarted after step 5; `fusionllm resume 1`"));
    }
}
