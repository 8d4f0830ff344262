//! A job's wires over connections of this machine: two honest ends, and one that keeps to nothing.

mod storms;

use std::time::Duration;

use fusionllm_codec::{Codec, ElementType, Values};
use fusionllm_graph::{OpId, ParamId};
use fusionllm_planner::{EdgeId, GroupId, PassPlan, Pipeline, Shared, SharedId, Stage, StageEdge, StageId};
use fusionllm_protocol::{
    Generation, JobId, JobSpec, JobView, OpDataHeader, Pass, RunKey, WeightSource, decode, encode,
};
use fusionllm_transport::{AdmitAll, EndpointConfig, FrameSink, FrameSource, Identity};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{sleep, timeout};

use super::*;

const EDGE: EdgeId = EdgeId(0);
const FORTH: Channel = Channel::Activation(EDGE);
const BACK: Channel = Channel::Gradient(EDGE);
const ELEMENTS: usize = 6;
const SOON: Duration = Duration::from_secs(20);

async fn endpoint() -> Endpoint {
    let config = EndpointConfig::new(Identity::generate(), "127.0.0.1:0".parse().unwrap());
    Endpoint::bind(config, Arc::new(AdmitAll)).await.unwrap()
}

/// Node `node` of two stages with an edge between them, 3 micro-batches, steps 2 to 9, an evaluation every 4.
fn assignment(node: u32, peers: Vec<PeerRecord>) -> Assignment {
    let stage = |n: u32| Stage { id: StageId(n), group: GroupId::FIRST, compnode: NodeIndex(n), ops: vec![OpId(n)] };
    let edge = StageEdge {
        id: EDGE,
        op: OpId(0),
        from: StageId(0),
        to: StageId(1),
        gradient: true,
        elements: ELEMENTS as u64,
        activation_codec: Codec::Dense,
        gradient_codec: Codec::Dense,
    };
    let (params, holders) = (vec![ParamId(0)], vec![NodeIndex(0), NodeIndex(1)]);
    let shared = Shared { id: SharedId(0), params, holders, elements: 130 << 14, codec: Codec::Dense };
    let train = PassPlan { micro_batches: 3, orders: Vec::new() };
    let eval = PassPlan { micro_batches: 2, orders: Vec::new() };
    let text = "[model]\nname = \"gpt2\"\n[data]\npath = \"none\"\n[train]\nsteps = 10\neval_every = 4\nwarmup = 0\n";
    Assignment {
        key: RunKey { job: JobId(1), generation: Generation(1) },
        node: NodeIndex(node),
        job: JobView::of(&JobSpec::from_toml(text, &[]).unwrap()),
        graph: String::new(),
        placement: Placement {
            compnodes: vec!["left".to_owned(), "right".to_owned()],
            stages: vec![stage(0), stage(1)],
            edges: vec![edge],
            shared: vec![shared],
            pipeline: Pipeline::OneFOneB,
            recompute: Vec::new(),
            train,
            eval,
        },
        peers,
        start_step: 2,
        planned_bytes: 0,
        weights: WeightSource::Seed,
    }
}

/// One end; connections that come are the job's.
struct Side {
    links: Arc<JobLinks>,
    endpoint: Endpoint,
    accepting: JoinHandle<()>,
}

impl Side {
    fn new(node: u32, endpoint: Endpoint, peers: Vec<PeerRecord>) -> Self {
        let links = JobLinks::new(endpoint.clone(), &assignment(node, peers));
        let (from, to) = (endpoint.clone(), Arc::downgrade(&links));
        let accepting = tokio::spawn(async move {
            while let Some(session) = from.accept().await {
                if let Some(links) = to.upgrade() {
                    links.accept(session);
                }
            }
        });
        Self { links, endpoint, accepting }
    }

    fn exchange(&self) -> NetworkExchange {
        NetworkExchange::new(Arc::clone(&self.links), Handle::current())
    }
}

async fn pair() -> [Side; 2] {
    let endpoints = [endpoint().await, endpoint().await];
    let peers: Vec<PeerRecord> = endpoints.iter().map(|e| peer_record(&e.addr())).collect();
    let [left, right] = endpoints;
    [Side::new(0, left, peers.clone()), Side::new(1, right, peers)]
}

fn slot(channel: Channel, step: u64, micro_batch: u32) -> Slot {
    Slot { channel, pass: Pass::Train, step, micro_batch }
}

