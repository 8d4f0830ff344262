//! Every transition by hand, then thousands of runs from a seed.

use std::collections::BTreeSet;

use fusionllm_planner::{LinkProfile, Measured, NodeIndex};
use fusionllm_protocol::{
    BlobHeader, BlobKind, DataFingerprint, DeviceProfile, FileFingerprint, LinkBytes, PairProfile, PeerRecord,
    StepReport, TokenizerFingerprint, content_hash,
};

use super::*;
use crate::checkpoint::{Origin, StoredShard};
use crate::run_dir::RunStart;
use crate::testing;

const NOW: Duration = Duration::from_secs(100);

fn start(spec: &JobSpec, step: u64) -> StartPoint {
    let dag = crate::model::load_model(spec).unwrap().dag;
    StartPoint {
        graph: dag.to_json(),
        dag: Arc::new(dag),
        weights: None,
        cluster: None,
        step,
        origin: Origin::default(),
        notices: Vec::new(),
        run: RunStart::new(),
    }
}

fn joining(name: &str) -> Joining {
    let addr = PeerRecord { id: [7; 32], addrs: Vec::new() };
    let profile = DeviceProfile {
        flop_per_s: 1e10,
        memory_bytes_per_s: 1e10,
        memory_bytes: None,
        host: name.to_owned(),
        cpu: None,
    };
    Joining { name: name.to_owned(), id: "0707".to_owned(), device: "cpu".to_owned(), addr, profile }
}

/// A CompNode joins and is measured. Gives what else happened.
fn join(core: &mut Core, connection: u64, name: &str) -> Vec<Action> {
    let (_, actions) = core.join(ConnectionId(connection), joining(name), NOW);
    measure(core, actions)
}

/// What a CompNode answers to a request to measure something.
fn measurement(message: &FromBroker) -> Option<FromCompNode> {
    let link = LinkProfile { latency_s: 1e-3, bytes_per_s: 1e9 };
    match message {
        FromBroker::AwaitProbe { probe, .. } => Some(FromCompNode::ProbeAwaited { probe: *probe }),
        FromBroker::Probe { probe, .. } => {
            Some(FromCompNode::Probed { probe: *probe, result: Ok(PairProfile { there: link, back: link }) })
        }
        FromBroker::MeasureOps { request, .. } => {
            Some(FromCompNode::Measured { request: *request, result: Ok(Measured::default()) })
        }
        _ => None,
    }
}

/// What CompNodes answer to what `actions` ask them to measure.
fn measurements(actions: &[Action]) -> Vec<(ConnectionId, FromCompNode)> {
    let answer = |action: &Action| match action {
        Action::Send { to, message } => measurement(message).map(|answer| (*to, answer)),
        _ => None,
    };
    actions.iter().filter_map(answer).collect()
}

/// Answers all requests to measure something, and those that follow. Gives the other actions.
fn measure(core: &mut Core, actions: Vec<Action>) -> Vec<Action> {
    let mut others = Vec::new();
    let mut queue: std::collections::VecDeque<Action> = actions.into();
    while let Some(action) = queue.pop_front() {
        match measurements(std::slice::from_ref(&action)).pop() {
            Some((connection, message)) => {
                queue.extend(core.handle(CoreEvent::Said { connection, message }, NOW));
            }
            None => others.push(action),
        }
    }
    others
}

/// A core with CompNodes `a`, `b`, ... on connections 1, 2, ...
fn core(compnodes: u64) -> Core {
    let mut core = Core::default();
    for (connection, name) in (1..=compnodes).zip('a'..) {
        join(&mut core, connection, &name.to_string());
    }
    core
}

fn submit(core: &mut Core, overrides: &[&str]) -> (JobId, Vec<Action>) {
    let spec = testing::spec(overrides);
    let start = start(&spec, 0);
    let (job, actions) = core.submit(spec, start, PathBuf::from("/runs/x"), NOW).unwrap();
    (job, measure(core, actions))
}

