//! Every transition by hand, then thousands of runs from a seed.

use std::collections::BTreeSet;
use std::sync::Arc;

use fusionllm_planner::{LinkProfile, Measured, NodeIndex};
use fusionllm_protocol::{
    BlobHeader, BlobKind, DataFingerprint, DataReport, FileFingerprint, FromCompNode, LinkBytes, PairProfile,
    PeerRecord, Standing, StepReport, TokenizerFingerprint, content_hash,
};

mod comeback;
mod cuts;
mod drift;
mod recovery;
mod snapshots;
mod takeback;

use super::members::LEASE;
use super::*;
use crate::checkpoint::{Origin, StoredShard, TensorSet};
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
        loss: None,
        origin: Origin::default(),
        model: None,
        notices: Vec::new(),
        run: RunStart::new(),
        unread: None,
    }
}

fn joining(name: &str) -> Joining {
    let addr = PeerRecord { id: [7; 32], addrs: Vec::new() };
    let profile = crate::testing::profile(name);
    let (id, device) = ("0707".to_owned(), "cpu".to_owned());
    // One process a name.
    let key = [name.bytes().fold(7, |sum: u8, byte| sum.wrapping_mul(31).wrapping_add(byte)); 32];
    Joining { name: name.to_owned(), id, key, device, org: None, addr, profile, standing: None }
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
        FromBroker::Probe { probe, .. } => Some(FromCompNode::Probed {
            probe: *probe,
            result: Ok(PairProfile { there: link, back: link, relayed: false }),
        }),
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

/// Something happens, and all that is to be written is. Gives the other actions.
fn tell(core: &mut Core, event: CoreEvent, now: Duration) -> Vec<Action> {
    let mut others = Vec::new();
    let mut queue: std::collections::VecDeque<Action> = core.handle(event, now).into();
    while let Some(action) = queue.pop_front() {
        match action {
            Action::Persist { number, .. } => queue.extend(core.handle(CoreEvent::Persisted { number }, now)),
            action => others.push(action),
        }
    }
    others
}

/// Answers all requests to measure something or to write it, and those that follow. Gives the other actions.
fn measure(core: &mut Core, actions: Vec<Action>) -> Vec<Action> {
    measure_at(core, actions, NOW)
}

fn measure_at(core: &mut Core, actions: Vec<Action>, now: Duration) -> Vec<Action> {
    let mut others = Vec::new();
    let mut queue: std::collections::VecDeque<Action> = actions.into();
    while let Some(action) = queue.pop_front() {
        match (measurements(std::slice::from_ref(&action)).pop(), &action) {
            (Some((connection, message)), _) => {
                queue.extend(core.handle(CoreEvent::Said { connection, message, at: now }, now));
            }
            (None, Action::Persist { number, .. } | Action::Rewrite { number, .. }) => {
                queue.extend(core.handle(CoreEvent::Persisted { number: *number }, now));
            }
            (None, Action::Plan { job, input }) => {
                let (job, number, result) = (*job, input.number, Box::new(input.plan()));
                queue.extend(core.handle(CoreEvent::Planned { job, number, result }, now));
            }
            (None, Action::OpenRun(open)) if open.takes_back => {
                queue.extend(core.handle(CoreEvent::RunOpened { key: open.key }, now));
                others.push(action);
            }
            (None, _) => others.push(action),
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
        eval_accuracy: None,
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
    tell(core, CoreEvent::Said { connection: ConnectionId(connection), message, at: NOW }, NOW)
}

fn ready(key: RunKey) -> FromCompNode {
    FromCompNode::Ready { key, data: None }
}

fn step(key: RunKey, step: u64, loss: Option<f64>) -> FromCompNode {
    FromCompNode::Step { key, report: report(step, loss) }
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
/// Two CompNodes train a job that goes on by itself.
fn running() -> Core {
    running_with(&[])
}

/// The same of a job that fails when it loses a CompNode.
fn running_mortal() -> Core {
    running_with(&["survive.enabled=false"])
}

fn running_with(overrides: &[&str]) -> Core {
    let mut core = core(2);
    submit(&mut core, overrides);
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
    let start = FromBroker::Start { key: KEY };
    assert_eq!(sent(&actions), [(1, &start), (2, &start)]);

    for number in 1..=6 {
        assert!(say(&mut core, 2, step(KEY, number, Some(3.0 / number as f64))).is_empty());
        let actions = say(&mut core, 1, step(KEY, number, None));
        let Action::AppendMetrics { metrics, .. } = &actions[0] else { panic!("{actions:?}") };
        assert_eq!((metrics.step, metrics.loss, metrics.tokens), (number, 3.0 / number as f64, 32));
        assert_eq!(metrics.links.len(), 2);
    }
    for connection in [1, 2] {
        let finished = FromCompNode::Finished { key: KEY };
        assert_eq!(states(&say(&mut core, connection, finished)), []);
    }
    // The two checkpoints, after steps 3 and 6, are still to come.
    for of in [3, 6] {
        for node in [0, 1] {
            let shard = StoredShard::default();
            let event = CoreEvent::ShardStored { key: KEY, step: of, node: NodeIndex(node), shard };
            let actions = tell(&mut core, event, NOW);
            let finishing = actions.iter().find_map(|a| match a {
                Action::FinishCheckpoint { spec, .. } => Some((spec.step, spec.loss, spec.shards.len())),
                _ => None,
            });
            assert_eq!(finishing, (node == 1).then_some((of, Some(3.0 / of as f64), 2)));
        }
    }
    let finished =
        |step| CoreEvent::CheckpointFinished { key: KEY, step, path: PathBuf::from("/c"), checksum: "c5".to_owned() };
    assert_eq!(states(&tell(&mut core, finished(3), NOW)), []);
    let actions = tell(&mut core, finished(6), NOW);
    assert_eq!(states(&actions), [JobState::Done]);
    assert_eq!(core.record(JobId(1)).unwrap().checkpoint, Some((6, "c5".to_owned())), "it is remembered");
    assert!(actions.iter().any(|a| matches!(a, Action::WriteReport { .. })));
    let settled = FromBroker::ShardSettled { key: KEY, step: 6 };
    assert_eq!(sent(&actions), [(1, &settled), (2, &settled)], "nobody is told to abort what is done");
    assert!(core.status().compnodes.iter().all(|c| c.job.is_none()));
}

#[test]
fn a_compnode_that_vanishes_fails_the_job_and_frees_the_others() {
    let mut core = running_mortal();
    for connection in [1, 2] {
        say(&mut core, connection, step(KEY, 1, Some(1.0)));
    }
    let left = CoreEvent::Left { connection: ConnectionId(2), reason: "the peer does not answer any more".to_owned() };
    let actions = tell(&mut core, left, NOW);
    assert_eq!(
        failure(&core),
        "CompNode `b` vanished after step 1: the peer does not answer any more; \
         `fusionllm resume 1` begins anew, there is no checkpoint yet"
    );
    assert!(matches!(sent(&actions)[..], [(1, FromBroker::Abort { .. })]));
    assert_eq!(core.status().compnodes.len(), 1);
    assert_eq!(core.status().compnodes[0].job, None);
}

#[test]
fn a_silent_compnode_loses_its_lease() {
    let mut core = running_mortal();
    let almost = NOW + LEASE;
    assert!(tell(&mut core, CoreEvent::Tick, almost).is_empty());
    let message = FromCompNode::Heartbeat { number: 7 };
    let alive = CoreEvent::Said { connection: ConnectionId(1), message, at: almost };
    assert_eq!(
        sent(&tell(&mut core, alive, almost)),
        [(1, &FromBroker::HeartbeatAck { number: 7, now_s: almost.as_secs_f64(), recorded: None })]
    );
    let actions = tell(&mut core, CoreEvent::Tick, almost + Duration::from_secs(1));
    assert!(actions.iter().any(|a| matches!(a, Action::Disconnect { to: ConnectionId(2), .. })));
    assert!(failure(&core).contains("CompNode `b` vanished after step 0: no heartbeat for 45 s"));
}

#[test]
fn a_compnode_that_comes_back_keeps_its_run() {
    let mut core = running_mortal();
    let broken = |connection| CoreEvent::Broken {
        connection: ConnectionId(connection),
        reason: "the peer does not answer any more".to_owned(),
    };
    assert!(tell(&mut core, broken(2), NOW).is_empty());
    assert!(core.is_away(ConnectionId(2)));
    let later = NOW + LEASE - Duration::from_secs(1);
    for second in 1..LEASE.as_secs() {
        let now = NOW + Duration::from_secs(second);
        let alive =
            CoreEvent::Said { connection: ConnectionId(1), message: FromCompNode::Heartbeat { number: 0 }, at: now };
        tell(&mut core, alive, now);
        let asked = |action: &Action| matches!(action, Action::Send { message: FromBroker::CheckPeer { .. }, .. });
        assert!(tell(&mut core, CoreEvent::Tick, now).iter().all(asked));
    }
    let (name, actions) = core.rejoin(ConnectionId(2), joining("b"), later).unwrap();
    assert_eq!((name.as_str(), actions.len(), core.is_away(ConnectionId(2))), ("b", 0, false));
    tell(&mut core, CoreEvent::Tick, later + Duration::from_secs(2));
    for connection in [1, 2] {
        say(&mut core, connection, step(KEY, 1, Some(1.0)));
    }
    assert_eq!(core.record(JobId(1)).unwrap().step, 1);

    // One that stays away is lost in the end, and for what.
    tell(&mut core, broken(2), later);
    for second in 1..=LEASE.as_secs() + 1 {
        let now = later + Duration::from_secs(second);
        let alive =
            CoreEvent::Said { connection: ConnectionId(1), message: FromCompNode::Heartbeat { number: 0 }, at: now };
        tell(&mut core, alive, now);
        tell(&mut core, CoreEvent::Tick, now);
    }
    assert!(failure(&core).contains("CompNode `b` vanished after step 1: the peer does not answer any more"));
    assert_eq!(core.status().compnodes.len(), 1);

    // One without work has nothing to come back to.
    tell(&mut core, broken(1), later);
    assert_eq!(core.status().compnodes.len(), 0);
}

#[test]
fn weights_that_a_break_has_cut_off_are_sent_again() {
    let mut core = core(1);
    submit(&mut core, &["placement.compnodes=1"]);
    let weights = Some(Arc::new(TensorSet::default()));
    let job = core.jobs.get_mut(&JobId(1)).unwrap();
    job.start.as_mut().unwrap().weights = weights;
    job.run.as_mut().unwrap().weights_are_sent = true;
    let broken = || CoreEvent::Broken { connection: ConnectionId(1), reason: "cut".to_owned() };
    tell(&mut core, broken(), NOW);
    let (_, actions) = core.rejoin(ConnectionId(1), joining("a"), NOW).unwrap();
    assert!(matches!(&actions[..], [Action::SendWeights { params, .. }] if !params.is_empty()), "{actions:?}");
    say(&mut core, 1, ready(KEY));
    tell(&mut core, broken(), NOW);
    assert!(core.rejoin(ConnectionId(1), joining("a"), NOW).unwrap().1.is_empty());
}

#[test]
fn a_pause_of_the_broker_costs_nobody_the_lease() {
    let mut core = running();
    tell(&mut core, CoreEvent::Tick, NOW);
    let woken = NOW + LEASE * 2;
    assert!(tell(&mut core, CoreEvent::Tick, woken).is_empty());
    assert_eq!(state(&core, 1), JobState::Running);
}

#[test]
fn the_first_failure_is_the_jobs() {
    let mut core = running_mortal();
    let failed = |reason: &str, bad_input| FromCompNode::Failed { key: KEY, reason: reason.to_owned(), bad_input };
    let actions = say(&mut core, 1, failed("out of memory", false));
    assert_eq!(sent(&actions).len(), 2, "{:?}", sent(&actions));
    assert!(say(&mut core, 2, failed("lost its peer", false)).is_empty());
    let hint = "`fusionllm resume 1` begins anew, there is no checkpoint yet";
    assert_eq!(failure(&core), format!("CompNode `a`: out of memory; {hint}"));

    let mut core = running_mortal();
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
    let read = FromCompNode::Ready { key: KEY, data: Some(data) };
    assert_eq!(noticed(&say(&mut core, 1, read)), both("1 file was left out"));
    let note = |generation| FromCompNode::Note { key: RunKey { generation, ..KEY }, text: "it is hot".to_owned() };
    assert_eq!(noticed(&say(&mut core, 2, note(KEY.generation))), both("CompNode `b`: it is hot"));
    assert!(say(&mut core, 2, note(Generation(9))).is_empty(), "another placement's");
    let text = "a checkpoint could not be written".to_owned();
    let actions = tell(&mut core, CoreEvent::Noticed { key: KEY, text: text.clone() }, NOW);
    assert_eq!(noticed(&actions), both(&text));
}

#[test]
fn every_start_of_a_job_tells_its_notices() {
    let mut core = core(2);
    let spec = testing::spec(&[]);
    let texts = |actions: &[Action]| -> Vec<String> {
        let text = |action: &Action| match action {
            Action::Notice { notice, .. } => Some(notice.text.clone()),
            _ => None,
        };
        actions.iter().filter_map(text).collect()
    };
    let start = StartPoint { notices: vec!["weights: step-3".to_owned()], ..start(&spec, 3) };
    let (job, actions) = core.submit(spec.clone(), start.clone(), PathBuf::from("/runs/x"), NOW).unwrap();
    let first = texts(&measure(&mut core, actions));
    let actions = core.stop(job, NOW).unwrap();
    measure(&mut core, actions);
    let actions = core.resume(job, spec, start, None, NOW).unwrap();
    assert_eq!(texts(&measure(&mut core, actions)), first);
    assert_eq!(first, ["weights: step-3"]);
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
        key: KEY,
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
    let actions = core.resume(JobId(1), spec.clone(), start(&spec, 3), None, NOW).unwrap();
    measure(&mut core, actions);
    let old = [
        ready(KEY),
        step(KEY, 4, Some(1.0)),
        FromCompNode::Finished { key: KEY },
        FromCompNode::Failed { key: KEY, reason: String::new(), bad_input: false },
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
    let planning = || waiting("its placement is being worked out");
    let none_idle = waiting("0 of 1 CompNodes are idle");
    assert_eq!(states(&actions), [measuring, planning(), none_idle, JobState::Preparing]);
    let actions = core.stop(first, NOW).unwrap();
    let actions = measure(&mut core, actions);
    assert_eq!(states(&actions), [planning(), JobState::Stopped, JobState::Preparing]);
    assert_eq!(core.record(second).unwrap().state, JobState::Preparing);
}

#[test]
fn the_named_owner_of_the_data_comes_first() {
    let mut core = core(1);
    submit(&mut core, &["placement.compnodes=2", "data.owner=office"]);
    let is_waiting = |state: &JobState| matches!(state, JobState::Waiting { .. });
    assert!(states(&join(&mut core, 2, "b")).iter().all(is_waiting), "still waiting");
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

#[test]
fn only_the_data_owner_is_told_of_the_data() {
    let mut core = core(3);
    let (_, actions) = submit(&mut core, &["placement.compnodes=3", "data.private=true", "model.n_layer=4"]);
    let mut told = Vec::new();
    for (_, message) in sent(&actions) {
        let FromBroker::Assign(assignment) = message else { panic!("{message:?}") };
        assert!(assignment.job.is_private);
        told.push((assignment.node, assignment.job.owner.as_ref().map(|owner| owner.data.path.clone())));
    }
    let spec = core.record(JobId(1)).unwrap().spec.clone();
    assert!(told.len() > 1, "{told:?}");
    for (node, path) in told {
        assert_eq!(path, (node == NodeIndex::DATA_OWNER).then(|| spec.data.path.clone()), "{node}");
    }
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
        asked = tell(&mut core, CoreEvent::Said { connection: to, message, at: NOW }, NOW);
    }
    assert_eq!(probed, [1, 1, 2], "each pair once, by the one that joined first");
    let (inventory, actions) = core.inventory(None, None, NOW);
    assert_eq!((inventory.pending, inventory.links.len(), actions.len()), (0, 6, 0));
    let (inventory, actions) = core.inventory(Some(Duration::ZERO), None, NOW + Duration::from_secs(9));
    assert_eq!((inventory.pending, actions.len()), (3, 1), "all is due again");
}

/// A link that goes over the relay since a while is due, and cannot be measured as long as the job is at work.
#[test]
fn an_inventory_does_not_wait_for_jobs_to_end() {
    let mut core = running();
    let members: Vec<ConnectionId> = core.compnodes.all().collect();
    core.survey.seen(members[0], members[1], true);
    let (inventory, actions) = core.inventory(Some(Duration::ZERO), None, NOW + Duration::from_secs(9));
    assert_eq!((inventory.pending, actions.len()), (0, 0));
    assert!(inventory.links.iter().any(|link| link.relayed && link.link.is_some()), "what is known is told");
}

#[test]
fn what_cannot_be_measured_holds_up_no_job() {
    let mut core = Core::default();
    core.join(ConnectionId(1), joining("a"), NOW);
    let (_, actions) = core.join(ConnectionId(2), joining("b"), NOW);
    let probe = |actions: &[Action]| measurements(actions).pop().unwrap();
    let (to, message) = probe(&actions);
    let actions = tell(&mut core, CoreEvent::Said { connection: to, message, at: NOW }, NOW);
    let Some((dialler, FromCompNode::Probed { probe, .. })) = measurements(&actions).pop() else { panic!() };
    let failed = FromCompNode::Probed { probe, result: Err("no route".to_owned()) };
    tell(&mut core, CoreEvent::Said { connection: dialler, message: failed, at: NOW }, NOW);
    let spec = testing::spec(&[]);
    let (_, actions) = core.submit(spec.clone(), start(&spec, 0), PathBuf::from("/runs/x"), NOW).unwrap();
    let (mut asked, mut follows) = (Vec::new(), Vec::new());
    for (to, message) in sent(&actions) {
        let FromBroker::MeasureOps { request, .. } = message else { panic!("{message:?}") };
        asked.push(to);
        let result = Err("the device failed".to_owned());
        let message = FromCompNode::Measured { request: *request, result };
        follows.extend(tell(&mut core, CoreEvent::Said { connection: ConnectionId(to), message, at: NOW }, NOW));
    }
    measure(&mut core, follows);
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
fn what_goes_on_from_where_is_named_when_a_job_ends() {
    for (resumed_by, hint) in [
        (ResumedBy::default(), "`fusionllm resume 1` goes on from the checkpoint of step 3"),
        (ResumedBy::Train, "`fusionllm train --resume /runs/x` goes on from the checkpoint of step 3"),
    ] {
        let mut core = running_mortal();
        core.resumed_by = resumed_by;
        let path = PathBuf::from("/runs/x/checkpoints/step-3");
        tell(&mut core, CoreEvent::CheckpointFinished { key: KEY, step: 3, path, checksum: String::new() }, NOW);
        assert!(!core.lost("b", "its process ended", NOW).is_empty());
        assert!(failure(&core).ends_with(hint), "{}", failure(&core));
    }
    let mut core = running_mortal();
    core.resumed_by = ResumedBy::Train;
    core.lost("b", "its process ended", NOW);
    assert!(failure(&core).ends_with("its process ended; there is no checkpoint yet to go on from"));
}

#[test]
fn a_checkpoint_that_others_have_moved_is_not_named_as_if_it_were_there() {
    for (resumed_by, left, hint) in [
        (ResumedBy::Train, None, "`fusionllm train --resume` with the folder where it is now goes on from it"),
        (ResumedBy::default(), None, "`fusionllm resume 1` goes on once it is back in /runs/x"),
        (ResumedBy::default(), Some(2), "`fusionllm resume 1` goes on from the checkpoint of step 2"),
    ] {
        let mut core = running_mortal();
        core.resumed_by = resumed_by;
        let path = PathBuf::from("/runs/x/checkpoints/step-3");
        tell(&mut core, CoreEvent::CheckpointFinished { key: KEY, step: 3, path, checksum: String::new() }, NOW);
        tell(&mut core, CoreEvent::CheckpointsGone { key: KEY, left, went: None }, NOW);
        core.lost("b", "its process ended", NOW);
        assert!(failure(&core).ends_with(hint), "{}", failure(&core));
        assert_eq!(failure(&core).contains("the checkpoint of step 3 is not where it was"), left.is_none());
    }
}

#[test]
fn what_cannot_be_run_is_refused() {
    let mut core = core(1);
    let refusal = |overrides: &[&str], step| {
        let spec = testing::spec(overrides);
        let start = start(&spec, step);
        let error = check(&spec, &start).unwrap_err();
        assert!(error.is_bad_input());
        error.to_string()
    };
    assert!(refusal(&["placement.compnodes=1000"], 0).contains("1000 CompNodes but only"));
    assert!(refusal(&[], 6).contains("raise train.steps"));
    assert!(core.stop(JobId(9), NOW).unwrap_err().to_string().contains("no job 9"));
    submit(&mut core, &[]);
    let spec = testing::spec(&[]);
    let error = core.resume(JobId(1), spec.clone(), start(&spec, 0), None, NOW).unwrap_err();
    assert_eq!(error.to_string(), "job 1 is being prepared, expected a stopped or failed job");
}

#[test]
fn a_restart_fails_what_was_at_work_and_keeps_the_rest() {
    let mut core = core(1);
    submit(&mut core, &["survive.enabled=false"]);
    let at_work = core.record(JobId(1)).unwrap().clone();
    let done = JobRecord { job: JobId(2), state: JobState::Done, ..at_work.clone() };
    let known =
        |record| Restored { record, reached: None, gone_for: Duration::ZERO, checkpoint: None, placement: None };
    let (mut core, actions) = Core::restore(vec![known(at_work), known(done)], ResumedBy::default());
    assert!(matches!(&actions[..], [Action::Persist { .. }, Action::WriteReport { .. }]), "{actions:?}");
    assert!(failure(&core).starts_with("the broker restarted after step 0; `fusionllm resume 1` begins anew"));
    assert_eq!(state(&core, 2), JobState::Done);
    let (next, _) = submit(&mut core, &[]);
    assert_eq!(next, JobId(3));
}

/// A record of a job of six steps.
fn record(job: u64, state: JobState) -> JobRecord {
    let spec = testing::spec(&["placement.compnodes=1", "survive.enabled=false"]);
    let new = JobRecord::new(JobId(job), spec, PathBuf::from(format!("/runs/{job}")));
    JobRecord { state, step: 1, generation: Generation(1), ..new }
}

#[test]
fn a_restart_goes_by_what_the_run_directory_knows() {
    let at_work = |job, reached, checkpoint| {
        let state = JobState::Running;
        Restored {
            record: record(job, state),
            reached: Some((reached, 1.5)),
            gone_for: Duration::ZERO,
            checkpoint: Some(checkpoint),
            placement: None,
        }
    };
    let (core, _) = Core::restore(vec![at_work(1, 5, 3), at_work(2, 6, 6)], ResumedBy::default());
    assert_eq!(
        failure(&core),
        "the broker restarted after step 5; `fusionllm resume 1` goes on from the checkpoint of step 3"
    );
    let (step, loss) = (core.record(JobId(1)).unwrap().step, core.record(JobId(1)).unwrap().loss);
    assert_eq!((step, loss), (5, Some(1.5)), "those of one step");
    assert_eq!(state(&core, 2), JobState::Done, "all its steps and its last checkpoint are there");
}

/// A step that was chosen counts until the job is at work there, over restarts too, and nothing later does.
#[test]
fn a_chosen_step_outlives_the_broker() {
    let mut core = running_mortal();
    core.stop(JobId(1), NOW).unwrap();
    core.jobs.get_mut(&JobId(1)).unwrap().record.checkpoint = Some((6, "00".to_owned()));
    let spec = core.record(JobId(1)).unwrap().spec.clone();
    let actions = core.resume(JobId(1), spec.clone(), start(&spec, 3), Some(3), NOW).unwrap();
    let kept = core.record(JobId(1)).unwrap().clone();
    assert_eq!((kept.from_step, kept.checkpoint.clone()), (Some(3), None));
    assert_eq!((kept.step, kept.loss), (3, None), "the loss of a later step is not told of this one");
    // It waits, and has not put the later steps aside yet.
    let waiting = JobRecord { state: JobState::Waiting { reason: String::new() }, ..kept.clone() };
    let (waits, _) = Core::restore(
        vec![Restored {
            record: waiting,
            reached: Some((6, 1.5)),
            gone_for: Duration::ZERO,
            checkpoint: Some(6),
            placement: None,
        }],
        ResumedBy::default(),
    );
    assert_eq!((waits.record(JobId(1)).unwrap().step, waits.record(JobId(1)).unwrap().loss), (3, None));
    let at_work = JobRecord { state: JobState::Preparing, ..kept };
    let (core_then, _) = Core::restore(
        vec![Restored {
            record: at_work,
            reached: Some((6, 1.5)),
            gone_for: Duration::ZERO,
            checkpoint: Some(6),
            placement: None,
        }],
        ResumedBy::default(),
    );
    assert!(failure(&core_then).starts_with("the broker restarted"), "the checkpoint of step 6 is not its future");
    let hint = "`fusionllm resume 1 --step 3` goes on from the checkpoint of step 3";
    assert!(failure(&core_then).ends_with(hint), "{}", failure(&core_then));
    measure(&mut core, actions);
    let key = RunKey { generation: Generation(2), ..KEY };
    for connection in [1, 2] {
        say(&mut core, connection, ready(key));
    }
    assert_eq!(core.record(JobId(1)).unwrap().from_step, None);
}

/// A CompNode may answer to the next broker what the one before has asked.
#[test]
fn a_measurement_for_an_earlier_broker_is_not_believed() {
    let requests = |epoch: u64| {
        let mut core = Core::default();
        core.number_from(epoch << 32);
        join(&mut core, 1, "a");
        let spec = testing::spec(&["placement.compnodes=1"]);
        let (_, actions) = core.submit(spec.clone(), start(&spec, 0), PathBuf::from("/runs/x"), NOW).unwrap();
        let mut all = Vec::new();
        for action in actions {
            match action {
                Action::Persist { number, .. } => all.extend(core.handle(CoreEvent::Persisted { number }, NOW)),
                action => all.push(action),
            }
        }
        (core, all)
    };
    let asked = |actions: &[Action]| {
        let mut answers = measurements(actions);
        answers.retain(|(_, answer)| matches!(answer, FromCompNode::Measured { .. }));
        answers.pop().unwrap().1
    };
    let (_, before) = requests(1);
    let (mut core, now) = requests(2);
    let tell = |core: &mut Core, message| {
        core.handle(CoreEvent::Said { connection: ConnectionId(1), message, at: NOW }, NOW);
        core.survey.is_measuring()
    };
    assert!(tell(&mut core, asked(&before)), "that is still to come");
    assert!(!tell(&mut core, asked(&now)));
}

#[test]
fn what_waited_goes_on_waiting_after_a_restart() {
    let waiting = |job| {
        let record = record(job, JobState::Waiting { reason: "job 1 comes first".to_owned() });
        Restored { record, reached: None, gone_for: Duration::ZERO, checkpoint: None, placement: None }
    };
    let (mut core, actions) = Core::restore(vec![waiting(1), waiting(2)], ResumedBy::default());
    assert!(matches!(&actions[..], [Action::Load(_), Action::Load(_)]), "{actions:?}");
    join(&mut core, 1, "a");
    assert!(matches!(state(&core, 1), JobState::Waiting { .. }));
    let spec = testing::spec(&["placement.compnodes=1"]);
    let result = Box::new(Ok(start(&spec, 0)));
    let actions = core.handle(CoreEvent::Loaded { job: JobId(1), number: 1, result }, NOW);
    measure(&mut core, actions);
    assert_eq!(state(&core, 1), JobState::Preparing);
    let path = PathBuf::from("/model");
    let result = Box::new(Err(BrokerError::Model { path, reason: "is gone".to_owned() }));
    tell(&mut core, CoreEvent::Loaded { job: JobId(2), number: 2, result }, NOW);
    assert!(matches!(state(&core, 2), JobState::Failed { bad_input: true, .. }));
}

/// A job for the one CompNode there is, up to its placement, which is not on disk yet. Gives what follows from that.
fn placed_but_not_written(core: &mut Core) -> Vec<Action> {
    let spec = testing::spec(&["placement.compnodes=1"]);
    let (_, actions) = core.submit(spec.clone(), start(&spec, 0), PathBuf::from("/r"), NOW).unwrap();
    let Action::Persist { number: first, .. } = actions[0] else { panic!("{actions:?}") };
    core.handle(CoreEvent::Persisted { number: first }, NOW);
    let (connection, message) = measurements(&actions).pop().unwrap();
    let actions = core.handle(CoreEvent::Said { connection, message, at: NOW }, NOW);
    let planning =
        actions.into_iter().find_map(|a| if let Action::Plan { input, .. } = a { Some(input) } else { None });
    let input = planning.unwrap();
    let (job, number, result) = (JobId(1), input.number, Box::new(input.plan()));
    core.handle(CoreEvent::Planned { job, number, result }, NOW)
}

#[test]
fn nothing_is_told_before_it_is_on_disk() {
    let mut core = core(1);
    let actions = placed_but_not_written(&mut core);
    assert_eq!(state(&core, 1), JobState::Preparing);
    assert!(sent(&actions).is_empty() && states(&actions).is_empty(), "{actions:?}");
    assert!(matches!(core.status().jobs[0].state, JobState::Waiting { .. }), "nor is it shown");
    let number = actions.iter().find_map(|a| if let Action::Persist { number, .. } = a { Some(*number) } else { None });
    let actions = core.handle(CoreEvent::Persisted { number: number.unwrap() }, NOW);
    assert!(matches!(sent(&actions)[..], [(1, FromBroker::Assign(_))]));
    assert_eq!(states(&actions), [JobState::Preparing]);
    assert_eq!(core.status().jobs[0].state, JobState::Preparing);
}

#[test]
fn while_the_store_cannot_be_written_nothing_is_taken_in() {
    let mut core = running();
    let spec = testing::spec(&["placement.compnodes=1"]);
    let (refused, _) = core.submit(spec.clone(), start(&spec, 0), PathBuf::from("/r"), NOW).unwrap();
    core.handle(CoreEvent::Unpersisted { reason: "the disk is full".to_owned() }, NOW);
    assert!(core.record(refused).is_err(), "whoever submitted it is told that it was not taken in");
    let error = core.submit(spec.clone(), start(&spec, 0), PathBuf::from("/r"), NOW).unwrap_err().to_string();
    assert!(error.contains("takes no jobs") && error.contains("the disk is full"), "{error}");
    assert!(core.status().trouble.unwrap().contains("the disk is full"));
    // What runs goes on, and its end is told when it is on disk.
    assert_eq!(states(&core.stop(JobId(1), NOW).unwrap()), []);
    assert_eq!(core.status().jobs[0].state, JobState::Running);
    let mut tries = Vec::new();
    for second in 1..100 {
        let now = NOW + Duration::from_secs(second);
        for action in core.handle(CoreEvent::Tick, now) {
            if let Action::Rewrite { number, records } = action {
                assert_eq!(records.len(), 1);
                tries.push((second, number));
                core.handle(CoreEvent::Unpersisted { reason: "the disk is full".to_owned() }, now);
            }
        }
    }
    let seconds: Vec<u64> = tries.iter().map(|t| t.0).collect();
    assert_eq!(seconds[..5], [1, 3, 7, 15, 31], "it tries again, less and less often");
    let (_, number) = tries[0];
    let actions = core.handle(CoreEvent::Persisted { number }, NOW);
    assert_eq!(states(&actions), [JobState::Stopped]);
    assert_eq!(core.status().trouble, None);
    let (next, _) = core.submit(spec.clone(), start(&spec, 0), PathBuf::from("/r"), NOW).unwrap();
    assert!(next > refused, "no number is given twice");
}

#[test]
fn a_job_on_which_nothing_goes_on_fails_and_says_who_is_waited_for() {
    // Heartbeats alone are no work.
    let idle = |core: &mut Core, seconds: u64| {
        for second in 0..seconds {
            let now = NOW + Duration::from_secs(second);
            for connection in [1, 2] {
                let connection = ConnectionId(connection);
                tell(
                    core,
                    CoreEvent::Said { connection, message: FromCompNode::Heartbeat { number: 0 }, at: now },
                    now,
                );
            }
            tell(core, CoreEvent::Tick, now);
        }
    };
    let mut core = running_mortal();
    for (connection, number) in [(1, 1), (2, 1), (1, 2)] {
        say(&mut core, connection, step(KEY, number, Some(1.0)));
    }
    idle(&mut core, 55);
    assert_eq!(state(&core, 1), JobState::Running);
    idle(&mut core, 70);
    assert!(failure(&core).contains("no step after step 1 for 6"), "{}", failure(&core));
    assert!(failure(&core).contains("waited for CompNode `b`;"), "{}", failure(&core));

    // A first step may take longer, and a shard that comes in is work.
    let mut core = running_mortal();
    idle(&mut core, 290);
    assert_eq!(state(&core, 1), JobState::Running);
    tell(&mut core, CoreEvent::ShardComing { key: KEY }, NOW + Duration::from_secs(290));
    idle(&mut core, 500);
    assert_eq!(state(&core, 1), JobState::Running);
    idle(&mut core, 600);
    assert!(failure(&core).contains("no step after step 0 for 30"), "{}", failure(&core));

    let mut core = super::tests::core(2);
    submit(&mut core, &["survive.enabled=false"]);
    say(&mut core, 1, ready(KEY));
    idle(&mut core, 70);
    assert!(failure(&core).contains("not ready for 6") && failure(&core).contains("waited for CompNode `b`;"));

    // Data that is still being read is waited for as long as that goes on; who is ready reads nothing.
    let reading = |connection, second| CoreEvent::Said {
        connection: ConnectionId(connection),
        message: FromCompNode::Reading { key: KEY, done: 300, total: 1000 },
        at: NOW + Duration::from_secs(second),
    };
    let mut core = super::tests::core(2);
    submit(&mut core, &["survive.enabled=false"]);
    say(&mut core, 2, ready(KEY));
    for second in [500, 1000, 1500] {
        idle(&mut core, second);
        tell(&mut core, reading(1, second), NOW + Duration::from_secs(second));
    }
    idle(&mut core, 2000);
    assert_eq!(state(&core, 1), JobState::Preparing);
    assert_eq!(core.status().jobs[0].reading, Some((300, 1000)));
    tell(&mut core, reading(2, 2000), NOW + Duration::from_secs(2000));
    idle(&mut core, 2200);
    assert!(failure(&core).contains("not ready for 60") && failure(&core).contains("waited for CompNode `a`;"));
}

#[test]
fn so_many_steps_that_nobody_can_count_them_cost_nothing() {
    let mut core = core(1);
    submit(&mut core, &["placement.compnodes=1", "train.steps=3000000000", "checkpoint.every=7"]);
    let run = core.jobs[&JobId(1)].run.as_ref().unwrap();
    let owes = |step| run.owes_shard(ConnectionId(1), NodeIndex(0), step);
    assert!(owes(7) && owes(3_000_000_000) && !owes(8) && !owes(3_000_000_001));
    let wants = |step| run.wants_shard(ConnectionId(1), NodeIndex(0), step, 1).unwrap();
    assert!(wants(7) && wants(7 * 16) && !wants(7 * 17), "it cannot have come so far yet");
}

#[test]
fn what_no_device_holds_is_refused_before_it_is_measured() {
    let mut core = Core::default();
    let mut joining = joining("a");
    joining.profile.memory_bytes = Some(1_000_000);
    core.join(ConnectionId(1), joining, NOW);
    let spec = testing::spec(&["placement.compnodes=1", "train.batch=200000", "train.micro_batches=1"]);
    let (_, actions) = core.submit(spec.clone(), start(&spec, 0), PathBuf::from("/r"), NOW).unwrap();
    assert!(sent(&actions).is_empty(), "nothing is measured: {actions:?}");
    let reason = failure(&core);
    assert!(
        reason.contains("needs at least") && reason.contains("1.0 MB") && reason.contains("train.batch"),
        "{reason}"
    );
}

#[test]
fn jobs_are_planned_with_the_memory_that_is_free_now_and_compnodes_hear_how_much_that_is() {
    let mut core = core(1);
    let needed = |actions: &[Action]| {
        let sent = sent(actions);
        let assigned = sent.iter().find_map(|(_, message)| match message {
            FromBroker::Assign(assignment) => Some(assignment.planned_bytes),
            _ => None,
        });
        assigned.unwrap()
    };
    say(&mut core, 1, FromCompNode::Room { bytes: 1 << 40 });
    let one = ["placement.compnodes=1", "placement.recompute=never"];
    let (first, actions) = submit(&mut core, &one);
    let needed = needed(&actions);
    let of_plan = core.jobs[&first].run.is_some();
    assert!(of_plan && needed > 1000, "{needed}");
    core.stop(first, NOW).unwrap();
    say(&mut core, 1, FromCompNode::Room { bytes: needed - 1 });
    let (second, _) = submit(&mut core, &one);
    let JobState::Failed { reason, .. } = &core.jobs[&second].record.state else { panic!("it is placed") };
    assert!(reason.contains("GB"), "{reason}");
}

#[test]
fn a_job_that_is_stopped_needs_no_measurement() {
    let mut core = Core::default();
    core.join(ConnectionId(1), joining("a"), NOW);
    let spec = testing::spec(&["placement.compnodes=1"]);
    let submit = |core: &mut Core| {
        let (job, actions) = core.submit(spec.clone(), start(&spec, 0), PathBuf::from("/r"), NOW).unwrap();
        (job, actions)
    };
    let (first, actions) = submit(&mut core);
    let request = sent(&actions).iter().find_map(|(_, m)| match m {
        FromBroker::MeasureOps { request, .. } => Some(*request),
        _ => None,
    });
    let (second, _) = submit(&mut core);
    assert_eq!(sent(&core.stop(first, NOW).unwrap()), [], "the other one still waits for it");
    let actions = core.stop(second, NOW).unwrap();
    assert_eq!(sent(&actions), [(1, &FromBroker::CancelMeasure { request: request.unwrap() })]);
}

#[test]
fn a_placement_that_nobody_wants_any_more_is_dropped() {
    let mut core = core(2);
    let spec = testing::spec(&[]);
    let (job, actions) = core.submit(spec.clone(), start(&spec, 0), PathBuf::from("/r"), NOW).unwrap();
    let mut asked = Vec::new();
    let mut queue = actions;
    while let Some(action) = queue.pop() {
        if let Some((connection, message)) = measurements(std::slice::from_ref(&action)).pop() {
            queue.extend(core.handle(CoreEvent::Said { connection, message, at: NOW }, NOW));
        } else if let Action::Plan { input, .. } = action {
            asked.push(input);
        }
    }
    let [input] = &asked[..] else { panic!("{asked:?}") };
    assert!(core.status().compnodes.iter().all(|c| c.job == Some(job)), "they are kept for it");
    core.handle(CoreEvent::Left { connection: ConnectionId(2), reason: "gone".to_owned() }, NOW);
    let (number, result) = (input.number, Box::new(input.plan()));
    core.handle(CoreEvent::Planned { job, number, result }, NOW);
    assert!(matches!(state(&core, 1), JobState::Waiting { .. }), "it was planned with one that is gone");
    core.stop(job, NOW).unwrap();
    assert!(core.status().compnodes.iter().all(|c| c.job.is_none()));
}

#[test]
fn a_job_that_cannot_run_lets_others_pass() {
    let mut core = core(1);
    submit(&mut core, &["placement.compnodes=1", "data.owner=offcie"]);
    let JobState::Waiting { reason } = state(&core, 1) else { panic!() };
    assert!(reason.contains("`offcie`") && reason.contains("has not joined; joined are `a`"), "{reason}");
    let (second, _) = submit(&mut core, &["placement.compnodes=1"]);
    assert!(
        matches!(&core.record(second).unwrap().state, JobState::Waiting { reason } if reason == "job 1 comes first")
    );
    let later = NOW + Duration::from_secs(11);
    let alive =
        CoreEvent::Said { connection: ConnectionId(1), message: FromCompNode::Heartbeat { number: 0 }, at: later };
    tell(&mut core, alive, later);
    let actions = core.handle(CoreEvent::Tick, later);
    measure_at(&mut core, actions, later);
    assert_eq!(core.record(second).unwrap().state, JobState::Preparing);
}

#[test]
fn only_a_shard_that_is_due_is_wanted() {
    let core = running();
    let wants = |connection, node, step, generation| {
        let kind = BlobKind::Shard { step, node: NodeIndex(node) };
        let header = BlobHeader { key: RunKey { generation: Generation(generation), ..KEY }, kind, bytes: 1 };
        core.wants_shard(ConnectionId(connection), &header).unwrap()
    };
    assert!(wants(2, 1, 3, 1));
    assert!(!wants(2, 0, 3, 1), "another CompNode's");
    assert!(!wants(2, 1, 4, 1), "no checkpoint after step 4");
    assert!(!wants(2, 1, 3, 2), "another generation's");
}

/// What CompNodes send is bounded by the plan: the part's bytes, the order of steps, the number of links, one trace.
#[test]
fn a_compnode_cannot_make_the_broker_keep_more_than_its_part() {
    let shard = |core: &mut Core, bytes| {
        let kind = BlobKind::Shard { step: 3, node: NodeIndex(1) };
        let header = BlobHeader { key: KEY, kind, bytes };
        core.wants_shard(ConnectionId(2), &header)
    };
    let mut core = running();
    let error = shard(&mut core, 400 << 20).unwrap_err().to_string();
    assert!(error.contains("CompNode 1 announced a shard of 419430400 bytes, at most"), "{error}");
    assert_eq!(shard(&mut core, 10_000), Ok(true));

    say(&mut core, 1, step(KEY, 2, Some(1.0)));
    assert!(failure(&core).contains("reported step 2, which was not due"), "steps come in order");

    let mut core = running();
    let mut long = report(1, Some(1.0));
    long.links = vec![long.links[0].clone(); 1000];
    say(&mut core, 1, FromCompNode::Step { key: KEY, report: long });
    assert!(failure(&core).contains("more links than there are"));

    let mut core = running();
    let note = |n| FromCompNode::Note { key: KEY, text: format!("hello {n}") };
    let kept = (0..5000).filter(|&n| !say(&mut core, 1, note(n)).is_empty()).count();
    assert_eq!(kept, 1000);
}

#[test]
fn a_shard_that_will_not_come_costs_the_checkpoint() {
    let mut core = running();
    let failed = |step| FromCompNode::ShardFailed { key: KEY, step, reason: "its disk is full".to_owned() };
    for connection in [1, 2] {
        for number in 1..=3 {
            say(&mut core, connection, step(KEY, number, Some(1.0)));
        }
    }
    let actions = say(&mut core, 2, failed(3));
    assert!(actions.iter().any(|a| matches!(a, Action::DropCheckpoint { step: 3, .. })), "{actions:?}");
    assert_eq!(state(&core, 1), JobState::Running);
    assert!(say(&mut core, 1, failed(3)).is_empty(), "it is given up already");
    assert!(say(&mut core, 1, failed(4)).is_empty(), "no checkpoint after step 4");
}

/// Whatever times a CompNode claims, the broker goes on.
#[test]
fn absurd_times_in_reports_are_refused() {
    for step_s in [f64::NAN, f64::INFINITY, -1.0] {
        let mut core = running();
        let report = StepReport { step_s, ..report(1, Some(1.0)) };
        say(&mut core, 1, FromCompNode::Step { key: KEY, report });
        assert!(failure(&core).contains("times that are no numbers"), "{}", failure(&core));
    }
    let mut core = running();
    for connection in [1, 2] {
        let report = StepReport { step_s: 1e300, ..report(1, Some(1.0)) };
        say(&mut core, connection, FromCompNode::Step { key: KEY, report });
    }
    tell(&mut core, CoreEvent::Tick, NOW + Duration::from_secs(2));
    assert_eq!(state(&core, 1), JobState::Running);
}

/// While the store cannot be written a job is stopped at once, and what was held of its placement is never sent.
#[test]
fn a_placement_that_is_taken_back_before_it_was_told_is_not_told() {
    let mut core = core(1);
    placed_but_not_written(&mut core);
    let actions = core.stop(JobId(1), NOW).unwrap();
    assert!(sent(&actions).iter().any(|(_, m)| matches!(m, FromBroker::Abort { .. })), "{actions:?}");
    let last = core.last_write();
    let actions = core.handle(CoreEvent::Persisted { number: last }, NOW);
    assert!(sent(&actions).is_empty(), "{actions:?}");
}

/// One CompNode reports step after step while another reports none: that ends before memory does.
#[test]
fn a_compnode_cannot_run_away_with_its_reports() {
    let mut core = core(2);
    submit(&mut core, &["train.steps=1000000", "placement.compnodes=2"]);
    for connection in [1, 2] {
        say(&mut core, connection, ready(KEY));
    }
    let mut reported = 0;
    while state(&core, 1) == JobState::Running {
        reported += 1;
        say(&mut core, 1, step(KEY, reported, Some(1.0)));
    }
    assert_eq!(reported, 100_001);
    assert!(failure(&core).contains("another is still at step 0"));
}

/// Only who holds the data says what is in it, and only before it is ready.
#[test]
fn only_the_data_owner_reports_data() {
    let mut core = core(2);
    submit(&mut core, &["placement.compnodes=2"]);
    let with_data = || FromCompNode::Ready { key: KEY, data: Some(DataReport::default()) };
    let told = |actions: Vec<Action>| actions.iter().any(|a| matches!(a, Action::Emit(JobEvent::Data { .. })));
    assert!(!told(say(&mut core, 2, with_data())));
    assert!(told(say(&mut core, 1, with_data())));
    assert!(!told(say(&mut core, 1, with_data())));
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
        CoreEvent::CheckpointFailed { key: KEY, step, reason, may_pass: false }
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
    let hint = "`fusionllm resume 1` begins anew, there is no checkpoint yet";
    assert_eq!(failure(&core), format!("checkpoint of step 6: /c: No space left on device (os error 28); {hint}"));
}

/// A job of which only the last checkpoint is still to come.
fn all_steps_done() -> Core {
    let mut core = running();
    for number in 1..=6 {
        for connection in [1, 2] {
            say(&mut core, connection, step(KEY, number, Some(1.0)));
        }
    }
    core
}

fn last_failed(may_pass: bool) -> CoreEvent {
    CoreEvent::CheckpointFailed { key: KEY, step: 6, reason: "/c is gone".to_owned(), may_pass }
}

fn last_dropped() -> CoreEvent {
    CoreEvent::CheckpointDropped { key: KEY, step: 6 }
}

/// All that a run has made is with the CompNodes until the last checkpoint is in its place.
#[test]
fn the_last_checkpoint_is_tried_again_while_compnodes_hold_it() {
    let mut core = all_steps_done();
    let shard =
        |node| CoreEvent::ShardStored { key: KEY, step: 6, node: NodeIndex(node), shard: StoredShard::default() };
    let again = FromBroker::ShardAgain { key: KEY, step: 6 };
    let is_told = |actions: &[Action]| {
        actions.iter().any(|a| matches!(a, Action::Emit(JobEvent::Notice { text, .. }) if text.contains("/c is gone")))
    };
    assert!(core.settles(KEY, 3) && !core.settles(KEY, 6));
    core.handle(shard(0), NOW);
    let wants = |core: &Core| {
        let kind = BlobKind::Shard { step: 6, node: NodeIndex(1) };
        core.wants_shard(ConnectionId(2), &BlobHeader { key: KEY, kind, bytes: 1 }).unwrap()
    };
    let actions = core.handle(last_failed(true), NOW);
    // What the file thread is about to remove must be nothing of the next try.
    assert!(sent(&actions).is_empty() && !wants(&core), "{actions:?}");
    assert!(core.handle(shard(1), NOW).is_empty());
    assert!(sent(&core.handle(CoreEvent::Tick, NOW + Duration::from_secs(1))).is_empty());
    assert_eq!(sent(&core.handle(last_dropped(), NOW)), [(1, &again), (2, &again)]);
    assert!(wants(&core) && core.handle(last_dropped(), NOW).is_empty());
    assert!(is_told(&actions) && matches!(actions[0], Action::DropCheckpoint { step: 6, .. }), "{actions:?}");
    assert_eq!(state(&core, 1), JobState::Running);
    // What the first try has stored does not count.
    assert!(core.handle(shard(1), NOW).is_empty());
    let actions = core.handle(last_failed(true), NOW);
    assert!(sent(&actions).is_empty() && !is_told(&actions), "{actions:?}");
    assert!(sent(&core.handle(last_dropped(), NOW)).is_empty());
    let actions = core.handle(CoreEvent::Tick, NOW + Duration::from_secs(1));
    assert_eq!(sent(&actions), [(1, &again), (2, &again)]);
    for node in [0, 1] {
        core.handle(shard(node), NOW);
    }
    let path = PathBuf::from("/c");
    let finished = CoreEvent::CheckpointFinished { key: KEY, step: 6, path, checksum: "c".to_owned() };
    let settled = FromBroker::ShardSettled { key: KEY, step: 6 };
    assert_eq!(sent(&tell(&mut core, finished, NOW)), [(1, &settled), (2, &settled)]);
    assert!(core.settles(KEY, 6));
}

/// Its own disk is full: it holds its state meanwhile.
#[test]
fn the_last_shard_that_a_compnode_cannot_write_is_asked_for_again() {
    let mut core = all_steps_done();
    let failed = || FromCompNode::ShardFailed { key: KEY, step: 6, reason: "its disk is full".to_owned() };
    let again = FromBroker::ShardAgain { key: KEY, step: 6 };
    let actions = say(&mut core, 2, failed());
    assert!(matches!(actions[0], Action::DropCheckpoint { step: 6, .. }), "{actions:?}");
    assert!(say(&mut core, 1, failed()).is_empty(), "both failed at the same time");
    assert_eq!(sent(&core.handle(last_dropped(), NOW)), [(1, &again), (2, &again)]);
    let mut now = NOW;
    while state(&core, 1) == JobState::Running && now < NOW + Duration::from_secs(60) {
        say(&mut core, 2, failed());
        core.handle(last_dropped(), now);
        now += Duration::from_secs(1);
        core.handle(CoreEvent::Tick, now);
    }
    assert!(failure(&core).contains("checkpoint of step 6: CompNode `b`: its disk is full"), "{}", failure(&core));
    assert!(now > NOW + Duration::from_secs(25), "{now:?}");
}

/// What a shard holds stays as it is, and a folder that does not come back is not waited for without an end.
#[test]
fn the_last_checkpoint_is_not_tried_for_ever() {
    for (may_pass, later) in [(false, 0), (true, 31)] {
        let mut core = all_steps_done();
        let mut now = NOW;
        let fails = |core: &mut Core, now| {
            core.handle(last_failed(may_pass), now);
            core.handle(last_dropped(), now);
        };
        fails(&mut core, now);
        while state(&core, 1) == JobState::Running && now < NOW + Duration::from_secs(60) {
            now += Duration::from_secs(1);
            core.handle(CoreEvent::Tick, now);
            fails(&mut core, now);
        }
        assert!(failure(&core).starts_with("checkpoint of step 6: /c is gone"), "{}", failure(&core));
        let waited = (now - NOW).as_secs();
        assert!((later..=later + 8).contains(&waited), "{waited}");
    }
}

#[test]
fn how_long_shards_are_on_their_way_does_not_count_as_tried() {
    let mut core = all_steps_done();
    let (mut now, mut tries) = (NOW, 0);
    while state(&core, 1) == JobState::Running && tries < 20 {
        core.handle(last_failed(true), now);
        let mut actions = core.handle(last_dropped(), now);
        while state(&core, 1) == JobState::Running && sent(&actions).is_empty() {
            now += Duration::from_secs(1);
            [1, 2].iter().for_each(|&connection| assert!(core.compnodes.seen(ConnectionId(connection), now)));
            actions = core.handle(CoreEvent::Tick, now);
        }
        now += Duration::from_secs(40);
        [1, 2].iter().for_each(|&connection| assert!(core.compnodes.seen(ConnectionId(connection), now)));
        tries += 1;
    }
    assert!(failure(&core).starts_with("checkpoint of step 6: /c is gone"), "{}", failure(&core));
    assert_eq!(tries, 8);
}

#[test]
fn a_job_whose_steps_are_done_is_stopped_at_the_second_word() {
    let mut core = all_steps_done();
    let actions = core.stop(JobId(1), NOW).unwrap();
    assert!(
        actions.iter().any(|a| matches!(a, Action::Emit(JobEvent::Notice { text, .. }) if text.contains("once more")))
    );
    assert_eq!(state(&core, 1), JobState::Running);
    core.stop(JobId(1), NOW).unwrap();
    assert_eq!(state(&core, 1), JobState::Stopped);
}

/// What must hold after every event, whatever happened.
struct Watch {
    core: Core,
    /// What the store has, what it is still to write, and whether it has failed.
    disk: BTreeMap<JobId, JobRecord>,
    queue: std::collections::VecDeque<Action>,
    broken: bool,
    resumed: BTreeMap<JobId, u64>,
    last_step: BTreeMap<JobId, u64>,
    started: BTreeSet<RunKey>,
    ready: BTreeSet<(RunKey, u64)>,
    was_final: BTreeSet<JobId>,
}

impl Watch {
    /// The file thread writes some of what it has to, and sometimes fails.
    fn write(&mut self, seed: &mut u64, now: Duration) {
        while !self.queue.is_empty() && draw(seed, 4) > 0 {
            let event = match self.queue.pop_front() {
                Some(Action::Plan { job, input }) => {
                    let (number, result) = (input.number, Box::new(input.plan()));
                    Some(CoreEvent::Planned { job, number, result })
                }
                Some(Action::Load(loading)) => {
                    let (job, number) = (loading.record.job, loading.number);
                    let result = Box::new(Ok(start(&loading.record.spec, 0)));
                    Some(CoreEvent::Loaded { job, number, result })
                }
                Some(Action::Persist { number, record, .. }) => {
                    self.broken |= draw(seed, 60) == 0;
                    if !self.broken {
                        self.disk.insert(record.job, *record);
                    }
                    (!self.broken).then_some(CoreEvent::Persisted { number })
                }
                Some(Action::Rewrite { number, records }) => {
                    self.broken = draw(seed, 2) == 0;
                    if !self.broken {
                        self.disk = records.into_iter().map(|r| (r.job, r)).collect();
                    }
                    (!self.broken).then_some(CoreEvent::Persisted { number })
                }
                _ => None,
            };
            let failed = || CoreEvent::Unpersisted { reason: "full".to_owned() };
            let actions = self.core.handle(event.unwrap_or_else(failed), now);
            self.check(&actions);
            self.answer(&actions, seed, now);
        }
    }

    /// CompNodes answer what they are asked to measure; some never do.
    fn answer(&mut self, actions: &[Action], seed: &mut u64, now: Duration) {
        let mut asked = measurements(actions);
        while let Some((connection, message)) = asked.pop() {
            if draw(seed, 20) > 0 {
                let actions = self.core.handle(CoreEvent::Said { connection, message, at: now }, now);
                self.check(&actions);
                asked.extend(measurements(&actions));
            }
        }
    }

    fn check(&mut self, actions: &[Action]) {
        for action in actions {
            match action {
                Action::Persist { number, record, barrier } => {
                    let (number, record, barrier) = (*number, record.clone(), *barrier);
                    self.queue.push_back(Action::Persist { number, record, barrier });
                }
                Action::Plan { job, input } => {
                    self.queue.push_back(Action::Plan { job: *job, input: input.clone() });
                }
                Action::Load(loading) => self.queue.push_back(Action::Load(loading.clone())),
                Action::Rewrite { number, records } => {
                    self.queue.push_back(Action::Rewrite { number: *number, records: records.clone() });
                }
                Action::Send { message: FromBroker::Assign(assignment), .. } => {
                    assert!(
                        self.disk[&assignment.key.job].generation >= assignment.key.generation,
                        "told before written"
                    );
                }
                Action::Send { message: FromBroker::Start { key }, .. } => {
                    let key = *key;
                    let run = self.core.jobs[&key.job].run.as_ref().unwrap();
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
                    if self.was_final.remove(job) {
                        let resumed = self.resumed.entry(*job).or_default();
                        *resumed = resumed.checked_sub(1).expect("it left a final state without a resume");
                    }
                    if state.is_final() {
                        self.was_final.insert(*job);
                        assert!(self.disk.contains_key(job), "told before written");
                    }
                }
                _ => {}
            }
        }
        let mut busy = BTreeSet::new();
        for job in self.core.jobs.values() {
            assert_eq!(job.run.is_some(), matches!(job.record.state, JobState::Preparing | JobState::Running));
            let planned = job.planning.iter().flat_map(|(_, members)| members);
            for member in job.run.iter().flat_map(|run| &run.members).chain(planned) {
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
#[expect(clippy::too_many_lines, reason = "one arm for each event of a history")]
fn no_order_of_events_breaks_the_rules() {
    let spec = testing::spec(&["placement.compnodes=2"]);
    let fresh = start(&spec, 0);
    let (mut starts, mut steps, mut recovered) = (0, 0, 0);
    for run in 0..1500u64 {
        let mut seed = run;
        let mut watch = Watch {
            core: Core::default(),
            disk: BTreeMap::new(),
            queue: std::collections::VecDeque::new(),
            broken: false,
            resumed: BTreeMap::new(),
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
            let known: Vec<JobId> = watch.core.jobs.keys().copied().collect();
            let job = known.get(draw(&mut seed, 2) as usize).copied().unwrap_or(JobId(1));
            let mut key = RunKey { job, generation: Generation(1 + draw(&mut seed, 2) as u32) };
            // Mostly what a member of a run would say; else whatever.
            if let Some(run) = watch.core.jobs.get(&job).and_then(|j| j.run.as_ref())
                && draw(&mut seed, 12) > 0
            {
                key = run.key;
                connection = run.members[draw(&mut seed, run.members.len() as u64) as usize].0;
            }
            let at = ConnectionId(connection);
            let said = |message| CoreEvent::Said { connection: at, message, at: now };
            let actions = match draw(&mut seed, 16) {
                0 | 1 => {
                    connections += 1;
                    watch.core.join(ConnectionId(connections), joining("n"), now).1
                }
                2 if watch.core.jobs.len() < 2 => {
                    let submitted = watch.core.submit(spec.clone(), fresh.clone(), PathBuf::from("/r"), now);
                    submitted.map(|(_, actions)| actions).unwrap_or_default()
                }
                3 if draw(&mut seed, 6) == 0 => {
                    watch.core.handle(CoreEvent::Left { connection: at, reason: "gone".to_owned() }, now)
                }
                4 if draw(&mut seed, 6) == 0 => watch.core.stop(job, now).unwrap_or_default(),
                5 => {
                    let resumed = watch.core.resume(job, spec.clone(), fresh.clone(), None, now);
                    if resumed.is_ok() {
                        *watch.resumed.entry(job).or_default() += 1;
                    }
                    resumed.unwrap_or_default()
                }
                6 | 7 => {
                    watch.ready.insert((key, connection));
                    watch.core.handle(said(ready(key)), now)
                }
                // No CompNode trains before it is told to.
                8..=11
                    if watch.started.contains(&key)
                        || watch.core.record(job).is_ok_and(|r| r.state != JobState::Running) =>
                {
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
            watch.write(&mut seed, now);
        }
        starts += watch.started.len();
        recovered += watch.core.jobs.values().filter(|job| job.recoveries.goes_on).count();
        steps += watch.last_step.values().sum::<u64>();
    }
    let reached = format!("the runs reach training: {starts} starts, {steps} steps, {recovered} recoveries");
    assert!(starts > 200 && steps > 50 && recovered > 100, "{reached}");
}
