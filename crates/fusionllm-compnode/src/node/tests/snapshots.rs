//! Snapshots that a job takes, and begins with.

use fusionllm_protocol::{Snapshot, SnapshotSource};

use super::*;

/// What the CompNode reports until the step of this number is done: losses by step, and snapshots.
async fn until(broker: &mut BrokerEnd, last: u64) -> (Vec<(u64, f64)>, Vec<Snapshot>) {
    let (mut losses, mut held) = (Vec::new(), Vec::new());
    while losses.last().is_none_or(|(step, _)| *step < last) {
        match broker.hear().await {
            FromCompNode::Step { report, .. } => losses.push((report.step, report.loss.unwrap())),
            FromCompNode::Holds { snapshot, cost_s } => {
                assert!(cost_s > 0.0);
                held.push(snapshot);
            }
            other => panic!("{other:?}"),
        }
    }
    (losses, held)
}

async fn next_snapshot(broker: &mut BrokerEnd) -> Snapshot {
    loop {
        match broker.hear().await {
            FromCompNode::Holds { snapshot, .. } => return snapshot,
            FromCompNode::Step { .. } | FromCompNode::Finished { .. } | FromCompNode::ShardFailed { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// A job of six steps, of which a snapshot is taken after the third. Gives all losses and the snapshot.
async fn with_snapshot(house: &House, broker: &mut BrokerEnd) -> (Vec<(u64, f64)>, Snapshot) {
    with_snapshot_of(spec(house.folder.path(), "steps = 6"), broker).await
}

async fn with_snapshot_of(spec: JobSpec, broker: &mut BrokerEnd) -> (Vec<(u64, f64)>, Snapshot) {
    let job = assignment(spec, &dag(256), 1, WeightSource::Seed);
    broker.assign(job).await;
    assert!(matches!(broker.hear().await, FromCompNode::Ready { .. }));
    broker.say(FromBroker::Snapshot { key: key(1), step: 3, halt: false }).await;
    broker.say(FromBroker::Start { key: key(1) }).await;
    let (losses, held) = until(broker, 6).await;
    let snapshot = match held.first() {
        Some(&snapshot) => snapshot,
        None => next_snapshot(broker).await,
    };
    assert_eq!((snapshot.id.key, snapshot.id.step, snapshot.id.node), (key(1), 3, NodeIndex(0)));
    (losses, snapshot)
}

fn from_snapshot(house: &House, snapshot: Snapshot, from: Option<PeerRecord>) -> Assignment {
    let dag = dag(256);
    let params = dag.params().iter().map(|param| param.name.clone()).collect();
    let sources = vec![SnapshotSource { snapshot, from, params }];
    let job = assignment(spec(house.folder.path(), "steps = 6"), &dag, 2, WeightSource::Snapshots(sources));
    Assignment { start_step: 3, ..job }
}

/// The rest of the steps, from the snapshot on.
async fn go_on(broker: &mut BrokerEnd, job: Assignment) -> Vec<(u64, f64)> {
    broker.assign(job).await;
    let ready = broker.hear().await;
    assert!(matches!(ready, FromCompNode::Ready { .. }), "{ready:?}");
    broker.say(FromBroker::Start { key: key(2) }).await;
    until(broker, 6).await.0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_goes_on_bit_for_bit_from_a_snapshot_of_its_own() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    let (losses, snapshot) = with_snapshot(&house, &mut broker).await;
    let again = go_on(&mut broker, from_snapshot(&house, snapshot, None)).await;
    assert_eq!(again, losses[3..]);
    house.compnode.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_goes_on_bit_for_bit_on_another_machine_to_which_the_snapshot_is_lent() {
    let (lender, borrower) = (House::new(None).await, House::new(None).await);
    let (mut lends, mut borrows) = (lender.admit().await, borrower.admit().await);
    let (losses, snapshot) = with_snapshot(&lender, &mut lends).await;
    let (owner, other) = (peer_record(&lends.addr), peer_record(&borrows.addr));
    lends.say(FromBroker::Lend { job: snapshot.id.key.job, to: vec![other] }).await;
    let again = go_on(&mut borrows, from_snapshot(&borrower, snapshot, Some(owner))).await;
    assert_eq!(again, losses[3..]);
    lender.compnode.abort();
    borrower.compnode.abort();
}

/// Whoever asks, and whatever the broker says: who owns the data of a private job lends nobody its embedding.
#[tokio::test(flavor = "multi_thread")]
async fn the_owner_of_private_data_lends_nobody_what_stays_with_it() {
    let (lender, borrower) = (House::new(None).await, House::new(None).await);
    let (mut lends, mut borrows) = (lender.admit().await, borrower.admit().await);
    let mut private = spec(lender.folder.path(), "steps = 6");
    private.data.private = true;
    let (_, snapshot) = with_snapshot_of(private, &mut lends).await;
    let (owner, other) = (peer_record(&lends.addr), peer_record(&borrows.addr));
    lends.say(FromBroker::Lend { job: snapshot.id.key.job, to: vec![other] }).await;
    borrows.assign(from_snapshot(&borrower, snapshot, Some(owner))).await;
    let reason = loop {
        match borrows.hear().await {
            FromCompNode::Failed { reason, .. } => break reason,
            FromCompNode::SnapshotFailed { .. } => {}
            message => panic!("{message:?}"),
        }
    };
    assert!(reason.contains("stays with the owner of private data"), "{reason}");
    lender.compnode.abort();
    borrower.compnode.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_gone_fails_the_placement_and_says_so() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    let (_, snapshot) = with_snapshot(&house, &mut broker).await;
    broker.say(FromBroker::Release { job: snapshot.id.key.job, keep: Vec::new() }).await;
    let key = snapshot.id.key;
    let other = Snapshot { hash: [0; 32], ..snapshot };
    broker.assign(from_snapshot(&house, other, None)).await;
    let (mut told, gone) = (None, "the snapshot of step 3: it is not here any more");
    let failed = loop {
        match broker.hear().await {
            FromCompNode::Failed { reason, bad_input, .. } => break (reason, bad_input),
            FromCompNode::Finished { key: of } => assert_eq!(of, key),
            FromCompNode::SnapshotFailed { id, is_late, reason } => told = Some((id, is_late, reason)),
            message => panic!("{message:?}"),
        }
    };
    assert_eq!(failed, (gone.to_owned(), false));
    // So that no other placement begins with it.
    assert_eq!(told, Some((snapshot.id, false, gone.to_owned())));
    house.compnode.abort();
}

/// A process that comes back says what it has before it says anything else.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_is_told_to_a_broker_that_knows_nothing_of_it() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    let (_, snapshot) = with_snapshot(&house, &mut broker).await;
    broker.session.close(1, "the broker restarts");
    let mut broker = house.admit().await;
    assert_eq!(broker.hear().await, FromCompNode::Holds { snapshot, cost_s: 0.0 });
    house.compnode.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_has_passed_is_said_to_have_passed() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    let job = assignment(spec(house.folder.path(), "steps = 100000"), &dag(256), 1, WeightSource::Seed);
    broker.assign(job).await;
    assert!(matches!(broker.hear().await, FromCompNode::Ready { .. }));
    broker.say(FromBroker::Start { key: key(1) }).await;
    until(&mut broker, 2).await;
    broker.say(FromBroker::Snapshot { key: key(1), step: 1, halt: false }).await;
    loop {
        match broker.hear().await {
            FromCompNode::Step { .. } => {}
            FromCompNode::SnapshotFailed { id, is_late, .. } => break assert!(id.step == 1 && is_late),
            other => panic!("{other:?}"),
        }
    }
    house.compnode.abort();
}

/// When the work moves, nothing that is done is lost, and nothing is done that would be.
#[tokio::test(flavor = "multi_thread")]
async fn a_halt_holds_training_after_the_snapshot_until_the_placement_ends() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    let job = assignment(spec(house.folder.path(), "steps = 6"), &dag(256), 1, WeightSource::Seed);
    broker.assign(job).await;
    assert!(matches!(broker.hear().await, FromCompNode::Ready { .. }));
    broker.say(FromBroker::Snapshot { key: key(1), step: 3, halt: true }).await;
    broker.say(FromBroker::Start { key: key(1) }).await;
    let (losses, _) = until(&mut broker, 3).await;
    assert_eq!(losses.len(), 3);
    let snapshot = next_snapshot(&mut broker).await;
    let silence = timeout(Duration::from_millis(500), broker.hear()).await;
    assert!(silence.is_err(), "{silence:?}");
    broker.say(FromBroker::Abort { key: key(1), reason: "it moves".to_owned() }).await;
    let rest = go_on(&mut broker, from_snapshot(&house, snapshot, None)).await;
    assert_eq!(rest.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [4, 5, 6]);
    house.compnode.abort();
}