fn report(step: u64, loss: Option<f64>) -> StepReport {
    let (from, to, codec) = ("a".to_owned(), "b".to_owned(), "dense".to_owned());
    let link = LinkBytes { from, to, bytes: 9, dense_bytes: 9, codec, error: None };
    StepReport {
        step,
        loss,
        eval_loss: None,
        lr: 1e-3,
        grad_norm: Some(1.0),
        step_s: 0.1 * step as f64,
        busy_s: 0.1,
        live_max: 1,
        links: vec![link],
        received: Vec::new(),
        trace: None,
    }
}

const KEY: RunKey = RunKey { job: JobId(1), generation: Generation(1) };

fn say(core: &mut Core, connection: u64, message: FromCompNode) -> Vec<Action> {
    core.handle(CoreEvent::Said { connection: ConnectionId(connection), message }, NOW)
}

fn ready(key: RunKey) -> FromCompNode {
    FromCompNode::Ready { job: key.job, generation: key.generation, data: None }
}

fn step(key: RunKey, step: u64, loss: Option<f64>) -> FromCompNode {
    FromCompNode::Step { job: key.job, generation: key.generation, report: report(step, loss) }
}

fn sent(actions: &[Action]) -> Vec<(u64, &FromBroker)> {
    let message = |action| match action {
        &Action::Send { to, ref message } => Some((to.0, message)),
        _ => None,
    };
    actions.iter().filter_map(message).collect()
}

fn states(actions: &[Action]) -> Vec<JobState> {
    let state = |action: &Action| match action {
        Action::Emit(JobEvent::State { state, .. }) => Some(state.clone()),
        _ => None,
    };
    actions.iter().filter_map(state).collect()
}

fn state(core: &Core, job: u64) -> JobState {
    core.record(JobId(job)).unwrap().state.clone()
}

fn failure(core: &Core) -> String {
    match state(core, 1) {
        JobState::Failed { reason, .. } => reason,
        other => panic!("the job is {other:?}"),
    }
}

/// A job of six steps that runs on two CompNodes.
fn running() -> Core {
    let mut core = core(2);
    submit(&mut core, &[]);
    say(&mut core, 1, ready(KEY));
    say(&mut core, 2, ready(KEY));
    assert_eq!(state(&core, 1), JobState::Running);
    core
}

#[test]
fn a_job_is_assigned_started_and_done() {
    let mut core = core(2);
    let (job, actions) = submit(&mut core, &[]);
    assert_eq!(job, KEY.job);
    let position = |wanted: fn(&Action) -> bool| actions.iter().position(wanted);
    let opened = position(|a| matches!(a, Action::OpenRun(_))).unwrap();
    assert!(opened < position(|a| matches!(a, Action::Send { message: FromBroker::Assign(_), .. })).unwrap());
    let assigned: Vec<_> = sent(&actions).iter().map(|(to, m)| (*to, matches!(m, FromBroker::Assign(_)))).collect();
    assert_eq!(assigned, [(1, true), (2, true)]);

    assert_eq!(sent(&say(&mut core, 1, ready(KEY))), []);
    let actions = say(&mut core, 2, ready(KEY));
    let start = FromBroker::Start { job: KEY.job, generation: KEY.generation };
    assert_eq!(sent(&actions), [(1, &start), (2, &start)]);

    for number in 1..=6 {
        assert!(say(&mut core, 2, step(KEY, number, Some(3.0 / number as f64))).is_empty());
        let actions = say(&mut core, 1, step(KEY, number, None));
        let Action::AppendMetrics { metrics, .. } = &actions[0] else { panic!("{actions:?}") };
        assert_eq!((metrics.step, metrics.loss, metrics.tokens), (number, 3.0 / number as f64, 32));
        assert_eq!(metrics.links.len(), 2);
    }
    for connection in [1, 2] {
        let finished = FromCompNode::Finished { job: KEY.job, generation: KEY.generation };
        assert_eq!(states(&say(&mut core, connection, finished)), []);
    }
    // The two checkpoints, after steps 3 and 6, are still to come.
    for of in [3, 6] {
        for node in [0, 1] {
            let shard = StoredShard::default();
            let event = CoreEvent::ShardStored { key: KEY, step: of, node: NodeIndex(node), shard };
            let actions = core.handle(event, NOW);
            let finishing = actions.iter().find_map(|a| match a {
                Action::FinishCheckpoint { spec, .. } => Some((spec.step, spec.loss, spec.shards.len())),
                _ => None,
            });
            assert_eq!(finishing, (node == 1).then_some((of, Some(3.0 / of as f64), 2)));
        }
    }
    let finished =
        |step| CoreEvent::CheckpointFinished { key: KEY, step, path: PathBuf::from("/c"), checksum: "c5".to_owned() };
    assert_eq!(states(&core.handle(finished(3), NOW)), []);
    let actions = core.handle(finished(6), NOW);
    assert_eq!(states(&actions), [JobState::Done]);
    assert_eq!(core.record(JobId(1)).unwrap().checkpoint, Some((6, "c5".to_owned())), "it is remembered");
    assert!(actions.iter().any(|a| matches!(a, Action::WriteReport { .. })));
    assert_eq!(sent(&actions), [], "nobody is told to abort what is done");
    assert!(core.status().compnodes.iter().all(|c| c.job.is_none()));
}

