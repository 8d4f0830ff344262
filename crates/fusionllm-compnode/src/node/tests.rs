//! A CompNode at a broker that the tests play.

mod breaks;
mod snapshots;
mod storms;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, Weak};

use fusionllm_graph::{Gpt2Config, Kernels, OpDag, gpt2};
use fusionllm_planner::{Cluster, Measured, NodeIndex, place};
use fusionllm_protocol::{
    Assignment, BlobHeader, BlobKind, Channel, ControlStream, FromBroker, Generation, Greeting, Hello, JobId, JobSpec,
    JobView, PeerFrame, PeerRecord, Precision, Role, RunId, RunKey, Standing, WeightSource, Welcome, decode, encode,
    placement_hash,
};
use fusionllm_transport::{AdmitAll, FrameSink, FrameSource, Identity, PeerAddr, Secret, probe};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::assignment::check_memory;
use super::*;
use crate::ExecutorError;
use crate::backend::{Backend, DeviceSpeed, ExecutorSpec, FirstParams, Load, MeasureSpec};
use crate::checkpoint::write_shard;
use crate::device::DeviceChoice;
use crate::executor::{Executor, NamedTensor};
use crate::links::peer_addr;
use crate::links::peer_record;
use crate::optimizer::OptimizerSpec;
use crate::stop::StopFlag;

/// Whatever is to happen happens by then, on a busy machine, too.
const SOON: Duration = Duration::from_secs(60);

/// Where the broker listens, and the CompNode that has its ticket.
struct House {
    endpoint: Endpoint,
    compnode: JoinHandle<Result<(), CompNodeError>>,
    folder: tempfile::TempDir,
}

/// One connection of the CompNode, as its broker sees it.
struct BrokerEnd {
    session: Session,
    sink: FrameSink,
    source: FrameSource,
    control: ControlStream<FromBroker>,
    /// Where the CompNode is.
    addr: PeerAddr,
    /// What it says that it is at work on.
    standing: Option<Standing>,
}

impl House {
    async fn new(memory_bytes: Option<u64>) -> Self {
        Self::with(memory_bytes, Patience::default(), std::env::temp_dir()).await
    }

    async fn with(memory_bytes: Option<u64>, patience: Patience, scratch: PathBuf) -> Self {
        Self::on(open_device(DeviceChoice::Cpu).unwrap(), memory_bytes, patience, scratch).await
    }

    async fn on(backend: Arc<dyn Backend>, memory_bytes: Option<u64>, patience: Patience, scratch: PathBuf) -> Self {
        let config = EndpointConfig::new(Identity::generate(), "127.0.0.1:0".parse().unwrap());
        let endpoint = Endpoint::bind(config, Arc::new(AdmitAll)).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let text: String = (0..4000).map(|i| ["one ", "two ", "three ", "four "][i * 7 % 11 % 4]).collect();
        std::fs::write(folder.path().join("text.txt"), text).unwrap();
        let config = JoinConfig {
            ticket: Ticket { broker: endpoint.addr(), secret: Secret::generate(), relay: None },
            name: "n".to_owned(),
            org: None,
            device: DeviceChoice::Cpu,
            identity: Identity::generate(),
            bind: "127.0.0.1:0".parse().unwrap(),
            advertise: Vec::new(),
            threads: None,
            memory_bytes,
            profile_dir: None,
            readable: ReadableData::new([folder.path().to_owned()]).unwrap(),
            scratch_dir: scratch,
            snapshot_dir: folder.path().join("snapshots"),
            snapshots_stay: true,
            seed_dir: folder.path().join("state"),
        };
        let compnode =
            tokio::spawn(join_with(config, backend, patience, std::future::pending(), std::future::pending()));
        Self { endpoint, compnode, folder }
    }

    /// The CompNode comes, and is let in to a new session.
    async fn admit(&self) -> BrokerEnd {
        self.admit_to(None).await.0
    }

