//! Speed of OP-Data between two CompNodes, through everything but the task loop: queue, codec, window, QUIC.
//!
//!     goodput receive --dir DIR --bind ADDR --peer ADDR [--mb 16] [--count 4] [--both] [--control NAME]
//!     goodput send    --dir DIR --bind ADDR --peer ADDR ...
//!
//! Both share a folder for their keys. The sender hands over `count` dense tensors of `mb` MiB, with `--both` each to the
//! other at once, and beside them one 4-byte message after another, as the gradient norm is, whose round trip it takes.
//! `--control` is `link-rate`, `bbr3` or `cubic`. One JSON line comes of it. `benches/wire/goodput.py` runs it over
//! emulated links.
#![expect(clippy::print_stdout, reason = "a command prints its result")]

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fusionllm_codec::{Codec, HostTensor, Values};
use fusionllm_compnode::{Exchange, JobLinks, Message, NetworkExchange, Slot};
use fusionllm_graph::OpId;
use fusionllm_planner::{EdgeId, GroupId, NodeIndex, PassPlan, Pipeline, Placement, Stage, StageEdge, StageId};
use fusionllm_protocol::{
    Assignment, Channel, Generation, JobId, JobSpec, JobView, Pass, PeerRecord, RunKey, WeightSource,
};
use fusionllm_transport::{CongestionControl, Endpoint, EndpointConfig, Identity, Members};
use tokio::runtime::Handle;

type Failure = Box<dyn Error + Send + Sync>;

/// The edge of the large tensors.
const BULK: EdgeId = EdgeId(0);
/// What the receiver says of them.
const REPORTS: EdgeId = EdgeId(1);
/// Pings before and after each other, and before the bulk.
const PING_PAUSE: Duration = Duration::from_millis(20);
const QUIET_PINGS: usize = 20;
/// What a ping says, and what the last one says.
const MORE: f32 = 1.0;
const LAST: f32 = 0.0;

struct Options {
    is_sender: bool,
    by_name: BTreeMap<String, String>,
}

impl Options {
    fn parse() -> Result<Self, Failure> {
        let mut words = std::env::args().skip(1);
        let is_sender = match words.next().as_deref() {
            Some("send") => true,
            Some("receive") => false,
            _ => return Err("say send or receive".into()),
        };
        let mut by_name = BTreeMap::new();
        while let Some(name) = words.next() {
            let value = if name == "--both" { Some("yes".to_owned()) } else { words.next() };
            by_name.insert(name.clone(), value.ok_or(format!("{name} needs a value"))?);
        }
        Ok(Self { is_sender, by_name })
    }

    fn get(&self, name: &str) -> Result<&str, Failure> {
        self.by_name.get(name).map(String::as_str).ok_or_else(|| format!("{name} is missing").into())
    }

    fn number(&self, name: &str, default: usize) -> Result<usize, Failure> {
        self.by_name.get(name).map_or(Ok(default), |value| Ok(value.parse()?))
    }
}

/// What both sides run.
struct Wires {
    links: Arc<JobLinks>,
    runtime: Handle,
    elements: usize,
    count: usize,
}

impl Wires {
    fn exchange(&self) -> NetworkExchange {
        NetworkExchange::new(Arc::clone(&self.links), self.runtime.clone())
    }

    /// Hands over all tensors; when that began.
    fn give(&self, to: u32, channel: Channel) -> Result<Instant, Failure> {
        let mut exchange = self.exchange();
        let values: Vec<f32> = (0..self.elements).map(|i| (i as f32).sin()).collect();
        let began = Instant::now();
        for step in 0..self.count {
            send(&mut exchange, to, channel, step as u64, values.clone())?;
        }
        Ok(began)
    }

    /// Takes all tensors; when each came.
    fn take(&self, channel: Channel) -> Result<Vec<Instant>, Failure> {
        let mut exchange = self.exchange();
        (0..self.count).map(|step| Ok(exchange.receive(slot(channel, step as u64))?.at)).collect()
    }

    /// Mbit/s of payload from the first tensor's arrival to the last one's.
    fn speed(&self, arrivals: &[Instant]) -> Option<f64> {
        let (first, last) = (arrivals.first()?, arrivals.last()?);
        let bits = (arrivals.len() - 1) as f64 * self.elements as f64 * 32.0;
        (arrivals.len() > 1).then(|| bits / (*last - *first).as_secs_f64() / 1e6)
    }
}

fn slot(channel: Channel, step: u64) -> Slot {
    Slot { channel, pass: Pass::Train, step, micro_batch: 0 }
}