#[test]
fn a_compnode_that_vanishes_fails_the_job_and_frees_the_others() {
    let mut core = running();
    for connection in [1, 2] {
        say(&mut core, connection, step(KEY, 1, Some(1.0)));
    }
    let left = CoreEvent::Left { connection: ConnectionId(2), reason: "the peer does not answer any more".to_owned() };
    let actions = core.handle(left, NOW);
    assert_eq!(
        failure(&core),
        "CompNode `b` vanished after step 1: the peer does not answer any more; \
         `fusionllm resume 1` goes on from the last checkpoint"
    );
    assert!(matches!(sent(&actions)[..], [(1, FromBroker::Abort { .. })]));
    assert_eq!(core.status().compnodes.len(), 1);
    assert_eq!(core.status().compnodes[0].job, None);
}

#[test]
fn a_silent_compnode_loses_its_lease() {
    let mut core = running();
    let almost = NOW + LEASE;
    assert!(core.handle(CoreEvent::Tick, almost).is_empty());
    let alive = CoreEvent::Said { connection: ConnectionId(1), message: FromCompNode::Heartbeat { number: 7 } };
    assert_eq!(
        sent(&core.handle(alive, almost)),
        [(1, &FromBroker::HeartbeatAck { number: 7, now_s: almost.as_secs_f64() })]
    );
    let actions = core.handle(CoreEvent::Tick, almost + Duration::from_secs(1));
    assert!(matches!(actions[0], Action::Disconnect { to: ConnectionId(2), .. }));
    assert!(failure(&core).contains("CompNode `b` vanished after step 0: no heartbeat for 15 s"));
}

#[test]
fn the_first_failure_is_the_jobs() {
    let mut core = running();
    let failed = |reason: &str, bad_input| FromCompNode::Failed {
        job: KEY.job,
        generation: KEY.generation,
        reason: reason.to_owned(),
        bad_input,
    };
    let actions = say(&mut core, 1, failed("out of memory", false));
    assert_eq!(sent(&actions).len(), 2, "{:?}", sent(&actions));
    assert!(say(&mut core, 2, failed("lost its peer", false)).is_empty());
    assert_eq!(failure(&core), "CompNode `a`: out of memory");

    let mut core = running();
    say(&mut core, 1, failed("/data: no such file", true));
    assert_eq!(state(&core, 1), JobState::Failed { reason: "/data: no such file".to_owned(), bad_input: true });
}

#[test]
fn a_loss_that_is_not_finite_ends_the_job() {
    let mut core = running();
    say(&mut core, 1, step(KEY, 1, None));
    say(&mut core, 2, step(KEY, 1, Some(f64::NAN)));
    assert!(failure(&core).starts_with("the loss is NaN at step 1 (learning rate 1.00e-3): lower train.lr"));
}