    /// The CompNode comes, and is let in with what there was of a session. Gives what it wants to go on with.
    async fn admit_to(&self, past: Option<ControlStream<FromBroker>>) -> (BrokerEnd, Option<u64>) {
        let resumed = past.as_ref().map(ControlStream::received);
        let (mut broker, resume) = self.welcome(resumed).await;
        broker.control = past.unwrap_or_default();
        if let (Some(_), Some(received)) = (resumed, resume) {
            for frame in broker.control.resume(received).unwrap() {
                broker.sink.send(&encode(&frame).unwrap()).await.unwrap();
            }
        }
        (broker, resume)
    }

    /// The CompNode comes, and is told how many of its messages are here. With how many of ours it has.
    async fn welcome(&self, resumed: Option<u64>) -> (BrokerEnd, Option<u64>) {
        let session = timeout(SOON, self.endpoint.accept()).await.unwrap().unwrap();
        let (mut sink, mut source) = session.accept_bi().await.unwrap();
        assert_eq!(Greeting::from_bytes(&source.recv().await.unwrap().unwrap()), Some(Greeting::OURS));
        let hello = decode::<Hello>(&source.recv().await.unwrap().unwrap()).unwrap();
        let Role::CompNode { addr, resume, standing, .. } = hello.role else { panic!("a client") };
        sink.send(&Greeting::OURS.to_bytes()).await.unwrap();
        sink.send(&encode(&Welcome::Accepted { name: "n".to_owned(), resumed }).unwrap()).await.unwrap();
        let (control, addr) = (ControlStream::default(), peer_addr(&addr));
        (BrokerEnd { session, sink, source, control, addr, standing }, resume)
    }
}

impl BrokerEnd {
    async fn say(&mut self, message: FromBroker) {
        let frame = self.control.send(message).unwrap();
        self.sink.send(&encode(&frame).unwrap()).await.unwrap();
    }

    /// The next message that does not only say how much memory is free.
    async fn hear_any(&mut self) -> FromCompNode {
        loop {
            match self.hear_all().await {
                FromCompNode::Room { .. } => {}
                message => return message,
            }
        }
    }

    async fn hear_all(&mut self) -> FromCompNode {
        let frame = timeout(SOON, self.source.recv()).await.expect("it says something").unwrap().unwrap();
        self.control.receive(decode(&frame).unwrap()).unwrap().unwrap()
    }

    async fn assign(&mut self, job: Assignment) {
        self.say(FromBroker::Assign(Box::new(job))).await;
    }

    /// Assigns a job, and starts it once it is ready.
    async fn set_to_work(&mut self, job: Assignment) {
        let key = job.key;
        self.assign(job).await;
        assert!(matches!(self.hear().await, FromCompNode::Ready { .. }));
        self.say(FromBroker::Start { key }).await;
    }

    /// The next message that is no heartbeat; those are answered.
    async fn hear(&mut self) -> FromCompNode {
        loop {
            match self.hear_any().await {
                FromCompNode::Heartbeat { number } => {
                    self.say(FromBroker::HeartbeatAck { number, now_s: 1.0, recorded: None }).await
                }
                // A slow machine reads for long enough to say so.
                FromCompNode::Reading { .. } => {}
                message => return message,
            }
        }
    }

    async fn send_weights(&self, key: RunKey, tensors: &[NamedTensor]) {
        let mut sink = self.session.open_uni().await.unwrap();
        let content = write_shard(tensors).unwrap();
        let header = BlobHeader { key, kind: BlobKind::Weights, bytes: content.len() as u64 };
        sink.send(&encode(&header).unwrap()).await.unwrap();
        sink.send(&content).await.unwrap();
        let _ = timeout(Duration::from_secs(5), sink.finish()).await;
    }
}

fn dag(vocab_size: usize) -> OpDag {
    let mut config = Gpt2Config::named("gpt2").unwrap();
    (config.n_layer, config.n_embd, config.n_head, config.vocab_size, config.n_positions) = (1, 16, 2, vocab_size, 16);
    gpt2(&config, 16).unwrap()
}

