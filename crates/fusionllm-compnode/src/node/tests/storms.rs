//! A CompNode's talk with its broker over a network that misbehaves from a seed, in simulated time.

use std::sync::Mutex;

use fusionllm_graph::Kernels;
use fusionllm_protocol::Numbered;
use fusionllm_transport::memory::{Network, Weather};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::task::JoinSet;

use super::*;
use crate::testing::{all_hold, each_is_one};

/// Messages each way.
const SAID: u64 = 30;
/// The broker forgets who is away for longer.
const LEASE: Duration = Duration::from_secs(45);
const LONGEST: Duration = Duration::from_secs(300);

/// What the broker knows of its CompNode, from one hello without a past to the next.
#[derive(Default)]
struct Life {
    control: ControlStream<FromBroker>,
    /// Goes to the present connection.
    line: Option<mpsc::Sender<Numbered<FromBroker>>>,
    line_number: u64,
    broken_at: Option<Instant>,
    /// Its heartbeats are heard.
    has_spoken: bool,
    answered: Vec<u64>,
    told: Vec<u64>,
}

/// A broker that keeps to the form of the real one.
#[derive(Clone)]
struct Broker {
    life: Arc<Mutex<Life>>,
    network: Network,
}

impl Broker {
    fn say(&self, message: FromBroker) {
        let mut life = self.life.lock().unwrap();
        let frame = match message {
            FromBroker::HeartbeatAck { .. } => life.control.send_once(message),
            message => life.control.send(message).unwrap(),
        };
        // What does not go now goes after the break.
        let _ = life.line.as_ref().map(|line| line.try_send(frame));
    }

    /// Lets in who says hello: with its past, if both ends know of it.
    fn join(&self, resume: Option<u64>) -> (u64, Option<u64>, mpsc::Receiver<Numbered<FromBroker>>) {
        let mut life = self.life.lock().unwrap();
        let is_kept = life.broken_at.is_none_or(|at| at.elapsed() < LEASE);
        let again = resume.filter(|_| is_kept).and_then(|received| life.control.resume(received).ok());
        let number = life.line_number + 1;
        if again.is_none() {
            assert!(!life.has_spoken, "it had a session, and does not go on with it: {resume:?}");
            *life = Life::default();
        }
        let (line, queue) = mpsc::channel(1 << 10);
        let received = again.is_some().then(|| life.control.received());
        again.into_iter().flatten().for_each(|frame| line.try_send(frame).unwrap());
        (life.line, life.line_number, life.broken_at) = (Some(line), number, None);
        (number, received, queue)
    }

    /// Says what there is to say, and has the CompNode told what there is to tell, until all has come.
    async fn talk(&self, events: &mpsc::Sender<NodeEvent>, peer: &PeerRecord, dice: &mut ChaCha8Rng) {
        while !self.life.lock().unwrap().has_spoken {
            sleep(Duration::from_millis(50)).await;
        }
        for number in 1..=SAID {
            sleep(Duration::from_millis(dice.random_range(0..900))).await;
            self.say(FromBroker::AwaitProbe { probe: number, peer: peer.clone() });
            sleep(Duration::from_millis(dice.random_range(0..100))).await;
            let report = FromCompNode::Measured { request: number, result: Err("none".to_owned()) };
            events.send(NodeEvent::Tell(Box::new(report))).await.unwrap();
        }
        let is_over = || {
            let life = self.life.lock().unwrap();
            [&life.answered, &life.told].iter().all(|heard| heard.len() as u64 >= SAID)
        };
        while !is_over() {
            sleep(Duration::from_millis(50)).await;
        }
    }

    async fn serve(self, session: Session) -> Option<()> {
        let (mut sink, mut source) = session.accept_bi().await.ok()?;
        Greeting::from_bytes(&source.recv().await.ok()??)?;
        sink.send(&Greeting::OURS.to_bytes()).await.ok()?;
        let hello = decode::<Hello>(&source.recv().await.ok()??).ok()?;
        let Role::CompNode { resume, .. } = hello.role else { return None };
        session.admitted();
        let (number, resumed, mut queue) = self.join(resume);
        self.network.note(format_args!("the broker resumes {resume:?} with {resumed:?}"));
        sink.send(&encode(&Welcome::Accepted { name: "n".to_owned(), resumed }).unwrap()).await.ok()?;
        let writing = async {
            while let Some(frame) = queue.recv().await {
                sink.send(&encode(&frame).unwrap()).await.ok()?;
            }
            None::<()>
        };
        let reading = async {
            loop {
                let frame = source.recv().await.ok()??;
                let message = self.life.lock().unwrap().control.receive(decode(&frame).unwrap()).unwrap();
                message.into_iter().for_each(|message| self.hear(message));
            }
        };
        tokio::select! {
            biased;
            _ = writing => {}
            ended = reading => { let _: Option<()> = ended; }
        }
        let mut life = self.life.lock().unwrap();
        if life.line_number == number {
            (life.line, life.broken_at) = (None, Some(Instant::now()));
        }
        Some(())
    }