#[test]
fn what_a_user_must_see_is_kept_and_told() {
    let mut core = core(2);
    let spec = testing::spec(&[]);
    let start = StartPoint { notices: vec!["weights: new".to_owned()], ..start(&spec, 0) };
    let (_, actions) = core.submit(spec, start, PathBuf::from("/runs/x"), NOW).unwrap();
    let actions = measure(&mut core, actions);
    let noticed = |actions: &[Action]| -> (Vec<String>, Vec<String>) {
        let told = actions.iter().filter_map(|a| match a {
            Action::Emit(JobEvent::Notice { text, .. }) => Some(text.clone()),
            _ => None,
        });
        let kept = actions.iter().filter_map(|a| match a {
            Action::Notice { run_dir, notice } if *run_dir == *"/runs/x" => Some(notice.text.clone()),
            _ => None,
        });
        (kept.collect(), told.collect())
    };
    let both = |text: &str| (vec![text.to_owned()], vec![text.to_owned()]);
    assert_eq!(noticed(&actions), both("weights: new"));
    let opened = actions.iter().position(|a| matches!(a, Action::OpenRun(_)));
    assert!(opened < actions.iter().position(|a| matches!(a, Action::Notice { .. })), "the folder is there first");

    let notes = vec!["1 file was left out".to_owned()];
    let data = DataReport { files: 1, notes, ..DataReport::default() };
    let read = FromCompNode::Ready { job: KEY.job, generation: KEY.generation, data: Some(data) };
    assert_eq!(noticed(&say(&mut core, 1, read)), both("1 file was left out"));
    let note = |generation| FromCompNode::Note { job: KEY.job, generation, text: "it is hot".to_owned() };
    assert_eq!(noticed(&say(&mut core, 2, note(KEY.generation))), both("CompNode `b`: it is hot"));
    assert!(say(&mut core, 2, note(Generation(9))).is_empty(), "another placement's");
    let text = "a checkpoint could not be written".to_owned();
    let actions = core.handle(CoreEvent::Noticed { key: KEY, text: text.clone() }, NOW);
    assert_eq!(noticed(&actions), both(&text));
}

#[test]
fn data_and_tokenizer_are_held_against_those_of_the_checkpoint() {
    let tokenizer = |hash: &str| TokenizerFingerprint { name: "t.json".to_owned(), entries: 9, hash: hash.to_owned() };
    let data = |bytes: u64, hash: &str| DataFingerprint {
        files: vec![FileFingerprint { name: "a".to_owned(), bytes, train_bytes: bytes / 2, hash: bytes.to_string() }],
        count: 1,
        bytes,
        hash: bytes.to_string(),
        tokenizer: tokenizer(hash),
    };
    let read = |fingerprint: DataFingerprint| FromCompNode::Ready {
        job: KEY.job,
        generation: KEY.generation,
        data: Some(DataReport { fingerprint: Some(fingerprint), ..DataReport::default() }),
    };
    let file = "{\"model\":1}";
    let known = content_hash(file.as_bytes());
    let resumed = || {
        let mut core = core(2);
        let spec = testing::spec(&[]);
        let mut start = start(&spec, 3);
        start.origin.data = Some(data(100, &known));
        start.origin.set_tokenizer(Some(file.to_owned()));
        let (_, actions) = core.submit(spec, start, PathBuf::from("/runs/x"), NOW).unwrap();
        measure(&mut core, actions);
        core
    };
    let texts = |actions: &[Action]| -> Vec<String> {
        let text = |action: &Action| match action {
            Action::Notice { notice, .. } => Some(notice.text.clone()),
            _ => None,
        };
        actions.iter().filter_map(text).collect()
    };
    let mut core = resumed();
    assert!(texts(&say(&mut core, 1, read(data(100, &known)))).is_empty());

    let mut core = resumed();
    let told = texts(&say(&mut core, 1, read(data(200, &known))));
    assert!(
        told[0].contains("`a` has 200 bytes, had 100") && told[1].contains("held out are trained on now"),
        "{told:?}"
    );
    let origin = &core.jobs[&JobId(1)].run.as_ref().unwrap().origin;
    assert_eq!((origin.data.as_ref().unwrap().bytes, origin.tokenizer()), (200, Some(file)));

    let mut core = resumed();
    say(&mut core, 1, read(data(100, "another")));
    let expected = "is not the one that the model was trained with";
    assert!(matches!(state(&core, 1), JobState::Failed { reason, bad_input: true } if reason.contains(expected)));

    // At a beginning there is nothing to go by, and the owner's file is the one that counts.
    let mut fresh = resumed();
    fresh.jobs.get_mut(&JobId(1)).unwrap().run.as_mut().unwrap().origin.data = None;
    let told = texts(&say(&mut fresh, 1, read(data(100, "another"))));
    assert!(told[0].contains("checkpoints go without it"), "{told:?}");
    assert_eq!(fresh.jobs[&JobId(1)].run.as_ref().unwrap().origin.tokenizer(), None);
}