fn spec(folder: &Path, train: &str) -> JobSpec {
    let data = folder.display();
    let text = format!(
        "[model]\nname = \"gpt2\"\n[data]\npath = \"{data}\"\nseq_len = 16\ncache = false\n[train]\nwarmup = 0\nbatch = 4\n\
         micro_batches = 2\n{train}"
    );
    JobSpec::from_toml(&text, &[]).unwrap()
}

/// A placement of the only job.
fn key(generation: u32) -> RunKey {
    RunKey { job: JobId(1), generation: Generation(generation) }
}

fn assignment(spec: JobSpec, dag: &OpDag, generation: u32, weights: WeightSource) -> Assignment {
    let placement = place(dag, &Cluster::uniform(1), &spec.placement_spec()).unwrap();
    Assignment {
        key: key(generation),
        node: NodeIndex(0),
        job: JobView::of_owner(&spec, RunId::from_bytes([7; 16])),
        graph: dag.to_json(),
        placement,
        peers: vec![PeerRecord { id: [0; 32], addrs: Vec::new() }],
        start_step: 0,
        planned_bytes: 0,
        weights,
    }
}

/// All parameters of a job of one CompNode.
fn weights(assignment: &Assignment, dag: &OpDag) -> Vec<NamedTensor> {
    let backend = open_device(DeviceChoice::Cpu).unwrap();
    let optimizer = OptimizerSpec::of(&assignment.job.train);
    let dag = Arc::new(dag.clone());
    let spec =
        ExecutorSpec::of_placement(dag, &assignment.placement, NodeIndex(0), optimizer, 1u64, FirstParams::Drawn);
    let executor = backend.build(spec, StopFlag::default()).unwrap();
    executor.export().into_iter().map(|tensor| tensor.read().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_of_a_placement_that_was_taken_back_do_not_harm_the_next_one() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    let dag = dag(256);
    let job = |generation| assignment(spec(house.folder.path(), "steps = 2"), &dag, generation, WeightSource::Broker);
    let all = weights(&job(1), &dag);
    let aborted = |generation| FromBroker::Abort { key: key(generation), reason: "stop".to_owned() };
    // One that comes after its job has gone, and one that comes while the next job waits for its own.
    broker.assign(job(1)).await;
    broker.say(aborted(1)).await;
    broker.send_weights(key(1), &all[..1]).await;
    broker.assign(job(2)).await;
    broker.send_weights(key(1), &all[..1]).await;
    broker.send_weights(RunKey { job: JobId(7), generation: Generation(1) }, &all[..1]).await;
    broker.send_weights(key(2), &all).await;
    let ready = broker.hear().await;
    assert!(matches!(ready, FromCompNode::Ready { key: RunKey { generation: Generation(2), .. }, .. }), "{ready:?}");
    // And one that comes before its assignment.
    broker.say(aborted(2)).await;
    broker.send_weights(key(3), &all).await;
    broker.assign(job(3)).await;
    let ready = broker.hear().await;
    assert!(matches!(ready, FromCompNode::Ready { key: RunKey { generation: Generation(3), .. }, .. }), "{ready:?}");
    house.compnode.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_that_hold_no_numbers_are_blamed() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    let dag = dag(256);
    let job = assignment(spec(house.folder.path(), "steps = 2"), &dag, 1, WeightSource::Broker);
    let mut all = weights(&job, &dag);
    all[2].values[3] = f32::NAN;
    let name = all[2].name.clone();
    broker.assign(job).await;
    broker.send_weights(key(1), &all).await;
    let FromCompNode::Failed { reason, .. } = broker.hear().await else { panic!("it is not refused") };
    assert_eq!(
        reason,
        format!("parameter `{name}`: element 3 is NaN, expected finite numbers: these weights cannot be trained")
    );
    house.compnode.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_waits_until_the_one_before_has_let_go_of_the_memory() {
    let device = Arc::new(OneAtATime::new());
    let house = House::on(device.clone(), None, Patience::default(), std::env::temp_dir()).await;
    let mut broker = house.admit().await;
    // An op of it takes so long that a compute thread which is told to stop is still at it when the next job comes.
    let mut config = Gpt2Config::named("gpt2").unwrap();
    (config.n_layer, config.n_embd, config.n_head, config.vocab_size) = (1, 512, 8, 20_000);
    let dag = gpt2(&config, 64).unwrap();
    let job = |generation| {
        let train = "steps = 1000000\neval_every = 1000000";
        let mut spec = spec(house.folder.path(), train);
        spec.data.seq_len = 64;
        assignment(spec, &dag, generation, WeightSource::Seed)
    };
    broker.set_to_work(job(1)).await;
    assert!(matches!(broker.hear().await, FromCompNode::Step { .. }));
    for generation in 2..5 {
        // Without an abort, too: the assignment itself takes the one before back.
        broker.assign(job(generation)).await;
        loop {
            match broker.hear().await {
                FromCompNode::Step { .. } => {}
                FromCompNode::Ready { key, .. } => break assert_eq!(key.generation, Generation(generation)),
                other => panic!("{other:?}"),
            }
        }
        broker.say(FromBroker::Start { key: key(generation) }).await;
        assert!(matches!(broker.hear().await, FromCompNode::Step { .. }));
    }
    assert_eq!(
        *device.met.lock().unwrap(),
        [false; 4],
        "whether an executor was there still as the next one was built"
    );
    house.compnode.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn measuring_is_cancelled_and_holds_up_nothing() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    let mut config = Gpt2Config::named("gpt2").unwrap();
    (config.n_layer, config.n_embd, config.n_head, config.vocab_size) = (1, 512, 8, 20_000);
    let large = gpt2(&config, 256).unwrap();
    let measure = |request, dag: &OpDag| FromBroker::MeasureOps {
        request,
        job: Box::new(JobView::of(&spec(house.folder.path(), "steps = 2"))),
        graph: dag.to_json(),
    };
    broker.say(measure(1, &large)).await;
    sleep(Duration::from_millis(200)).await;
    broker.say(FromBroker::CancelMeasure { request: 1 }).await;
    broker.say(measure(2, &dag(256))).await;
    let answer = broker.hear().await;
    assert!(matches!(&answer, FromCompNode::Measured { request: 2, result: Ok(_) }), "{answer:?}");
    // A job does not wait for what is measured, either.
    broker.say(measure(3, &large)).await;
    sleep(Duration::from_millis(200)).await;
    let job = assignment(spec(house.folder.path(), "steps = 2"), &dag(256), 1, WeightSource::Seed);
    broker.assign(job).await;
    assert!(matches!(broker.hear().await, FromCompNode::Ready { .. }));
    house.compnode.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_refused_with_the_numbers_before_it_is_tried() {
    let house = House::new(Some(1_000_000)).await;
    let mut broker = house.admit().await;
    let dag = dag(200_000_000);
    let began = Instant::now();
    let spec = spec(house.folder.path(), "steps = 2");
    broker.say(FromBroker::MeasureOps { request: 1, job: Box::new(JobView::of(&spec)), graph: dag.to_json() }).await;
    let FromCompNode::Measured { request: 1, result: Err(reason) } = broker.hear().await else { panic!() };
    assert!(reason.contains("op `") && reason.contains("jobs may fill 1.0 MB"), "{reason}");
    broker.assign(assignment(spec, &dag, 1, WeightSource::Seed)).await;
    let FromCompNode::Failed { reason, .. } = broker.hear().await else { panic!() };
    // 200,000,000 rows of 16 numbers, four times.
    assert!(reason.contains("optimizer state take 51.20 GB here, jobs may fill 1.0 MB"), "{reason}");
    // Nor is what the plan counts on, where the parameters alone would fit.
    let spec = self::spec(house.folder.path(), "steps = 2");
    let job = Assignment { planned_bytes: 2_000_000, ..assignment(spec, &self::dag(256), 2, WeightSource::Seed) };
    broker.assign(job).await;
    let FromCompNode::Failed { reason, .. } = broker.hear().await else { panic!() };
    assert!(reason.contains("as planned, take 2.0 MB here, jobs may fill 1.0 MB"), "{reason}");
    assert!(began.elapsed() < SOON / 2);
    // The broker hears how much that is.
    loop {
        match broker.hear_all().await {
            FromCompNode::Room { bytes } => break assert!(bytes <= 1_000_000, "{bytes}"),
            FromCompNode::Heartbeat { number } => {
                broker.say(FromBroker::HeartbeatAck { number, now_s: 1.0, recorded: None }).await
            }
            message => panic!("{message:?}"),
        }
    }
    house.compnode.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_runs_to_its_end() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    let job = assignment(spec(house.folder.path(), "steps = 3"), &dag(256), 1, WeightSource::Seed);
    broker.assign(job).await;
    assert!(matches!(broker.hear().await, FromCompNode::Ready { data: Some(_), .. }));
    broker.say(FromBroker::Start { key: key(1) }).await;
    let session = broker.session.clone();
    let shard = tokio::spawn(async move {
        let mut stream = session.accept_uni().await.unwrap();
        let header: BlobHeader = decode(&stream.recv().await.unwrap().unwrap()).unwrap();
        while stream.recv().await.unwrap().is_some() {}
        header.kind
    });
    for step in 1..=3 {
        let FromCompNode::Step { report, .. } = broker.hear().await else { panic!() };
        assert_eq!(report.step, step);
    }
    assert_eq!(shard.await.unwrap(), BlobKind::Shard { step: 3, node: NodeIndex(0) });
    broker.say(FromBroker::ShardSettled { key: key(1), step: 3 }).await;
    assert!(matches!(broker.hear().await, FromCompNode::Finished { .. }));
    house.compnode.abort();
}

/// A peer that was asked to probe dials only after the job has begun in which it is a peer, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_probe_that_comes_late_is_not_taken_for_the_jobs_connection() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    let config = EndpointConfig::new(Identity::generate(), "127.0.0.1:0".parse().unwrap());
    let peer = Endpoint::bind(config, Arc::new(AdmitAll)).await.unwrap();
    let expected = |probe| FromBroker::AwaitProbe { probe, peer: peer_record(&peer.addr()) };
    broker.say(expected(1)).await;
    assert!(matches!(broker.hear().await, FromCompNode::ProbeAwaited { probe: 1 }));

    let dag = dag(256);
    let spec = spec(house.folder.path(), "steps = 2\n[placement]\nstrategy = \"equal-number\"");
    let placement = place(&dag, &Cluster::uniform(2), &spec.placement_spec()).unwrap();
    let edge = placement.edges.iter().find(|edge| placement.compnode_of(edge.to) == Some(NodeIndex(1)));
    let channel = Channel::Activation(edge.unwrap().id);
    let job = Assignment {
        node: NodeIndex(1),
        placement,
        peers: vec![peer_record(&peer.addr()), PeerRecord { id: [0; 32], addrs: Vec::new() }],
        ..assignment(spec, &dag, 1, WeightSource::Seed)
    };
    broker.assign(job).await;
    let ready = broker.hear().await;
    assert!(matches!(ready, FromCompNode::Ready { .. }), "{ready:?}");
    let open = |session: Session| async move {
        let (mut sink, mut source) = session.open_bi().await.unwrap();
        let open = PeerFrame::Open { key: key(1), channel };
        sink.send(&encode(&open).unwrap()).await.unwrap();
        let answer = decode(&timeout(SOON, source.recv()).await.unwrap().unwrap().unwrap()).unwrap();
        assert!(matches!(answer, PeerFrame::Resume { next: 0 }));
    };
    let compnode = broker.addr.clone();
    let of_job = peer.connect(&compnode).await.unwrap();
    open(of_job.clone()).await;
    let late = peer.connect_for(&compnode, Purpose::Probe).await.unwrap();
    assert!(probe(&late).await.is_err());
    assert_eq!(timeout(SOON, late.closed()).await.unwrap().reason, "no probe is expected");
    // Neither the connection nor the job took notice.
    open(of_job).await;
    broker.say(expected(2)).await;
    let answer = broker.hear().await;
    assert!(matches!(answer, FromCompNode::ProbeAwaited { probe: 2 }), "{answer:?}");
    house.compnode.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_assignment_ends_probes() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    // Answers nothing, so a probe would last.
    let config = EndpointConfig::new(Identity::generate(), "127.0.0.1:0".parse().unwrap());
    let peer = Endpoint::bind(config, Arc::new(AdmitAll)).await.unwrap();
    broker.say(FromBroker::Probe { probe: 7, peer: peer_record(&peer.addr()) }).await;
    let session = timeout(SOON, peer.accept()).await.unwrap().unwrap();
    assert_eq!(session.purpose(), Purpose::Probe);
    let job = assignment(spec(house.folder.path(), "steps = 2"), &dag(256), 1, WeightSource::Seed);
    broker.assign(job).await;
    let FromCompNode::Probed { probe: 7, result: Err(reason) } = broker.hear().await else { panic!() };
    assert_eq!(reason, "a job needs the link");
    assert!(matches!(broker.hear().await, FromCompNode::Ready { .. }));
    timeout(SOON, session.closed()).await.unwrap();
    house.compnode.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_answers_no_heartbeat_is_dialled_anew() {
    let house = House::with(None, Patience { heartbeats: 1, ..Patience::default() }, std::env::temp_dir()).await;
    let silent = house.admit().await;
    let (mut broker, resume) = house.welcome(Some(0)).await;
    assert_eq!(resume, Some(0));
    assert_eq!(timeout(SOON, silent.session.closed()).await.unwrap().code, Some(1), "it comes back");
    // One that answers is stayed with: it hears of probes after several heartbeats.
    for probe in 0..2 {
        let FromCompNode::Heartbeat { number } = broker.hear_any().await else { panic!() };
        broker.say(FromBroker::HeartbeatAck { number, now_s: 1.0, recorded: None }).await;
        broker.say(FromBroker::AwaitProbe { probe, peer: PeerRecord { id: [0; 32], addrs: Vec::new() } }).await;
        assert!(matches!(broker.hear_any().await, FromCompNode::ProbeAwaited { .. }));
    }
    house.compnode.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_broker_stays_away_is_dropped_and_says_so_later() {
    let house =
        House::with(None, Patience { alone: Duration::from_secs(1), ..Patience::default() }, std::env::temp_dir())
            .await;
    let mut broker = house.admit().await;
    let job = assignment(spec(house.folder.path(), "steps = 1000000"), &dag(256), 1, WeightSource::Seed);
    broker.assign(job).await;
    assert!(matches!(broker.hear().await, FromCompNode::Ready { .. }));
    let received = broker.control.received();
    broker.session.close(1, "the broker is gone");
    // Nobody lets it in for a while: it connects and waits.
    let waiting = timeout(SOON, house.endpoint.accept()).await.unwrap().unwrap();
    sleep(Duration::from_secs(2)).await;
    waiting.close(1, "the broker is gone");
    let (back, resume) = house.welcome(Some(received)).await;
    let mut broker = BrokerEnd { control: broker.control, ..back };
    for again in broker.control.resume(resume.unwrap()).unwrap() {
        broker.sink.send(&encode(&again).unwrap()).await.unwrap();
    }
    let FromCompNode::Failed { reason, .. } = broker.hear().await else { panic!() };
    assert_eq!(reason, "broker: it is away for 1 s");
    house.compnode.abort();
}

/// Why a job with these settings fails, whose parameters are all times `factor`.
async fn failure_of(train: &str, factor: f32) -> String {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    let dag = dag(256);
    let job = assignment(spec(house.folder.path(), train), &dag, 1, WeightSource::Broker);
    let mut all = weights(&job, &dag);
    all.iter_mut().flat_map(|tensor| &mut tensor.values).for_each(|x| *x *= factor);
    broker.assign(job).await;
    broker.send_weights(key(1), &all).await;
    assert!(matches!(broker.hear().await, FromCompNode::Ready { .. }));
    broker.say(FromBroker::Start { key: key(1) }).await;
    let reason = loop {
        match broker.hear().await {
            FromCompNode::Step { .. } => {}
            FromCompNode::Failed { reason, .. } => break reason,
            other => panic!("{other:?}"),
        }
    };
    house.compnode.abort();
    reason
}

#[tokio::test(flavor = "multi_thread")]
async fn the_learning_rate_is_blamed_only_after_an_update() {
    // A layer norm's variance still holds such values, a product of two of them is none.
    let reason = failure_of("steps = 9\nclip = 0.0\nlr = 1e-3", 2e20).await;
    assert!(reason.contains(" of step 1 is ") && reason.contains("so train.lr is not why"), "{reason}");
    let reason = failure_of("steps = 9\nclip = 0.0\nlr = 1e30", 1.0).await;
    assert!(reason.contains(" of step 2 is ") && reason.ends_with("lower train.lr, or set train.clip"), "{reason}");
}

/// Without a place for its shard a part is not begun: its checkpoints would never come.
#[tokio::test(flavor = "multi_thread")]
async fn a_part_whose_shard_has_no_place_fails_before_it_trains() {
    let scratch = tempfile::tempdir().unwrap();
    let house = House::with(None, Patience::default(), scratch.path().to_owned()).await;
    let mut broker = house.admit().await;
    let place = scratch.path().display().to_string();
    drop(scratch);
    let job = assignment(spec(house.folder.path(), "steps = 2"), &dag(256), 1, WeightSource::Seed);
    broker.assign(job).await;
    let FromCompNode::Failed { reason, bad_input, .. } = broker.hear().await else { panic!("it is ready") };
    assert!(reason.contains(&place) && reason.contains("--state DIR") && !bad_input, "{reason}");
    house.compnode.abort();
}

/// A disk that takes no shard costs the checkpoint, and training goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_cannot_be_written_is_reported() {
    let outside = tempfile::tempdir().unwrap();
    let place = outside.path().join("scratch");
    std::fs::create_dir(&place).unwrap();
    let house = House::with(None, Patience::default(), place.clone()).await;
    let mut broker = house.admit().await;
    let dag = dag(256);
    let mut spec = spec(house.folder.path(), "steps = 2");
    spec.checkpoint.every = 1;
    let job = assignment(spec, &dag, 1, WeightSource::Seed);
    broker.assign(job).await;
    assert!(matches!(broker.hear().await, FromCompNode::Ready { .. }));
    // A folder that is only gone would be made again.
    std::fs::remove_dir_all(&place).unwrap();
    std::fs::write(&place, b"a file").unwrap();
    broker.say(FromBroker::Start { key: key(1) }).await;
    let (mut steps, mut failed) = (0, Vec::new());
    while failed.len() < 2 {
        match broker.hear().await {
            FromCompNode::Step { .. } => steps += 1,
            FromCompNode::ShardFailed { step, reason, .. } => {
                assert!(reason.contains(&place.display().to_string()), "{reason}");
                failed.push(step);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((steps, failed), (2, vec![1, 2]));
    // The state of the last step is still there.
    std::fs::remove_file(&place).unwrap();
    broker.say(FromBroker::ShardAgain { key: key(1), step: 2 }).await;
    assert_eq!(breaks::whole_shard(&broker.session).await, BlobKind::Shard { step: 2, node: NodeIndex(0) });
    house.compnode.abort();
}

/// A CPU that looks, for each executor that it builds, whether there still is the one before.
#[derive(Debug)]
struct OneAtATime {
    cpu: Arc<dyn Backend>,
    /// The graph that the last executor holds, and nobody else.
    last: Mutex<Weak<OpDag>>,
    met: Mutex<Vec<bool>>,
}

impl OneAtATime {
    fn new() -> Self {
        Self { cpu: open_device(DeviceChoice::Cpu).unwrap(), last: Mutex::default(), met: Mutex::default() }
    }
}

impl Backend for OneAtATime {
    fn name(&self) -> &str {
        self.cpu.name()
    }

    fn is_cpu(&self) -> bool {
        true
    }

    fn kernels(&self) -> Kernels {
        self.cpu.kernels()
    }

    fn has(&self, precision: Precision) -> bool {
        self.cpu.has(precision)
    }

    fn free_bytes(&self) -> Option<u64> {
        self.cpu.free_bytes()
    }

    fn measure_speed(&self) -> Result<DeviceSpeed, ExecutorError> {
        self.cpu.measure_speed()
    }

    fn measure_ops(&self, dag: &Arc<OpDag>, spec: &MeasureSpec, stop: &StopFlag) -> Result<Measured, ExecutorError> {
        self.cpu.measure_ops(dag, spec, stop)
    }

    fn build(&self, spec: ExecutorSpec, stop: StopFlag) -> Result<Box<dyn Executor>, ExecutorError> {
        let dag = Arc::new((*spec.dag).clone());
        let before = std::mem::replace(&mut *self.last.lock().unwrap(), Arc::downgrade(&dag));
        self.met.lock().unwrap().push(before.strong_count() > 0);
        self.cpu.build(ExecutorSpec { dag, ..spec }, stop)
    }
}

/// A device that says how much it needs, and is asked nothing else.
#[derive(Debug)]
struct Demanding(Option<u64>);

impl Backend for Demanding {
    fn name(&self) -> &str {
        "demanding"
    }

    fn is_cpu(&self) -> bool {
        false
    }

    fn kernels(&self) -> Kernels {
        Kernels::Fused
    }

    fn has(&self, _: Precision) -> bool {
        true
    }

    fn free_bytes(&self) -> Option<u64> {
        None
    }

    fn measure_speed(&self) -> Result<DeviceSpeed, ExecutorError> {
        unreachable!("nothing is measured")
    }

    fn measure_ops(&self, _: &Arc<OpDag>, _: &MeasureSpec, _: &StopFlag) -> Result<Measured, ExecutorError> {
        unreachable!("nothing is measured")
    }

    fn needs(&self, spec: &ExecutorSpec, load: &Load) -> Result<Option<u64>, ExecutorError> {
        assert_eq!((load.batch, load.held.len(), spec.stages.len()), (2, 1, 1));
        Ok(self.0)
    }

    fn build(&self, _: ExecutorSpec, _: StopFlag) -> Result<Box<dyn Executor>, ExecutorError> {
        unreachable!("nothing is built")
    }
}

#[test]
fn what_a_device_lays_out_is_refused_where_it_does_not_fit_though_the_plan_does() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), "steps = 2");
    let job = Assignment { planned_bytes: 1_500_000, ..assignment(spec, &dag(256), 1, WeightSource::Seed) };
    let (optimizer, first) = (OptimizerSpec::of(&job.job.train), FirstParams::Drawn);
    let held = ExecutorSpec::of_placement(Arc::new(dag(256)), &job.placement, job.node, optimizer, 0u64, first);
    let check = |needs, room| check_memory(&job, &held, &Demanding(needs), room).map_err(|e| e.to_string());
    assert_eq!(check(None, Some(2_000_000)), Ok(1_500_000));
    assert_eq!(check(Some(2_000_000), Some(2_000_000)), Ok(1_500_000));
    assert_eq!(check(Some(2_000_001), None), Ok(1_500_000));
    let refused = check(Some(2_500_000), Some(2_000_000)).unwrap_err();
    assert!(refused.contains("as this device lays them out, take 2.5 MB here, jobs may fill 2.0 MB"), "{refused}");
}
