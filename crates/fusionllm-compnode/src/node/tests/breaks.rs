//! The connection to the broker breaks, and what was under way goes on.

use super::*;

/// The steps that a broker hears of, up to `last`.
async fn steps_to(broker: &mut BrokerEnd, last: u64) -> Vec<u64> {
    let mut steps = Vec::new();
    while steps.last() != Some(&last) {
        match broker.hear().await {
            FromCompNode::Step { report, .. } => steps.push(report.step),
            other => panic!("{other:?}"),
        }
    }
    steps
}

/// Receives a shard to its end.
pub(super) async fn whole_shard(session: &Session) -> BlobKind {
    let mut stream = timeout(SOON, session.accept_uni()).await.unwrap().unwrap();
    let header: BlobHeader = decode(&stream.recv().await.unwrap().unwrap()).unwrap();
    let mut bytes = 0;
    while let Some(chunk) = stream.recv().await.unwrap() {
        bytes += chunk.len() as u64;
    }
    assert_eq!(bytes, header.bytes);
    header.kind
}

/// A broker that refuses one shard gets the next one, and the job goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_is_not_wanted_costs_nothing_else() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    // Larger than what fits on its way.
    let dag = dag(40_000);
    let mut spec = spec(house.folder.path(), "steps = 3");
    spec.checkpoint.every = 1;
    let job = assignment(spec, &dag, 1, WeightSource::Seed);
    broker.set_to_work(job).await;
    for step in 1..=3 {
        if step == 2 {
            assert_eq!(whole_shard(&broker.session).await, BlobKind::Shard { step, node: NodeIndex(0) });
        } else {
            let mut stream = timeout(SOON, broker.session.accept_uni()).await.unwrap().unwrap();
            stream.recv().await.unwrap();
        }
        broker.say(FromBroker::ShardSettled { key: key(1), step }).await;
    }
    assert_eq!(steps_to(&mut broker, 3).await, [1, 2, 3]);
    assert!(matches!(broker.hear().await, FromCompNode::Finished { .. }));
    house.compnode.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn training_goes_on_while_the_broker_is_away_and_nothing_is_lost_or_told_twice() {
    let house = House::new(None).await;
    let (mut broker, resume) = house.admit_to(None).await;
    assert_eq!(resume, None);
    let settings = "steps = 300\neval_every = 300";
    let job = assignment(spec(house.folder.path(), settings), &dag(256), 1, WeightSource::Seed);
    broker.set_to_work(job).await;
    let mut steps = steps_to(&mut broker, 3).await;
    // What is on its way when the connection breaks is lost with it.
    broker.session.close(1, "cut");
    let (mut broker, resume) = house.admit_to(Some(broker.control)).await;
    assert!(resume >= Some(2), "{resume:?}");
    let last = 300;
    steps.extend(steps_to(&mut broker, last).await);
    assert_eq!(steps, (1..=last).collect::<Vec<_>>());
    // The connection breaks while the shard is under way, and again when all of it has come but nothing was said of it.
    let mut stream = timeout(SOON, broker.session.accept_uni()).await.unwrap().unwrap();
    stream.recv().await.unwrap();
    broker.session.close(1, "cut again");
    for is_settled in [false, true] {
        let (now, resume) = house.admit_to(Some(broker.control)).await;
        broker = now;
        assert!(resume.is_some());
        let kind = whole_shard(&broker.session).await;
        assert_eq!(kind, BlobKind::Shard { step: last, node: NodeIndex(0) });
        if is_settled {
            broker.say(FromBroker::ShardSettled { key: key(1), step: last }).await;
        } else {
            broker.session.close(1, "and again");
        }
    }
    assert!(matches!(broker.hear().await, FromCompNode::Finished { .. }));
    house.compnode.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_begins_anew_ends_the_job_and_may_give_another() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    let job = |generation| {
        let spec = spec(house.folder.path(), "steps = 1000000\neval_every = 1000000");
        assignment(spec, &dag(256), generation, WeightSource::Seed)
    };
    broker.set_to_work(job(1)).await;
    steps_to(&mut broker, 1).await;
    broker.session.close(1, "killed");
    drop(broker);
    let (mut broker, resume) = house.admit_to(None).await;
    assert!(resume.is_some());
    broker.assign(job(2)).await;
    let first = broker.hear().await;
    assert!(
        matches!(first, FromCompNode::Ready { key: RunKey { generation: Generation(2), .. }, .. }),
        "nothing of the old one: {first:?}"
    );
    house.compnode.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_goes_on_with_other_numbers_is_joined_anew() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    assert!(matches!(broker.hear_any().await, FromCompNode::Heartbeat { .. }));
    broker.session.close(1, "cut");
    // More messages than were ever sent.
    let (wrong, resume) = house.welcome(Some(1000)).await;
    assert!(resume.is_some());
    assert_eq!(timeout(SOON, wrong.session.closed()).await.unwrap().code, Some(1), "it comes back");
    let (mut broker, resume) = house.admit_to(None).await;
    assert_eq!(resume, None, "it has forgotten");
    // Both begin with 1 again.
    let job = assignment(spec(house.folder.path(), "steps = 2"), &dag(256), 1, WeightSource::Seed);
    broker.assign(job).await;
    let ready = broker.hear().await;
    assert!(matches!(ready, FromCompNode::Ready { .. }), "{ready:?}");
    house.compnode.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_that_broke_off_with_the_connection_are_taken_from_the_next_one() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    let dag = dag(256);
    let job = assignment(spec(house.folder.path(), "steps = 2"), &dag, 1, WeightSource::Broker);
    let all = weights(&job, &dag);
    broker.assign(job).await;
    let mut sink = broker.session.open_uni().await.unwrap();
    let content = write_shard(&all).unwrap();
    let kind = BlobKind::Weights;
    let header = BlobHeader { key: key(1), kind, bytes: content.len() as u64 };
    sink.send(&encode(&header).unwrap()).await.unwrap();
    sink.send(&content[..100]).await.unwrap();
    sleep(Duration::from_millis(200)).await;
    broker.session.close(1, "cut");
    let (mut broker, _) = house.admit_to(Some(broker.control)).await;
    broker.send_weights(key(1), &all).await;
    let ready = broker.hear().await;
    assert!(matches!(ready, FromCompNode::Ready { .. }), "{ready:?}");
    house.compnode.abort();
}