#[test]
fn messages_of_another_generation_are_dropped() {
    let mut core = running();
    core.stop(JobId(1), NOW).unwrap();
    let spec = core.record(JobId(1)).unwrap().spec.clone();
    core.resume(JobId(1), spec.clone(), start(&spec, 3), NOW).unwrap();
    let old = [
        ready(KEY),
        step(KEY, 4, Some(1.0)),
        FromCompNode::Finished { job: KEY.job, generation: KEY.generation },
        FromCompNode::Failed { job: KEY.job, generation: KEY.generation, reason: String::new(), bad_input: false },
    ];
    for message in old {
        assert!(say(&mut core, 1, message).is_empty());
    }
    assert_eq!(state(&core, 1), JobState::Preparing);
    let key = RunKey { generation: Generation(2), ..KEY };
    for connection in [1, 2] {
        say(&mut core, connection, ready(key));
    }
    assert!(say(&mut core, 1, step(key, 3, None)).iter().any(|a| matches!(a, Action::WriteReport { .. })));
    assert!(failure(&core).contains("reported step 3, which was not due"));
}

#[test]
fn jobs_wait_in_order_for_idle_compnodes() {
    let mut core = core(1);
    let (first, actions) = submit(&mut core, &["placement.compnodes=2"]);
    let waiting = |reason: &str| JobState::Waiting { reason: reason.to_owned() };
    assert_eq!(states(&actions), [waiting("1 of 2 CompNodes are idle")]);
    let (second, actions) = submit(&mut core, &["placement.compnodes=1"]);
    assert_eq!(states(&actions), [waiting("job 1 comes first")]);
    let actions = join(&mut core, 2, "b");
    let measuring = waiting("machines and links are being measured");
    assert_eq!(states(&actions), [measuring, JobState::Preparing, waiting("0 of 1 CompNodes are idle")]);
    let actions = core.stop(first, NOW).unwrap();
    assert_eq!(states(&actions), [JobState::Stopped, JobState::Preparing]);
    assert_eq!(core.record(second).unwrap().state, JobState::Preparing);
}

#[test]
fn the_named_owner_of_the_data_comes_first() {
    let mut core = core(1);
    submit(&mut core, &["placement.compnodes=2", "data.owner=office"]);
    assert_eq!(states(&join(&mut core, 2, "b")), [], "still waiting");
    let actions = join(&mut core, 3, "office");
    let open = actions.iter().find_map(|a| if let Action::OpenRun(open) = a { Some(open) } else { None }).unwrap();
    assert_eq!(open.placement.placement.compnodes, ["office", "a"]);
}

#[test]
fn whom_the_strategy_leaves_out_stays_idle() {
    let mut core = core(26);
    let (_, actions) = submit(&mut core, &["placement.strategy=op-fence", "placement.compnodes=26"]);
    let mut assigned = BTreeSet::new();
    for (to, message) in sent(&actions) {
        let FromBroker::Assign(assignment) = message else { panic!("{message:?}") };
        let name = &assignment.placement.compnodes[assignment.node.index()];
        assert_eq!(*name, core.compnodes.name(ConnectionId(to)), "each is told its own part");
        assigned.insert(name.clone());
    }
    assert!(!assigned.is_empty() && assigned.len() < 26, "there are fewer ops than CompNodes");
    assert_eq!(core.compnodes.idle().len(), 26 - assigned.len());
}