fn send(exchange: &mut NetworkExchange, to: u32, channel: Channel, step: u64, values: Vec<f32>) -> Result<(), Failure> {
    // A number by itself has no dimensions, as on the wires of a job.
    let shape = if values.len() == 1 { Vec::new() } else { vec![values.len()] };
    let tensor = HostTensor::new(shape, Values::F32(values))?.into();
    Ok(exchange.send(Message { to: NodeIndex(to), slot: slot(channel, step), tensor, codec: Codec::Dense })?)
}

fn assignment(is_sender: bool, peers: Vec<PeerRecord>, elements: usize) -> Result<Assignment, Failure> {
    let stage = |n: u32| Stage { id: StageId(n), group: GroupId::FIRST, compnode: NodeIndex(n), ops: vec![OpId(n)] };
    let edge = |id, elements| StageEdge {
        id,
        op: OpId(0),
        from: StageId(0),
        to: StageId(1),
        gradient: true,
        elements: elements as u64,
        activation_codec: Codec::Dense,
        gradient_codec: Codec::Dense,
    };
    let job = "[model]\nname = \"gpt2\"\n[data]\npath = \"none\"\n[train]\nsteps = 1000000\n";
    let pass = PassPlan { micro_batches: 4, orders: Vec::new() };
    Ok(Assignment {
        key: RunKey { job: JobId(1), generation: Generation(1) },
        node: NodeIndex(u32::from(!is_sender)),
        job: JobView::of(&JobSpec::from_toml(job, &[])?),
        graph: String::new(),
        placement: Placement {
            compnodes: vec!["sender".to_owned(), "receiver".to_owned()],
            stages: vec![stage(0), stage(1)],
            edges: vec![edge(BULK, elements), edge(REPORTS, 1)],
            shared: Vec::new(),
            pipeline: Pipeline::OneFOneB,
            recompute: Vec::new(),
            train: pass.clone(),
            eval: pass,
        },
        peers,
        start_step: 0,
        planned_bytes: 0,
        weights: WeightSource::Seed,
    })
}

fn control(name: &str) -> Result<CongestionControl, Failure> {
    match name {
        "link-rate" => Ok(CongestionControl::LinkRate),
        "bbr3" => Ok(CongestionControl::Bbr3),
        "cubic" => Ok(CongestionControl::Cubic),
        other => Err(format!("no congestion control is called {other}").into()),
    }
}

fn main() -> Result<(), Failure> {
    let options = Options::parse()?;
    let runtime = tokio::runtime::Runtime::new()?;
    let elements = options.number("--mb", 16)? << 18;
    let (wires, endpoint) = runtime.block_on(connect(&options, elements))?;
    let wires = Arc::new(Wires {
        links: wires,
        runtime: runtime.handle().clone(),
        elements,
        count: options.number("--count", 4)?,
    });
    let is_both = options.by_name.contains_key("--both");
    if options.is_sender {
        lead(&wires, is_both)?
    } else {
        follow(&wires, is_both)?
    }
    runtime.block_on(async {
        wires.links.drained().await;
        endpoint.close().await;
    });
    Ok(())
}

async fn connect(options: &Options, elements: usize) -> Result<(Arc<JobLinks>, Endpoint), Failure> {
    let key =
        |name: &str| Identity::load_or_create(&Path::new(options.get("--dir")?).join(name)).map_err(Failure::from);
    let keys = [key("sender.key")?, key("receiver.key")?];
    let (own, peer) = (options.get("--bind")?.parse()?, options.get("--peer")?.parse()?);
    let addrs = if options.is_sender { [own, peer] } else { [peer, own] };
    let members = Members::default();
    members.replace(keys.iter().map(Identity::id));
    let peers = keys.iter().zip(addrs).map(|(k, addr)| PeerRecord { id: *k.id().as_bytes(), addrs: vec![addr] });
    let peers = peers.collect();
    let [sender, receiver] = keys;
    let mut config = EndpointConfig::new(if options.is_sender { sender } else { receiver }, own);
    if let Ok(name) = options.get("--control") {
        config.congestion = control(name)?;
    }
    let endpoint = Endpoint::bind(config, Arc::new(members)).await?;
    let links = JobLinks::new(endpoint.clone(), &assignment(options.is_sender, peers, elements)?);
    let (accepting, into) = (endpoint.clone(), Arc::clone(&links));
    tokio::spawn(async move {
        while let Some(session) = accepting.accept().await {
            into.accept(session);
        }
    });
    Ok((links, endpoint))
}