/// Waits for a sign of life, before which nothing must be told of the job.
async fn hears_nothing_of_the_job(broker: &mut BrokerEnd) {
    for _ in 0..2 {
        let heard = broker.hear_any().await;
        assert!(matches!(heard, FromCompNode::Heartbeat { .. }), "{heard:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_was_started_again_hears_of_all_that_it_has_not_written() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    assert_eq!(broker.standing, None);
    let job = assignment(spec(house.folder.path(), "steps = 300"), &dag(256), 1, WeightSource::Seed);
    let placement = placement_hash(&job.placement).unwrap();
    broker.set_to_work(job).await;
    steps_to(&mut broker, 5).await;
    broker.say(FromBroker::HeartbeatAck { number: 0, now_s: 1.0, recorded: Some((key(1), 2)) }).await;
    while broker.control.unconfirmed() > 0 {
        broker.hear_any().await;
    }
    broker.session.close(1, "killed");
    let (mut broker, _) = house.admit_to(None).await;
    let standing = broker.standing.clone().unwrap();
    assert_eq!((standing.key, standing.placement, standing.kept_from), (key(1), placement, 3));
    assert!(standing.done >= 5 && standing.settled == 0 && !standing.halts);
    // One that is killed again before it has decided has heard nothing.
    hears_nothing_of_the_job(&mut broker).await;
    broker.session.close(1, "killed again");
    let (mut broker, _) = house.admit_to(None).await;
    assert_eq!(broker.standing.as_ref().map(|standing| standing.kept_from), Some(3));
    hears_nothing_of_the_job(&mut broker).await;
    broker.say(FromBroker::TakenBack { key: key(1), recorded: 4 }).await;
    assert_eq!(steps_to(&mut broker, 300).await, (5..=300).collect::<Vec<_>>());
    assert_eq!(whole_shard(&broker.session).await, BlobKind::Shard { step: 300, node: NodeIndex(0) });
    broker.say(FromBroker::ShardSettled { key: key(1), step: 300 }).await;
    assert!(matches!(broker.hear().await, FromCompNode::Finished { .. }));
    // Whoever heard of the end may be killed, too.
    broker.session.close(1, "killed once more");
    let (mut broker, _) = house.admit_to(None).await;
    let standing = broker.standing.clone().unwrap();
    assert_eq!((standing.kept_from, standing.done, standing.settled), (5, 300, 300));
    broker.say(FromBroker::TakenBack { key: key(1), recorded: 300 }).await;
    assert!(matches!(broker.hear().await, FromCompNode::Finished { .. }));
    house.compnode.abort();
}

/// What was not at work yet is begun anew by the next broker.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_has_not_started_is_nothing_to_another_broker() {
    let house = House::new(None).await;
    let mut broker = house.admit().await;
    broker.assign(assignment(spec(house.folder.path(), "steps = 2"), &dag(256), 1, WeightSource::Seed)).await;
    assert!(matches!(broker.hear().await, FromCompNode::Ready { .. }));
    broker.session.close(1, "killed");
    let (mut broker, _) = house.admit_to(None).await;
    assert_eq!(broker.standing, None);
    broker.say(FromBroker::Start { key: key(1) }).await;
    hears_nothing_of_the_job(&mut broker).await;
    house.compnode.abort();
}