/// Two CompNodes on one machine, and one elsewhere.
#[test]
fn a_machine_takes_part_in_one_measurement_at_a_time() {
    let mut core = Core::default();
    let mut asked = Vec::new();
    for (connection, host) in [(1, "office"), (2, "office"), (3, "rack")] {
        let mut joining = joining(&format!("n{connection}"));
        joining.profile.host = host.to_owned();
        asked.extend(core.join(ConnectionId(connection), joining, NOW).1);
    }
    // Of three pairs one at a time, since each involves the office.
    let mut probed = Vec::new();
    while let Some((to, message)) = measurements(&asked).pop() {
        assert_eq!(sent(&asked).len(), 1, "{asked:?}");
        probed.extend(matches!(message, FromCompNode::Probed { .. }).then_some(to.0));
        asked = core.handle(CoreEvent::Said { connection: to, message }, NOW);
    }
    assert_eq!(probed, [1, 1, 2], "each pair once, by the one that joined first");
    let (inventory, actions) = core.inventory(None, None, NOW);
    assert_eq!((inventory.pending, inventory.links.len(), actions.len()), (0, 6, 0));
    let (inventory, actions) = core.inventory(Some(Duration::ZERO), None, NOW + Duration::from_secs(9));
    assert_eq!((inventory.pending, actions.len()), (3, 1), "all is due again");
}

#[test]
fn what_cannot_be_measured_holds_up_no_job() {
    let mut core = Core::default();
    core.join(ConnectionId(1), joining("a"), NOW);
    let (_, actions) = core.join(ConnectionId(2), joining("b"), NOW);
    let probe = |actions: &[Action]| measurements(actions).pop().unwrap();
    let (to, message) = probe(&actions);
    let actions = core.handle(CoreEvent::Said { connection: to, message }, NOW);
    let Some((dialler, FromCompNode::Probed { probe, .. })) = measurements(&actions).pop() else { panic!() };
    let failed = FromCompNode::Probed { probe, result: Err("no route".to_owned()) };
    core.handle(CoreEvent::Said { connection: dialler, message: failed }, NOW);
    let spec = testing::spec(&[]);
    let (_, actions) = core.submit(spec.clone(), start(&spec, 0), PathBuf::from("/runs/x"), NOW).unwrap();
    let mut asked: Vec<u64> = Vec::new();
    for (to, message) in sent(&actions) {
        let FromBroker::MeasureOps { request, .. } = message else { panic!("{message:?}") };
        asked.push(to);
        let result = Err("the device failed".to_owned());
        let message = FromCompNode::Measured { request: *request, result };
        core.handle(CoreEvent::Said { connection: ConnectionId(to), message }, NOW);
    }
    assert_eq!(asked, [1, 2]);
    assert_eq!(state(&core, 1), JobState::Preparing);
    assert_eq!(core.inventory(None, None, NOW).0.links.iter().filter(|l| l.link.is_none()).count(), 2);
}

#[test]
fn names_are_unique() {
    let mut core = core(0);
    let names: Vec<String> = (1..4).map(|c| core.join(ConnectionId(c), joining("gpu"), NOW).0).collect();
    assert_eq!(names, ["gpu", "gpu-2", "gpu-3"]);
}

#[test]
fn what_cannot_be_run_is_refused() {
    let mut core = core(1);
    let mut refusal = |overrides: &[&str], step| {
        let spec = testing::spec(overrides);
        let start = start(&spec, step);
        let error = core.submit(spec, start, PathBuf::from("/runs/x"), NOW).unwrap_err();
        assert!(error.is_bad_input());
        error.to_string()
    };
    assert!(refusal(&["placement.compnodes=1000"], 0).contains("1000 CompNodes but only"));
    assert!(refusal(&[], 6).contains("raise train.steps"));
    assert!(core.stop(JobId(9), NOW).unwrap_err().to_string().contains("no job 9"));
    submit(&mut core, &[]);
    let spec = testing::spec(&[]);
    let error = core.resume(JobId(1), spec.clone(), start(&spec, 0), NOW).unwrap_err();
    assert_eq!(error.to_string(), "job 1 is being prepared, expected a stopped or failed job");
}