fn message(to: u32, slot: Slot) -> Message {
    let values = vec![slot.step as f32 + slot.micro_batch as f32 / 8.0; ELEMENTS];
    let tensor = HostTensor::new(vec![2, 3], Values::F32(values)).unwrap();
    Message { to: NodeIndex(to), slot, tensor: tensor.into(), codec: Codec::Dense }
}

/// Waits until something holds; fails if it does not.
async fn until(what: &str, holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(timeout(SOON, waiting).await.is_ok(), "{what}");
}

/// It is told by the broker, and by nobody else's key.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_has_moved_is_dialled_where_it_is() {
    let [left, right] = [endpoint().await, endpoint().await];
    let there = peer_record(&right.addr());
    let nowhere = PeerRecord { addrs: vec!["127.0.0.1:9".parse().unwrap()], ..there.clone() };
    let left = Side::new(0, left.clone(), vec![peer_record(&left.addr()), nowhere.clone()]);
    let right = Side::new(1, right, vec![peer_record(&left.endpoint.addr()), there.clone()]);
    left.links.dial_all();
    left.links.moved(NodeIndex(1), &PeerRecord { id: [3; 32], ..there.clone() });
    assert_eq!(left.links.peers[1].borrow().addrs, nowhere.addrs);
    left.links.moved(NodeIndex(1), &there);
    until("a connection", || right.links.sessions[0].borrow().is_some()).await;
    until("a sign of life", || right.links.heard(NodeIndex(0)).is_some()).await;
    assert_eq!(left.links.heard(NodeIndex(7)), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_message_comes_once_and_in_order_however_often_the_connection_is_lost() {
    let [left, right] = pair().await;
    let mut sending = left.exchange();
    let places = || (2..8).flat_map(|step| (0..3).map(move |m| slot(FORTH, step, m)));
    let sent = spawn_blocking(move || places().for_each(|slot| sending.send(message(1, slot)).unwrap()));
    let mut taking = right.exchange();
    let taken = spawn_blocking(move || {
        for slot in places() {
            let arrived = taking.receive(slot).unwrap();
            assert_eq!(arrived.tensor, message(1, slot).tensor.into_host().unwrap(), "{slot:?}");
            std::thread::sleep(Duration::from_millis(30));
        }
    });
    let cutter = async {
        loop {
            sleep(Duration::from_millis(70)).await;
            if let Some(session) = left.links.sessions[1].borrow().clone() {
                session.close(1, "cut");
            }
        }
    };
    tokio::select! {
        taken = timeout(Duration::from_secs(60), taken) => taken.unwrap().unwrap(),
        () = cutter => unreachable!(),
    }
    sent.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_dials_does_so_again_though_it_has_sent_nothing() {
    let [left, right] = pair().await;
    left.links.dial_all();
    for _ in 0..3 {
        until("it is connected", || right.links.sessions[0].borrow().is_some()).await;
        let session = right.links.sessions[0].borrow().clone().unwrap();
        session.close(1, "cut");
        until("that is noticed", || right.links.sessions[0].borrow().as_ref().is_none_or(|s| !s.is_same(&session)))
            .await;
    }
    until("it is connected again", || right.links.sessions[0].borrow().is_some()).await;
    let (mut sending, mut taking, slot) = (right.exchange(), left.exchange(), slot(BACK, 2, 0));
    spawn_blocking(move || sending.send(message(0, slot))).await.unwrap().unwrap();
    timeout(SOON, spawn_blocking(move || taking.receive(slot))).await.unwrap().unwrap().unwrap();
    [left, right].iter().for_each(|side| side.links.abort("the test is over"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aborted_job_leaves_no_task_connection_or_memory() {
    let [left, right] = pair().await;
    let mut sending = left.exchange();
    // More than the receiver ever takes, so the channel stays open.
    let (links, full) = (Arc::clone(&left.links), left.links.window(FORTH) as u32);
    spawn_blocking(move || (0..full.min(3)).for_each(|m| sending.send(message(1, slot(FORTH, 2, m))).unwrap()))
        .await
        .unwrap();
    until("it is connected", || right.links.sessions[0].borrow().is_some()).await;
    let session = right.links.sessions[0].borrow().clone().unwrap();
    let drained = tokio::spawn(async move { links.drained().await });
    sleep(Duration::from_millis(100)).await;
    assert!(!drained.is_finished(), "what was sent is not taken");

    left.links.abort("the job was stopped");
    assert!(timeout(SOON, drained).await.is_ok(), "nothing waits for what will not be taken");
    assert_eq!(timeout(SOON, session.closed()).await.unwrap().reason, "the job was stopped");
    until("tasks end", || left.links.tasks.count() == 0).await;
    // The end that accepts may be asked again: nothing begins.
    left.links.accept(right.endpoint.connect(&left.endpoint.addr()).await.unwrap());
    left.links.dial_all();
    let mut late = left.exchange();
    let error = spawn_blocking(move || late.send(message(1, slot(FORTH, 2, 0)))).await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "job aborted: the job was stopped");
    assert_eq!(left.links.tasks.count(), 0);
    left.accepting.abort();
    let weak = Arc::downgrade(&left.links);
    drop(left);
    until("memory is freed", || weak.strong_count() == 0).await;
}

/// A peer that says what it likes to an honest `right`.
struct Rogue {
    right: Side,
    session: Session,
    own: Endpoint,
}

impl Rogue {
    async fn new() -> Self {
        let (own, other) = (endpoint().await, endpoint().await);
        let peers = [&own, &other].map(|e| peer_record(&e.addr())).to_vec();
        let right = Side::new(1, other, peers);
        let session = own.connect(&right.endpoint.addr()).await.unwrap();
        Self { right, session, own }
    }

    async fn open(&self, channel: Channel) -> (FrameSink, FrameSource) {
        let (mut sink, source) = self.session.open_bi().await.unwrap();
        let open = PeerFrame::Open { key: RunKey { job: JobId(1), generation: Generation(1) }, channel };
        sink.send(&encode(&open).unwrap()).await.unwrap();
        (sink, source)
    }

    /// Opens a channel, and waits until the honest side knows.
    async fn opened(&self, channel: Channel) -> (FrameSink, FrameSource) {
        let (sink, mut source) = self.open(channel).await;
        assert!(matches!(decode(&source.recv().await.unwrap().unwrap()), Ok(PeerFrame::Resume { .. })));
        (sink, source)
    }

    /// Why the honest side gives the job up.
    async fn verdict(&self) -> String {
        until("it is noticed", || self.right.links.mailbox.closed().is_some()).await;
        self.right.links.mailbox.closed().unwrap().to_string()
    }
}

fn header(step: u64, micro_batch: u32) -> OpDataHeader {
    let (codec, element) = (Codec::Dense, ElementType::F32);
    OpDataHeader { step, pass: Pass::Train, micro_batch, codec, element, shape: vec![2, 3] }
}

async fn say(sink: &mut FrameSink, number: u64, header: OpDataHeader, payload: &[u8]) {
    sink.send(&encode(&PeerFrame::Message { number, header }).unwrap()).await.unwrap();
    // Refused on the header, the stream may be gone before the payload.
    let _ = sink.send(payload).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_plan_does_not_have_is_refused_with_its_cause_and_before_it_is_read() {
    const PAYLOAD: [u8; 4 * ELEMENTS] = [0; 4 * ELEMENTS];
    let eval = |step, micro_batch| OpDataHeader { pass: Pass::Eval, ..header(step, micro_batch) };
    let shaped = |shape: &[u64]| OpDataHeader { shape: shape.to_vec(), ..header(2, 0) };
    let cases: Vec<(Channel, Vec<OpDataHeader>, &str)> = vec![
        (FORTH, vec![shaped(&[3, 3])], "sent a tensor of shape [3, 3] over Activation(EdgeId(0)), expected 6 elements"),
        (FORTH, vec![shaped(&[1 << 20, 64])], "expected 6 elements"),
        (FORTH, vec![shaped(&[u64::MAX, u64::MAX])], "shape"),
        (FORTH, vec![header(1, 0)], "sent step 1, micro-batch 0 over Activation(EdgeId(0)): step 2 or 2 was due"),
        (FORTH, vec![header(3, 0)], "step 2 or 2 was due, of 10"),
        (FORTH, vec![header(u64::MAX, 0)], "step 2 or 2 was due"),
        (FORTH, vec![header(2, 3)], "the pass has 3 micro-batches"),
        (FORTH, vec![header(2, 0), header(2, 0)], "it came after step 2, micro-batch 0"),
        (FORTH, vec![header(2, 1), header(2, 0)], "it came after step 2, micro-batch 1"),
        (FORTH, vec![header(2, 0), eval(2, 0)], "there is no such pass"),
        (FORTH, vec![header(2, 0), header(3, 0), eval(3, 2)], "the pass has 2 micro-batches"),
        (Channel::NormTotal { to: NodeIndex(1) }, vec![header(2, 0)], "expected one real number"),
        (BACK, Vec::new(), "opened Gradient(EdgeId(0)), which by the placement is not its to send"),
        (Channel::Activation(EdgeId(9)), Vec::new(), "not its to send"),
    ];
    for (channel, headers, expected) in cases {
        let rogue = Rogue::new().await;
        let (mut sink, _source) = rogue.open(channel).await;
        for (number, header) in (0..).zip(headers) {
            say(&mut sink, number, header, &PAYLOAD).await;
        }
        let verdict = rogue.verdict().await;
        assert!(verdict.contains(expected) && verdict.contains("`left`"), "{verdict}\nexpected: {expected}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_op_dag_says_which_shape_and_type_are_due() {
    let cases = [
        (
            OpDataHeader { shape: vec![3, 2], ..header(2, 0) },
            "sent a tensor of shape [3, 2]",
            "expected [2, 3], that of op `a`",
        ),
        (OpDataHeader { element: ElementType::I32, ..header(2, 0) }, "sent I32 elements for op `a`", "expected F32"),
    ];
    for (header, what, expected) in cases {
        let rogue = Rogue::new().await;
        rogue.right.links.expect(EdgeTensors::one(EDGE, "a", vec![2, 3], ElementType::F32));
        let (mut sink, _source) = rogue.open(FORTH).await;
        say(&mut sink, 0, header, &[0; 4 * ELEMENTS]).await;
        let verdict = rogue.verdict().await;
        assert!(verdict.contains(what) && verdict.contains(expected), "{verdict}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_is_taken_in_than_the_window_holds() {
    let rogue = Rogue::new().await;
    let (mut sink, _source) = rogue.open(FORTH).await;
    let window = rogue.right.links.window(FORTH) as u64;
    assert!(window < 8);
    let places = (2..10).flat_map(|step| (0..3).map(move |m| header(step, m)));
    for (number, header) in (0..window + 1).zip(places) {
        say(&mut sink, number, header, &[0; 4 * ELEMENTS]).await;
    }
    let verdict = rogue.verdict().await;
    assert!(verdict.contains(&format!("sent more than the {window} messages that may be under way")), "{verdict}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_over_long_frame_fails_the_job_instead_of_being_asked_for_again() {
    let rogue = Rogue::new().await;
    let (mut sink, _source) = rogue.open(FORTH).await;
    say(&mut sink, 0, header(2, 0), &[0; 4 * ELEMENTS + 1]).await;
    let verdict = rogue.verdict().await;
    assert!(verdict.contains("a frame of 25 bytes was announced, at most 24 are taken"), "{verdict}");

    let rogue = Rogue::new().await;
    let _channel = rogue.opened(FORTH).await;
    let (mut sink, _source) = rogue.session.open_bi().await.unwrap();
    let _ = sink.send(&vec![0; CONTROL_FRAME_BYTES as usize + 1]).await;
    assert!(rogue.verdict().await.contains("at most 65536 are taken"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_opens_no_channel_is_closed_and_the_job_goes_on() {
    let rogue = Rogue::new().await;
    let firsts =
        [vec![9; 9], encode(&PeerFrame::Taken { next: 0 }).unwrap(), vec![0; CONTROL_FRAME_BYTES as usize + 1]];
    for first in firsts {
        let session = rogue.own.connect(&rogue.right.endpoint.addr()).await.unwrap();
        let (mut sink, _source) = session.open_bi().await.unwrap();
        let _ = sink.send(&first).await;
        assert_eq!(timeout(SOON, session.closed()).await.unwrap().code, Some(400));
    }
    assert!(rogue.right.links.mailbox.closed().is_none());
    // The peer's own connection was replaced: as after any lost one, it dials again.
    let session = rogue.own.connect(&rogue.right.endpoint.addr()).await.unwrap();
    let rogue = Rogue { session, ..rogue };
    let (mut sink, _source) = rogue.opened(FORTH).await;
    say(&mut sink, 0, header(2, 0), &[0; 4 * ELEMENTS]).await;
    let mut taking = rogue.right.exchange();
    spawn_blocking(move || taking.receive(slot(FORTH, 2, 0))).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn gradients_of_tied_parameters_come_in_their_pieces_and_order() {
    const WIDTH: u64 = 1 << 14;
    let piece = |number: u32, rows: u64| OpDataHeader { shape: vec![rows, WIDTH], ..header(2, number) };
    let rows = |count: u64| OpDataHeader { shape: vec![count], element: ElementType::I32, ..header(2, 0) };
    // 64, 64 and 2 rows.
    let cases: Vec<(bool, Vec<OpDataHeader>, &str)> = vec![
        (false, vec![piece(1, 65)], "expected real numbers [64, 16384], that of piece 0 of `w`"),
        (false, vec![piece(3, 64)], "expected real numbers [2, 16384], that of piece 2 of `w`"),
        (false, vec![OpDataHeader { shape: vec![WIDTH, 64], ..piece(1, 64) }], "expected real numbers [64, 16384]"),
        (false, vec![OpDataHeader { element: ElementType::I32, ..piece(3, 2) }], "expected real numbers"),
        (false, vec![piece(3, 1)], "expected real numbers [2, 16384]"),
        (false, vec![piece(4, 2)], "`w` has 3 pieces"),
        (false, vec![rows(2)], "number 0 of `w`"),
        (false, vec![OpDataHeader { pass: Pass::Eval, ..piece(3, 2) }], "there is no such pass"),
        (false, vec![piece(3, 2), piece(2, 64)], "it came after step 2, micro-batch 3"),
        (false, vec![piece(3, 2), piece(3, 2)], "it came after step 2, micro-batch 3"),
        (true, vec![rows(131)], "number 0 of `w` has at most the 130 numbers of its rows"),
        (true, vec![rows(3), rows(3)], "it came after step 2, micro-batch 0"),
        (true, vec![rows(3), piece(3, 1), piece(1, 2)], "it came after step 2, micro-batch 3"),
        (true, vec![piece(3, 3)], "expected real numbers [2, 16384]"),
        (true, vec![piece(3, 0)], "expected real numbers [2, 16384]"),
    ];
    let channel = Channel::Shared { id: SharedId(0), from: NodeIndex(0) };
    for (sends_rows, headers, expected) in cases {
        let rogue = Rogue::new().await;
        let row_senders = if sends_rows { vec![NodeIndex(0)] } else { Vec::new() };
        rogue.right.links.expect(EdgeTensors::one_shared(SharedId(0), "w", &[130, WIDTH as usize], row_senders));
        let (mut sink, _source) = rogue.open(channel).await;
        for (number, header) in (0..).zip(headers) {
            let payload = vec![0; 4 * header.shape.iter().product::<u64>() as usize];
            say(&mut sink, number, header, &payload).await;
        }
        let verdict = rogue.verdict().await;
        assert!(verdict.contains(expected), "{verdict}\nexpected: {expected}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_has_as_many_streams_as_its_channels_need() {
    let [left, right] = pair().await;
    // An edge, a shared parameter, the norm and a snapshot, each twice.
    assert_eq!((left.links.streams_from(1), right.links.streams_from(0)), (8, 8));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_streams_of_a_channel_the_newer_one_counts() {
    let rogue = Rogue::new().await;
    let mut streams = Vec::new();
    for _ in 0..50 {
        streams.push(timeout(SOON, rogue.opened(FORTH)).await.unwrap());
        // A stream counts as open until its sender lets go of it, too.
        streams.drain(..streams.len().saturating_sub(8));
    }
    let (mut sink, mut source) = streams.pop().unwrap();
    until("older ones end", || rogue.right.links.tasks.count() < 8).await;
    say(&mut sink, 0, header(2, 0), &[0; 4 * ELEMENTS]).await;
    let mut taking = rogue.right.exchange();
    spawn_blocking(move || taking.receive(slot(FORTH, 2, 0))).await.unwrap().unwrap();
    loop {
        let frame = timeout(SOON, source.recv()).await.unwrap().unwrap().unwrap();
        match decode(&frame).unwrap() {
            PeerFrame::Taken { next: 1 } => break,
            other => assert_eq!(other, PeerFrame::Taken { next: 0 }),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_confirms_what_was_never_sent_is_named() {
    for answer in [
        vec![PeerFrame::Resume { next: u64::MAX }],
        vec![PeerFrame::Resume { next: 0 }, PeerFrame::Taken { next: u64::MAX }],
        vec![PeerFrame::Resume { next: 0 }, PeerFrame::Resume { next: 0 }],
        vec![PeerFrame::Taken { next: 0 }],
    ] {
        let rogue = Rogue::new().await;
        let mut sending = rogue.right.exchange();
        until("it is connected", || rogue.right.links.sessions[0].borrow().is_some()).await;
        spawn_blocking(move || sending.send(message(0, slot(BACK, 2, 0)))).await.unwrap().unwrap();
        let (mut sink, _source) = rogue.session.accept_bi().await.unwrap();
        for frame in &answer {
            sink.send(&encode(frame).unwrap()).await.unwrap();
        }
        let verdict = rogue.verdict().await;
        assert!(verdict.contains("`left`") && !verdict.contains("streams in"), "{answer:?}: {verdict}");
    }
}
