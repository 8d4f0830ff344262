//! CompNodes that talk with the broker over a network that misbehaves from a seed, in simulated time.
//!
//! The broker's actor, core and connections are the real ones; its threads for files stand on another runtime, since nothing is
//! written. The CompNodes keep to the form of the real ones.

use std::sync::Mutex;

use fusionllm_protocol::{
    ControlStream, FromCompNode, Generation, Greeting, Hello, Numbered, Role, RunKey, TicketRole, Welcome,
};
use fusionllm_protocol::{DeviceProfile, PeerRecord, decode, encode};
use fusionllm_transport::memory::{Network, Weather};
use fusionllm_transport::{AdmitAll, AdmitOnTrial, Endpoint, PeerAddr, Session};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::super::compnode;
use super::super::gate::Gate;
use super::super::{Handle, OpenRuns};
use super::*;
use crate::store::Store;
use crate::testing::{all_hold, each_is_one};

/// Messages each way.
const SAID: u64 = 20;
const LONGEST: Duration = Duration::from_secs(300);

fn key() -> RunKey {
    RunKey { job: JobId(1), generation: Generation(1) }
}

/// The broker's parts that are not part of the history.
struct Bench {
    folder: tempfile::TempDir,
    /// Of the threads for files. While one of its own threads is at work, a runtime does not go on with simulated time.
    threads: tokio::runtime::Runtime,
    gate: Arc<Gate>,
    secret: fusionllm_transport::Secret,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let broker = PeerAddr { id: fusionllm_transport::PeerId::from_bytes([1; 32]), addrs: Vec::new() };
        let (gate, ticket) = Gate::open(folder.path(), broker, None).unwrap();
        let threads = tokio::runtime::Builder::new_current_thread().build().unwrap();
        Self { folder, threads, gate, secret: ticket.secret }
    }

    /// An actor without jobs.
    fn actor(&self, commands: &mpsc::Sender<Command>, open_runs: OpenRuns) -> Actor {
        let store = tempfile::tempdir_in(self.folder.path()).unwrap().keep().join("store");
        let _threads = self.threads.enter();
        let reopen = Box::new({
            let store = store.clone();
            move || Store::open(&store)
        });
        Actor {
            core: Core::default(),
            files: Files::start(commands.clone(), open_runs),
            records: Records::start(Store::open(&store).unwrap(), reopen, commands),
            lines: BTreeMap::new(),
            events: broadcast::channel(EVENT_QUEUE).0,
            states: watch::Sender::default(),
            answers: Answers::default(),
            to_self: commands.downgrade(),
            reach: Arc::new(Reach { checkpoints: Vec::new(), models: Vec::new() }),
            began: Instant::now(),
        }
    }
}

/// What a CompNode remembers from connection to connection.
#[derive(Default)]
struct Member {
    control: ControlStream<FromCompNode>,
    has_joined: bool,
    heartbeats: u64,
    said: u64,
}

/// By CompNode, what it has heard.
type Heard = Arc<Mutex<BTreeMap<usize, Vec<u64>>>>;

impl Member {
    /// One connection, until it breaks.
    async fn connection(
        &mut self,
        session: &Session,
        hello: &Hello,
        mut hear: impl FnMut(Option<u64>),
        dice: &mut ChaCha8Rng,
    ) -> Option<()> {
        let (mut sink, mut source) = session.open_bi().await.ok()?;
        sink.send(&Greeting::OURS.to_bytes()).await.ok()?;
        sink.send(&encode(hello).unwrap()).await.ok()?;
        Greeting::check_broker(&source.recv().await.ok()??).unwrap();
        let Welcome::Accepted { resumed, .. } = decode(&source.recv().await.ok()??).unwrap() else { panic!("refused") };
        match resumed {
            Some(received) => {
                for frame in self.control.resume(received).unwrap() {
                    sink.send(&encode(&frame).unwrap()).await.ok()?;
                }
            }
            None => {
                assert!(!self.has_joined, "it had a session, and the broker does not go on with it");
                *self = Self { has_joined: true, ..Self::default() };
                hear(None);
            }
        }
        let (frames, mut incoming) = mpsc::channel(16);
        let mut reading = JoinSet::new();
        reading.spawn(async move {
            while let Ok(Some(frame)) = source.recv().await {
                if frames.send(frame).await.is_err() {
                    return;
                }
            }
        });
        let mut heartbeat = interval(Duration::from_secs(3));
        loop {
            let pause = Duration::from_millis(dice.random_range(0..700));
            let frame = tokio::select! {
                biased;
                _ = heartbeat.tick() => {
                    self.heartbeats += 1;
                    self.control.send_once(FromCompNode::Heartbeat { number: self.heartbeats })
                }
                frame = incoming.recv() => {
                    let frame: Numbered<FromBroker> = decode(&frame?).unwrap();
                    if let Some(FromBroker::ShardSettled { step, .. }) = self.control.receive(frame).unwrap() {
                        hear(Some(step));
                    }
                    continue;
                }
                () = sleep(pause), if self.said < SAID => {
                    self.said += 1;
                    self.control.send(FromCompNode::ProbeAwaited { probe: self.said }).unwrap()
                }
            };
            sink.send(&encode(&frame).unwrap()).await.ok()?;
        }
    }
}

