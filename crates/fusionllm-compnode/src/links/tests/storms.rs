//! The wires of whole jobs over a network that misbehaves from a seed, in simulated time.
//!
//! Each CompNode of a pipeline sends and receives what a task loop would: activations forth, gradients back, evaluations,
//! gradients of a shared parameter, norms. What arrives must be what an unbroken wire would have brought, bit for bit.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use fusionllm_transport::memory::{Network, Weather};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::task::JoinSet;

use super::*;
use crate::channel_codec::ChannelDecoder;
use crate::testing::{all_hold, each_is_one, histories, in_virtual_time};

/// Of what flows over an edge.
const SHAPE: [usize; 2] = [4, 8];
const STEPS: Range<u64> = 2..5;
const MICRO_BATCHES: u32 = 3;
const EVAL_MICRO_BATCHES: u32 = 2;
/// Pieces of the shared parameter.
const PIECES: u32 = 3;
/// No history takes longer: storms last for 15 s, and what they leave behind is noticed within 20 s more.
const LONGEST: Duration = Duration::from_secs(300);

/// Node `node` of a pipeline of one stage each, whose ends hold a parameter both.
fn pipeline(node: u32, peers: Vec<PeerRecord>) -> Assignment {
    let count = peers.len() as u32;
    let base = assignment(node, peers);
    let stage = |n: u32| Stage { id: StageId(n), group: GroupId::FIRST, compnode: NodeIndex(n), ops: vec![OpId(n)] };
    let edge = |n: u32| StageEdge {
        id: EdgeId(n),
        op: OpId(n),
        from: StageId(n),
        to: StageId(n + 1),
        elements: SHAPE.iter().product::<usize>() as u64,
        ..base.placement.edges[0]
    };
    let mut job = base.job.clone();
    job.train.steps = STEPS.end;
    job.train.eval_every = 2;
    job.compression.error_feedback = true;
    job.compression.predict = true;
    let mut placement = base.placement.clone();
    placement.compnodes = (0..count).map(|n| format!("node{n}")).collect();
    placement.stages = (0..count).map(stage).collect();
    placement.edges = (0..count - 1).map(edge).collect();
    placement.shared[0].holders = vec![NodeIndex(0), NodeIndex(count - 1)];
    placement.train.micro_batches = MICRO_BATCHES;
    placement.eval.micro_batches = EVAL_MICRO_BATCHES;
    Assignment { job, placement, start_step: STEPS.start, ..base }
}

/// What is sent into a slot: the same on every run of every seed.
fn sent_into(slot: Slot) -> Message {
    let mut hasher = DefaultHasher::new();
    format!("{slot:?}").hash(&mut hasher);
    let mut dice = ChaCha8Rng::seed_from_u64(hasher.finish());
    // Both ends of transform coding, and of an activation's prediction, hold something from message to message.
    let lossy = ["int4", "bf16", "dense", "topk:0.25:f32", "transform:2", "transform:2"];
    let (shape, codec): (Vec<usize>, Codec) = match slot.channel {
        Channel::Activation(_) | Channel::Gradient(_) => {
            (SHAPE.to_vec(), lossy[dice.random_range(0..lossy.len())].parse().unwrap())
        }
        Channel::Shared { .. } => (vec![dice.random_range(1..40), 4], Codec::Dense),
        Channel::NormPart { .. } | Channel::NormTotal { .. } => (Vec::new(), Codec::Dense),
    };
    let values = (0..shape.iter().product()).map(|_| dice.random_range(-1.0..1.0)).collect();
    let tensor = HostTensor::new(shape, Values::F32(values)).unwrap();
    Message { to: NodeIndex(0), slot, tensor: tensor.into(), codec }
}

/// What a task loop does at a place of its order.
#[derive(Clone, Copy, Debug)]
enum Act {
    Send(NodeIndex, Slot),
    Take(Slot),
}

/// All that node `node` of `count` sends and takes, in its order.
fn script(node: u32, count: u32) -> Vec<Act> {
    let mut acts = Vec::new();
    let is_last = node + 1 == count;
    let at = |channel, step, micro_batch| Slot { channel, pass: Pass::Train, step, micro_batch };
    for step in STEPS {
        for m in 0..MICRO_BATCHES {
            acts.extend((node > 0).then(|| Act::Take(at(Channel::Activation(EdgeId(node - 1)), step, m))));
            let to = NodeIndex(node + 1);
            acts.extend((!is_last).then(|| Act::Send(to, at(Channel::Activation(EdgeId(node)), step, m))));
        }
        for m in 0..MICRO_BATCHES {
            acts.extend((!is_last).then(|| Act::Take(at(Channel::Gradient(EdgeId(node)), step, m))));
            let back = |n: u32| Act::Send(NodeIndex(n), at(Channel::Gradient(EdgeId(n)), step, m));
            acts.extend(node.checked_sub(1).map(back));
        }
        if node == 0 || is_last {
            let other = NodeIndex(count - 1 - node);
            let shared = |from, piece| at(Channel::Shared { id: SharedId(0), from }, step, piece + 1);
            acts.extend((0..PIECES).map(|piece| Act::Send(other, shared(NodeIndex(node), piece))));
            acts.extend((0..PIECES).map(|piece| Act::Take(shared(other, piece))));
        }
        let others = (1..count).map(NodeIndex);
        if node == 0 {
            acts.extend(others.clone().map(|from| Act::Take(at(Channel::NormPart { from }, step, 0))));
            acts.extend(others.map(|to| Act::Send(to, at(Channel::NormTotal { to }, step, 0))));
        } else {
            let own = NodeIndex(node);
            acts.push(Act::Send(NodeIndex(0), at(Channel::NormPart { from: own }, step, 0)));
            acts.push(Act::Take(at(Channel::NormTotal { to: own }, step, 0)));
        }
        if step + 1 == STEPS.end || (step + 1).is_multiple_of(2) {
            let at = |edge, micro_batch| Slot {
                channel: Channel::Activation(EdgeId(edge)),
                pass: Pass::Eval,
                step,
                micro_batch,
            };
            for m in 0..EVAL_MICRO_BATCHES {
                acts.extend(node.checked_sub(1).map(|edge| Act::Take(at(edge, m))));
                acts.extend((!is_last).then(|| Act::Send(NodeIndex(node + 1), at(node, m))));
            }
        }
    }
    acts
}