#[test]
fn a_restart_fails_what_was_at_work_and_keeps_the_rest() {
    let mut core = core(1);
    submit(&mut core, &[]);
    let at_work = core.record(JobId(1)).unwrap().clone();
    let done = JobRecord { job: JobId(2), state: JobState::Done, ..at_work.clone() };
    let (mut core, actions) = Core::restore(vec![at_work, done]);
    assert_eq!(actions.len(), 1);
    assert!(failure(&core).starts_with("the broker restarted at step 0; `fusionllm resume 1`"));
    assert_eq!(state(&core, 2), JobState::Done);
    let (next, _) = submit(&mut core, &[]);
    assert_eq!(next, JobId(3));
}

#[test]
fn only_a_shard_that_is_due_is_wanted() {
    let core = running();
    let wants = |connection, node, step, generation| {
        let kind = BlobKind::Shard { step, node: NodeIndex(node) };
        let header = BlobHeader { job: KEY.job, generation: Generation(generation), kind, bytes: 1 };
        core.wants_shard(ConnectionId(connection), &header)
    };
    assert!(wants(2, 1, 3, 1));
    assert!(!wants(2, 0, 3, 1), "another CompNode's");
    assert!(!wants(2, 1, 4, 1), "no checkpoint after step 4");
    assert!(!wants(2, 1, 3, 2), "another generation's");
}

#[test]
fn training_goes_on_without_a_checkpoint_but_not_without_the_last() {
    let mut core = running();
    for number in 1..=6 {
        for connection in [1, 2] {
            say(&mut core, connection, step(KEY, number, Some(1.0)));
        }
    }
    let shard =
        |step, node| CoreEvent::ShardStored { key: KEY, step, node: NodeIndex(node), shard: StoredShard::default() };
    let failed = |step| {
        let reason = "/c: No space left on device (os error 28)".to_owned();
        CoreEvent::CheckpointFailed { key: KEY, step, reason }
    };
    core.handle(shard(3, 0), NOW);
    let actions = core.handle(failed(3), NOW);
    assert!(matches!(actions[0], Action::DropCheckpoint { step: 3, .. }), "{actions:?}");
    let told =
        |action: &Action| matches!(action, Action::Emit(JobEvent::Notice { text, .. }) if text.contains("No space"));
    assert!(actions.iter().any(told), "{actions:?}");
    assert_eq!(state(&core, 1), JobState::Running);
    // The other CompNode's shard was on its way.
    assert!(core.handle(shard(3, 1), NOW).is_empty());
    // The next one is tried again.
    core.handle(shard(6, 0), NOW);
    let actions = core.handle(shard(6, 1), NOW);
    assert!(actions.iter().any(|a| matches!(a, Action::FinishCheckpoint { .. })), "{actions:?}");
    core.handle(failed(6), NOW);
    assert_eq!(failure(&core), "checkpoint of step 6: /c: No space left on device (os error 28)");
}

/// What must hold after every event, whatever happened.
struct Watch {
    core: Core,
    last_step: BTreeMap<JobId, u64>,
    started: BTreeSet<RunKey>,
    ready: BTreeSet<(RunKey, u64)>,
    was_final: BTreeSet<JobId>,
}

impl Watch {
    /// CompNodes answer what they are asked to measure; some never do.
    fn answer(&mut self, actions: &[Action], seed: &mut u64, now: Duration) {
        let mut asked = measurements(actions);
        while let Some((connection, message)) = asked.pop() {
            if draw(seed, 20) > 0 {
                let actions = self.core.handle(CoreEvent::Said { connection, message }, now);
                self.check(&actions);
                asked.extend(measurements(&actions));
            }
        }
    }

    fn check(&mut self, actions: &[Action]) {
        for action in actions {
            match action {
                Action::Send { message: FromBroker::Start { job, generation }, .. } => {
                    let key = RunKey { job: *job, generation: *generation };
                    let run = self.core.jobs[job].run.as_ref().unwrap();
                    assert!(
                        run.members.iter().all(|m| self.ready.contains(&(key, m.0))),
                        "started before all are ready"
                    );
                    self.started.insert(key);
                }
                Action::AppendMetrics { key, metrics } => {
                    assert!(self.started.contains(key));
                    let last = self.last_step.insert(key.job, metrics.step);
                    assert_eq!(metrics.step, last.unwrap_or(0) + 1);
                }
                Action::OpenRun(open) => drop(self.last_step.insert(open.key.job, open.start_step)),
                Action::Emit(JobEvent::State { job, state }) => {
                    assert!(!self.was_final.contains(job), "{job} left a final state without a resume");
                    if state.is_final() {
                        self.was_final.insert(*job);
                    }
                }
                _ => {}
            }
        }
        let mut busy = BTreeSet::new();
        for job in self.core.jobs.values() {
            assert_eq!(job.run.is_some(), matches!(job.record.state, JobState::Preparing | JobState::Running));
            for member in job.run.iter().flat_map(|run| &run.members) {
                assert!(busy.insert(*member), "a CompNode works on two jobs");
            }
        }
        let shown = self.core.status().compnodes.iter().filter(|c| c.job.is_some()).count();
        assert_eq!(shown, busy.len());
    }
}