/// A CompNode that comes back after each break.
async fn compnode(
    number: usize,
    endpoint: Endpoint,
    broker: PeerAddr,
    secret: [u8; 32],
    heard: Heard,
    mut dice: ChaCha8Rng,
) {
    let addr = PeerRecord { id: *endpoint.id().as_bytes(), addrs: endpoint.addr().addrs };
    let profile = DeviceProfile { memory_bytes: Some(1 << 30), cpu: None, ..crate::testing::profile("h") };
    let mut member = Member::default();
    loop {
        if let Ok(session) = endpoint.connect(&broker).await {
            let resume = member.has_joined.then(|| member.control.received());
            let (name, device) = (format!("node{number}"), "none".to_owned());
            let role = Role::CompNode {
                name,
                device,
                org: None,
                addr: addr.clone(),
                profile: profile.clone(),
                resume,
                standing: None,
            };
            let hello = Hello { secret, role };
            let hear = |step: Option<u64>| {
                let mut heard = heard.lock().unwrap();
                let heard = heard.entry(number).or_default();
                // One that begins anew has heard nothing.
                match step {
                    Some(step) => heard.push(step),
                    None => heard.clear(),
                }
            };
            member.connection(&session, &hello, hear, &mut dice).await;
            session.close(1, "broken");
        }
        sleep(Duration::from_millis(500)).await;
    }
}

/// Lets in whoever comes, as the broker does.
async fn door(listening: Endpoint, gate: Arc<Gate>, handle: Handle) {
    let mut connections = JoinSet::new();
    let mut line = 0;
    while let Some(session) = listening.accept().await {
        line += 1;
        let (line, gate, handle) = (ConnectionId(line), Arc::clone(&gate), handle.clone());
        connections.spawn(async move {
            let hello = timeout(Duration::from_secs(10), async {
                let (mut sink, mut source) = session.accept_bi().await.ok()?;
                Greeting::from_bytes(&source.recv().await.ok()??)?;
                sink.send(&Greeting::OURS.to_bytes()).await.ok()?;
                let hello = decode::<Hello>(&source.recv().await.ok()??).ok()?;
                Some((hello, sink, source))
            });
            let Ok(Some((Hello { secret, role }, sink, source))) = hello.await else { return };
            let Role::CompNode { name, device, org, addr, profile, resume, standing } = role else {
                panic!("a client")
            };
            let secret = fusionllm_transport::Secret::from_bytes(secret);
            let pass = gate.admit(line, &session, &secret, TicketRole::Join).unwrap().unwrap();
            session.admitted();
            let (id, key) = (session.peer().to_string(), *session.peer().as_bytes());
            let joining = Joining { name, id, key, device, org, addr, profile, standing };
            compnode::serve(pass, session, joining, resume, sink, source, handle).await;
        });
    }
}

/// The broker's actor, and what it has heard and said.
struct Talk {
    actor: Actor,
    inbox: mpsc::Receiver<Command>,
    tick: tokio::time::Interval,
    said: BTreeMap<ConnectionId, Vec<u64>>,
    /// To each connection, as long as the core knows it: steps from 1.
    told: BTreeMap<ConnectionId, u64>,
}

impl Talk {
    /// The next thing to tell a CompNode.
    fn next(&mut self) -> Option<Command> {
        let lines = &self.actor.lines;
        for &connection in lines.keys() {
            self.told.entry(connection).or_default();
        }
        let is_due = |(connection, told): &(&ConnectionId, &mut u64)| **told < SAID && lines.contains_key(connection);
        let (&connection, step) = self.told.iter_mut().find(is_due)?;
        *step += 1;
        Some(Command::ShardSettled { connection, key: key(), step: *step })
    }