/// What an unbroken wire brings into each slot that a node takes from.
fn due(node: u32, count: u32, options: ChannelOptions) -> BTreeMap<Slot, HostTensor> {
    let mut ends: BTreeMap<Channel, (ChannelEncoder, ChannelDecoder)> = BTreeMap::new();
    let mut sums: BTreeMap<Channel, [f64; 2]> = BTreeMap::new();
    let mut due = BTreeMap::new();
    for act in script(node, count) {
        let Act::Take(slot) = act else { continue };
        let new = || (ChannelEncoder::new(options, slot.channel), ChannelDecoder::new(options, slot.channel));
        let (encoder, decoder) = ends.entry(slot.channel).or_insert_with(new);
        let Message { tensor, codec, .. } = sent_into(slot);
        let mut bytes = Vec::new();
        encoder.encode(&slot, codec, &tensor, &mut bytes).unwrap();
        let tensor = tensor.into_host().unwrap();
        let shape = tensor.shape().to_vec();
        let arrives = decoder.decode(slot.pass, codec, shape, ElementType::F32, &bytes).unwrap();
        if matches!(slot.channel, Channel::Gradient(_)) {
            let sum = |tensor: &HostTensor| tensor.as_f32().unwrap().iter().map(|&x| f64::from(x)).sum::<f64>();
            let [given, got] = sums.entry(slot.channel).or_default();
            (*given, *got) = (*given + sum(&tensor), *got + sum(&arrives));
            let held = encoder.residual().map_or(0.0, |residual| sum(&residual));
            assert!((*given - *got - held).abs() < 1e-3, "{slot:?}: {given} in, {got} out, {held} held back");
        }
        due.insert(slot, arrives);
    }
    due
}

impl NetworkExchange {
    /// As [`Exchange::send`], for a task in simulated time.
    async fn send_in_time(&mut self, message: Message) -> Result<(), ExchangeError> {
        let sent = self.queue_for(&message)?.send(Outgoing::Message(message)).await;
        sent.map_err(|_| self.closed())
    }

    /// As [`Exchange::receive`]: looks again and again, ever more rarely.
    async fn receive_in_time(&mut self, slot: Slot) -> Result<Arrived, ExchangeError> {
        let mut pause = Duration::from_millis(1);
        loop {
            if let Some(arrived) = self.receive_now(slot)? {
                return Ok(arrived);
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(64));
        }
    }
}

/// One CompNode's task loop.
async fn play(node: u32, count: u32, links: Arc<JobLinks>, network: Network, seed: u64) -> Result<(), ExchangeError> {
    let mut dice = ChaCha8Rng::seed_from_u64(seed ^ u64::from(node) << 32);
    let mut exchange = NetworkExchange::new(Arc::clone(&links), Handle::current());
    let due = due(node, count, links.options);
    for act in script(node, count) {
        sleep(Duration::from_millis(dice.random_range(0..40))).await;
        match act {
            Act::Send(to, slot) => exchange.send_in_time(Message { to, ..sent_into(slot) }).await?,
            Act::Take(slot) => {
                let arrived = exchange.receive_in_time(slot).await?;
                assert_eq!(Some(&arrived.tensor), due.get(&slot), "node {node}: {slot:?}");
                network.note(format_args!("node {node} takes {slot:?}"));
                assert!(exchange.receive_now(slot).unwrap().is_none(), "node {node}: {slot:?} came twice");
            }
        }
    }
    Ok(())
}