    fn hear(&self, message: FromCompNode) {
        let mut life = self.life.lock().unwrap();
        match message {
            FromCompNode::Heartbeat { number } => {
                life.has_spoken = true;
                drop(life);
                self.say(FromBroker::HeartbeatAck { number, now_s: 0.0, recorded: None });
            }
            FromCompNode::ProbeAwaited { probe } => {
                life.answered.push(probe);
                self.network.note(format_args!("the broker hears answer {probe}"));
            }
            FromCompNode::Measured { request, .. } => {
                life.told.push(request);
                self.network.note(format_args!("the broker hears report {request}"));
            }
            message => panic!("{message:?}"),
        }
    }
}

fn node(endpoint: Endpoint, members: Arc<Members>, broker: PeerAddr, events: mpsc::Sender<NodeEvent>) -> Node {
    let surveyor = Surveyor {
        backend: open_device(DeviceChoice::Cpu).unwrap(),
        folder: None,
        memory_bytes: Some(1 << 30),
        measuring: Arc::default(),
    };
    let profile = DeviceProfile {
        flop_per_s: 1e9,
        memory_bytes_per_s: 1e9,
        memory_bytes: Some(1 << 30),
        host: "h".to_owned(),
        cpu: None,
        kernels: Kernels::Plain,
    };
    let snapshots = Arc::new(SnapshotStore::open(&std::env::temp_dir(), broker.id, "n").unwrap());
    Node {
        endpoint,
        members,
        ticket: Ticket { broker, secret: Secret::from_bytes([7; 32]), relay: None },
        name: "n".to_owned(),
        org: None,
        surveyor,
        profile,
        probes: Probes::default(),
        clock: Arc::default(),
        heartbeats: Heartbeats::default(),
        events,
        broker: watch::Sender::new(None),
        outbox: Outbox::default(),
        patience: Patience::default(),
        alone_since: Instant::now(),
        has_joined: false,
        readable: Arc::new(ReadableData::new([] as [PathBuf; 0]).unwrap()),
        scratch: std::env::temp_dir().into(),
        seeds: std::env::temp_dir().into(),
        snapshots,
        // Asking for free memory would leave the runtime, so it is never free.
        memory: Arc::new(Semaphore::new(0)),
        idle: 0,
        job: None,
        weights: blob::Unclaimed::default(),
        dismissal: Arc::default(),
        is_leaving: false,
    }
}

async fn history(seed: u64) -> String {
    let mut dice = ChaCha8Rng::seed_from_u64(seed);
    let network = Network::new(seed, Weather::stormy(seed));
    let members = Arc::new(Members::default());
    let (listening, endpoint) = (network.endpoint(Arc::new(AdmitAll)), network.endpoint(members.clone()));
    let peer = peer_record(&endpoint.addr());
    let broker = Broker { life: Arc::default(), network: network.clone() };
    let (events, mut inbox) = mpsc::channel(EVENT_QUEUE);
    let mut node = node(endpoint, members, listening.addr(), events.clone());
    let joining = async move {
        loop {
            let error = node.run(&mut inbox).await;
            // The first time is not tried again by itself.
            assert!(!node.has_joined, "seed {seed}: {error}");
        }
    };
    let at_the_door = broker.clone();
    let serving = async move {
        let mut connections = JoinSet::new();
        while let Some(session) = listening.accept().await {
            connections.spawn(at_the_door.clone().serve(session));
        }
    };
    let talking = broker.talk(&events, &peer, &mut dice);
    let ended = async {
        tokio::select! {
            biased;
            () = joining => {}
            () = serving => {}
            () = talking => {}
        }
    };
    let is_over = timeout(LONGEST, ended).await.is_ok();
    assert!(is_over, "seed {seed} hangs:\n{}", network.log());
    let all: Vec<u64> = (1..=SAID).collect();
    let life = std::mem::take(&mut *broker.life.lock().unwrap());
    assert!(life.answered == all && life.told == all, "seed {seed}: {:?}, {:?}", life.answered, life.told);
    sleep(Duration::from_secs(60)).await;
    assert_eq!(network.connections(), 0, "seed {seed}: a connection or a stream is left");
    network.log()
}

#[test]
fn what_is_said_both_ways_comes_once_and_in_order_over_any_storm() {
    all_hold(100, history);
}

#[test]
fn one_seed_gives_one_history() {
    each_is_one(50, history);
}