    /// Whether `count` CompNodes are there, and all that they say has come.
    fn has_heard_all(&self, count: usize) -> bool {
        let is_said = |c: &ConnectionId| self.said.get(c).is_some_and(|said| said.len() as u64 == SAID);
        self.actor.lines.len() == count && self.actor.lines.keys().all(is_said)
    }

    /// Serves, and tells something each time that `talk` elapses, until all is said and `count` CompNodes have said all.
    async fn run(&mut self, network: &Network, talk: Duration, count: usize) {
        let mut talk = interval(talk);
        loop {
            let command = tokio::select! {
                biased;
                Some(command) = self.inbox.recv() => command,
                _ = self.tick.tick() => Command::Event(CoreEvent::Tick),
                _ = talk.tick() => match self.next() {
                    Some(command) => command,
                    None if self.has_heard_all(count) => return,
                    None => continue,
                },
            };
            if let Command::Said { connection, message: FromCompNode::ProbeAwaited { probe }, .. } = &command {
                network.note(format_args!("the broker hears {probe} of {connection:?}"));
                self.said.entry(*connection).or_default().push(*probe);
            }
            self.actor.serve(command);
            // One without a job has nothing to come back to.
            for &connection in self.actor.lines.keys() {
                self.actor.core.set_to_work(connection, key());
            }
        }
    }
}

async fn history(seed: u64, bench: &Bench) -> String {
    let mut dice = ChaCha8Rng::seed_from_u64(seed);
    let network = Network::new(seed, Weather::stormy(seed));
    let listening = network.endpoint(Arc::new(AdmitOnTrial));
    let (commands, inbox) = mpsc::channel(64);
    let open_runs = OpenRuns::new();
    let actor = bench.actor(&commands, open_runs.clone());
    let (runs_dir, scratch, reach) = (bench.folder.path().into(), bench.folder.path().into(), actor.reach.clone());
    let handle = Handle { commands, runs_dir, scratch, reach, open_runs, has_relay: false };
    let (heard, broker, count) = (Heard::default(), listening.addr(), dice.random_range(1..4));
    let mut tasks = JoinSet::new();
    tasks.spawn(door(listening, Arc::clone(&bench.gate), handle));
    for number in 0..count {
        let (endpoint, broker, heard) = (network.endpoint(Arc::new(AdmitAll)), broker.clone(), Arc::clone(&heard));
        let dice = ChaCha8Rng::seed_from_u64(dice.random());
        tasks.spawn(compnode(number, endpoint, broker, *bench.secret.as_bytes(), heard, dice));
    }
    let (said, told) = Default::default();
    let mut talk = Talk { actor, inbox, tick: interval(TICK), said, told };
    let each = Duration::from_millis(dice.random_range(50..400));
    let is_over = timeout(LONGEST, talk.run(&network, each, count)).await.is_ok();
    assert!(is_over, "seed {seed} hangs:\n{}", network.log());
    // What was told last may be on its way, and what is lost with a connection is told again.
    let _ = timeout(Duration::from_secs(60), talk.run(&network, each, usize::MAX)).await;
    let all: Vec<u64> = (1..=SAID).collect();
    assert_eq!(talk.actor.lines.len(), count, "seed {seed}: a CompNode was given up");
    for (connection, line) in &talk.actor.lines {
        assert_eq!(talk.said.get(connection), Some(&all), "seed {seed}");
        assert_eq!(lock(&line.control).unconfirmed(), 0, "seed {seed}: {connection:?} has not all");
    }
    let heard = heard.lock().unwrap().clone();
    assert!(heard.len() == count && heard.values().all(|heard| *heard == all), "seed {seed}: {heard:?}");
    drop(talk);
    tasks.shutdown().await;
    sleep(Duration::from_secs(60)).await;
    assert_eq!(network.connections(), 0, "seed {seed}: a connection or a stream is left");
    network.log()
}

#[test]
fn what_is_said_both_ways_comes_once_and_in_order_over_any_storm() {
    let bench = Bench::new();
    all_hold(50, |seed| history(seed, &bench));
}

#[test]
fn one_seed_gives_one_history() {
    let bench = Bench::new();
    each_is_one(50, |seed| history(seed, &bench));
}