/// All nodes of a job, from a seed. Every tenth job is stopped by the broker at some time.
async fn history(seed: u64) -> String {
    let mut dice = ChaCha8Rng::seed_from_u64(seed);
    let network = Network::new(seed, Weather::stormy(seed));
    let count = dice.random_range(2..5u32);
    let stops = (dice.random_range(0..10) == 0).then(|| Duration::from_millis(dice.random_range(0..20_000)));
    let endpoints: Vec<Endpoint> = (0..count).map(|_| network.endpoint(Arc::new(AdmitAll))).collect();
    let peers: Vec<PeerRecord> = endpoints.iter().map(|e| peer_record(&e.addr())).collect();
    let (mut all, mut players, mut accepting) = (Vec::new(), JoinSet::new(), JoinSet::new());
    for (node, endpoint) in (0..).zip(endpoints) {
        let workers = Workers::Simulated(Arc::new(Mutex::new(ChaCha8Rng::seed_from_u64(dice.random()))));
        let links = JobLinks::with_workers(endpoint.clone(), &pipeline(node, peers.clone()), workers, None);
        let to = Arc::clone(&links);
        accepting.spawn(async move {
            while let Some(session) = endpoint.accept().await {
                to.accept(session);
            }
        });
        links.dial_all();
        players.spawn(play(node, count, Arc::clone(&links), network.clone(), seed));
        all.push(links);
    }
    let playing = async {
        while let Some(played) = players.join_next().await {
            played.unwrap().unwrap_or_else(|error| panic!("seed {seed}: {error}\n{}", tail(&network)));
        }
        for links in &all {
            links.drained().await;
        }
        network.note("all is taken and confirmed");
    };
    let limit = stops.unwrap_or(LONGEST);
    let is_done = timeout(limit, playing).await.is_ok();
    assert!(is_done || stops.is_some(), "seed {seed} hangs\n{}", tail(&network));
    for links in &all {
        assert_eq!(links.mailbox.closed().map(|e| e.to_string()), None, "seed {seed}");
        links.abort("the job is over");
    }
    players.shutdown().await;
    // By then each side of the last connection knows that it is over.
    sleep(Duration::from_secs(60)).await;
    accepting.shutdown().await;
    for links in all {
        assert_eq!(links.tasks.count(), 0, "seed {seed}: a task is left");
        assert_eq!(Arc::strong_count(&links), 1, "seed {seed}: something holds the job's wires");
    }
    assert_eq!(network.connections(), 0, "seed {seed}: a connection or a stream is left\n{}", tail(&network));
    // The network's own.
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 1, "seed {seed}");
    network.log()
}

/// A connection breaks, one-sided or not, and no other can be made: who dials says whom it does not reach, in bounded time. The
/// other end may have nothing to send, and then hears of it by the broker.
async fn history_of_a_cut(seed: u64) -> String {
    let lasting = Duration::from_secs(1_000_000);
    let (breaking, stormy_for, outage) = (1.0, lasting, lasting);
    let network = Network::new(seed, Weather { breaking, stormy_for, outage, ..Weather::calm() });
    let endpoints = [0, 1].map(|_| network.endpoint(Arc::new(AdmitAll)));
    let peers: Vec<PeerRecord> = endpoints.iter().map(|e| peer_record(&e.addr())).collect();
    let (mut all, mut accepting) = (Vec::new(), JoinSet::new());
    for (node, endpoint) in (0..).zip(endpoints) {
        let workers = Workers::Simulated(Arc::new(Mutex::new(ChaCha8Rng::seed_from_u64(seed))));
        let links = JobLinks::with_workers(endpoint.clone(), &pipeline(node, peers.clone()), workers, None);
        let to = Arc::clone(&links);
        accepting.spawn(async move {
            while let Some(session) = endpoint.accept().await {
                to.accept(session);
            }
        });
        links.dial_all();
        accepting.spawn({
            let (links, network) = (Arc::clone(&links), network.clone());
            async move {
                let _ = play(node, 2, links, network, seed).await;
            }
        });
        all.push(links);
    }
    let began = tokio::time::Instant::now();
    while all[0].mailbox.closed().is_none() {
        assert!(began.elapsed() < 4 * REDIAL_LIMIT, "seed {seed} hangs\n{}", tail(&network));
        sleep(Duration::from_millis(100)).await;
    }
    let told = all.iter().map(|links| links.mailbox.closed());
    for (node, error) in (0..).zip(told).filter_map(|(node, error)| Some((node, error?))) {
        let is_of_peer = matches!(error, ExchangeError::Unreached { node: NodeIndex(peer), .. } if peer == 1 - node);
        assert!(is_of_peer, "seed {seed}: {node} says {error:?}");
    }
    all.iter().for_each(|links| links.abort("the job is over"));
    accepting.shutdown().await;
    network.log()
}

#[test]
fn a_link_that_stays_cut_is_told_by_who_dials() {
    for seed in 0..histories(50) {
        let log = in_virtual_time(history_of_a_cut(seed));
        assert_eq!(log.matches(" breaks from ").count(), 1, "seed {seed}");
    }
}

fn tail(network: &Network) -> String {
    let log = network.log();
    let lines: Vec<&str> = log.lines().collect();
    let mut tail = String::new();
    lines[lines.len().saturating_sub(120)..].iter().for_each(|line| writeln!(tail, "{line}").unwrap());
    tail
}

#[test]
fn each_message_comes_once_in_order_and_whole_over_any_storm() {
    all_hold(300, history);
}

#[test]
fn one_seed_gives_one_history() {
    each_is_one(50, history);
}