fn lead(wires: &Arc<Wires>, is_both: bool) -> Result<(), Failure> {
    let is_over = Arc::new(AtomicBool::new(false));
    let (quiet, loaded) = {
        let mut exchange = wires.exchange();
        let mut quiet = Vec::new();
        for step in 0..QUIET_PINGS as u64 {
            quiet.push(ping(&mut exchange, step, MORE)?);
            thread::sleep(PING_PAUSE);
        }
        let is_over = Arc::clone(&is_over);
        let loaded = thread::spawn(move || -> Result<Vec<f64>, Failure> {
            let mut times = Vec::new();
            while !is_over.load(Ordering::Relaxed) {
                times.push(ping(&mut exchange, (QUIET_PINGS + times.len()) as u64, MORE)?);
                thread::sleep(PING_PAUSE);
            }
            ping(&mut exchange, (QUIET_PINGS + times.len()) as u64, LAST)?;
            Ok(times)
        });
        (quiet, loaded)
    };
    let other = Arc::clone(wires);
    let back = is_both.then(|| thread::spawn(move || other.take(Channel::Gradient(BULK))));
    let began = wires.give(1, Channel::Activation(BULK))?;
    let mut exchange = wires.exchange();
    exchange.receive(slot(Channel::Gradient(REPORTS), 0))?;
    let first_s = began.elapsed().as_secs_f64();
    let speed = exchange.receive(slot(Channel::Gradient(REPORTS), 1))?;
    let back = back.map(thread::JoinHandle::join).transpose().map_err(|_| "a thread panicked")?.transpose()?;
    is_over.store(true, Ordering::Relaxed);
    let loaded = loaded.join().map_err(|_| "a thread panicked")??;
    let there = speed.tensor.as_f32().and_then(|v| v.first().copied()).unwrap_or(f32::NAN);
    let mbit = wires.elements as f64 * 32.0 / 1e6;
    let result = serde_json::json!({
        "first_mbit_per_s": mbit / first_s,
        "then_mbit_per_s": there,
        "back_mbit_per_s": back.and_then(|arrivals| wires.speed(&arrivals)),
        "quiet_ms": share(quiet, 0.5) * 1e3,
        "loaded_ms": share(loaded.clone(), 0.5) * 1e3,
        "loaded_95_ms": share(loaded.clone(), 0.95) * 1e3,
        "loaded_most_ms": share(loaded, 1.0) * 1e3,
    });
    println!("{result}");
    Ok(())
}

/// A message there and one back: seconds.
fn ping(exchange: &mut NetworkExchange, step: u64, says: f32) -> Result<f64, Failure> {
    let began = Instant::now();
    send(exchange, 1, Channel::NormTotal { to: NodeIndex(1) }, step, vec![says])?;
    exchange.receive(slot(Channel::NormPart { from: NodeIndex(1) }, step))?;
    Ok(began.elapsed().as_secs_f64())
}

fn follow(wires: &Arc<Wires>, is_both: bool) -> Result<(), Failure> {
    let mut exchange = wires.exchange();
    let (quiet_over, is_quiet_over) = std::sync::mpsc::channel();
    let pong = thread::spawn(move || -> Result<(), Failure> {
        for step in 0.. {
            let ping = exchange.receive(slot(Channel::NormTotal { to: NodeIndex(1) }, step))?;
            send(&mut exchange, 0, Channel::NormPart { from: NodeIndex(1) }, step, vec![MORE])?;
            if step + 1 == QUIET_PINGS as u64 {
                quiet_over.send(())?;
            }
            if ping.tensor.as_f32() == Some(&[LAST]) {
                break;
            }
        }
        Ok(())
    });
    is_quiet_over.recv()?;
    let other = Arc::clone(wires);
    let back = is_both.then(|| thread::spawn(move || other.give(0, Channel::Gradient(BULK))));
    let (mut reports, mut taking) = (wires.exchange(), wires.exchange());
    let mut arrivals = Vec::new();
    for step in 0..wires.count {
        arrivals.push(taking.receive(slot(Channel::Activation(BULK), step as u64))?.at);
        if step == 0 {
            send(&mut reports, 0, Channel::Gradient(REPORTS), 0, vec![0.0])?;
        }
    }
    let speed = wires.speed(&arrivals).unwrap_or(f64::NAN);
    send(&mut reports, 0, Channel::Gradient(REPORTS), 1, vec![speed as f32])?;
    if let Some(back) = back {
        back.join().map_err(|_| "a thread panicked")??;
    }
    pong.join().map_err(|_| "a thread panicked")?
}

/// The value that such a share is not above.
fn share(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values.get((last as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
}