/// A small generator, so that a failing seed can be run again.
fn draw(seed: &mut u64, below: u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 33) % below
}

#[test]
fn no_order_of_events_breaks_the_rules() {
    let spec = testing::spec(&["placement.compnodes=2"]);
    let fresh = start(&spec, 0);
    let (mut starts, mut steps) = (0, 0);
    for run in 0..1500u64 {
        let mut seed = run;
        let mut watch = Watch {
            core: Core::default(),
            last_step: BTreeMap::new(),
            started: BTreeSet::new(),
            ready: BTreeSet::new(),
            was_final: BTreeSet::new(),
        };
        let mut now = Duration::ZERO;
        let mut connections = 0;
        for _ in 0..120 {
            now += Duration::from_millis(draw(&mut seed, 1000));
            let mut connection = draw(&mut seed, connections + 1);
            let job = JobId(1 + draw(&mut seed, 2));
            let mut key = RunKey { job, generation: Generation(1 + draw(&mut seed, 2) as u32) };
            // Mostly what a member of a run would say; else whatever.
            if let Some(run) = watch.core.jobs.get(&job).and_then(|j| j.run.as_ref())
                && draw(&mut seed, 12) > 0
            {
                key = run.key;
                connection = run.members[draw(&mut seed, 2) as usize].0;
            }
            let at = ConnectionId(connection);
            let said = |message| CoreEvent::Said { connection: at, message };
            let actions = match draw(&mut seed, 16) {
                0 | 1 => {
                    connections += 1;
                    watch.core.join(ConnectionId(connections), joining("n"), now).1
                }
                2 if watch.core.jobs.len() < 2 => {
                    watch.core.submit(spec.clone(), fresh.clone(), PathBuf::from("/r"), now).unwrap().1
                }
                3 if draw(&mut seed, 6) == 0 => {
                    watch.core.handle(CoreEvent::Left { connection: at, reason: "gone".to_owned() }, now)
                }
                4 if draw(&mut seed, 6) == 0 => watch.core.stop(job, now).unwrap_or_default(),
                5 => {
                    let resumed = watch.core.resume(job, spec.clone(), fresh.clone(), now);
                    if resumed.is_ok() {
                        watch.was_final.remove(&job);
                    }
                    resumed.unwrap_or_default()
                }
                6 | 7 => {
                    watch.ready.insert((key, connection));
                    watch.core.handle(said(ready(key)), now)
                }
                8..=11 => {
                    let due = watch.last_step.get(&job).copied().unwrap_or(0) + 1;
                    let number = if draw(&mut seed, 60) == 0 { draw(&mut seed, 9) } else { due };
                    watch.core.handle(said(step(key, number, Some(1.0))), now)
                }
                12 => {
                    let shard = StoredShard::default();
                    let node = NodeIndex(draw(&mut seed, 3) as u32);
                    watch.core.handle(CoreEvent::ShardStored { key, step: 3, node, shard }, now)
                }
                13 | 14 => watch.core.handle(said(FromCompNode::Heartbeat { number: 1 }), now),
                _ => watch.core.handle(CoreEvent::Tick, now),
            };
            watch.check(&actions);
            watch.answer(&actions, &mut seed, now);
        }
        starts += watch.started.len();
        steps += watch.last_step.values().sum::<u64>();
    }
    assert!(starts > 200 && steps > 50, "the runs reach training: {starts} starts, {steps} steps");
}
