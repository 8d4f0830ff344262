//! How much room a connection has before its peer is let in.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fusionllm_transport::{AdmitAll, AdmitOnTrial, Endpoint, Session, SessionError};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::endpoint;

/// Long enough for everything that is going to come over loopback.
const A_WHILE: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread")]
async fn before_admission_there_is_one_stream_of_64_kib() {
    let (stranger, broker) = (endpoint(AdmitAll).await, endpoint(AdmitOnTrial).await);
    let from = stranger.connect(&broker.addr()).await.unwrap();
    let to = broker.accept().await.unwrap();
    let (mut sink, _source) = from.open_bi().await.unwrap();
    // No second stream of either kind.
    assert!(timeout(A_WHILE, from.open_bi()).await.is_err());
    assert!(timeout(A_WHILE, from.open_uni()).await.is_err());
    let received = to.stats().bytes_received;
    let flood = tokio::spawn(async move { sink.send(&vec![7; 8 << 20]).await.map(|()| sink) });
    sleep(A_WHILE).await;
    let received = to.stats().bytes_received - received;
    assert!(received > 60 << 10 && received < 80 << 10, "{received} bytes");
    assert!(!flood.is_finished());

    // Admitted, all of it comes, and more streams.
    to.admitted();
    let (_answer, mut source) = to.accept_bi().await.unwrap();
    assert_eq!(source.recv().await.unwrap().unwrap(), vec![7; 8 << 20]);
    flood.await.unwrap().unwrap();
    let mut streams = Vec::new();
    for n in 0..16u16 {
        let mut sink = timeout(A_WHILE * 60, from.open_uni()).await.unwrap().unwrap();
        sink.send(&n.to_le_bytes()).await.unwrap();
        streams.push((sink, to.accept_uni().await.unwrap()));
    }
}

/// Opens two-way streams and fills each until no more goes; how many, and how many bytes were taken.
async fn fill(from: &Session) -> (usize, Arc<AtomicUsize>, JoinSet<()>) {
    let (mut count, taken, mut streams) = (0, Arc::new(AtomicUsize::new(0)), JoinSet::new());
    while let Ok(stream) = timeout(A_WHILE, from.open_bi()).await {
        let (mut sink, source) = stream.unwrap();
        let taken = Arc::clone(&taken);
        streams.spawn(async move {
            let frame = vec![7; 64 << 10];
            while sink.send(&frame).await.is_ok() {
                taken.fetch_add(frame.len(), Ordering::Relaxed);
            }
            drop(source);
        });
        count += 1;
    }
    (count, taken, streams)
}

/// A member that is not read from has few streams, and holds bounded memory however many its job has.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_has_the_streams_of_its_role_and_no_more_memory_than_the_links_need() {
    let (caller, acceptor) = (endpoint(AdmitAll).await, endpoint(AdmitAll).await);
    let from = caller.connect(&acceptor.addr()).await.unwrap();
    let to = acceptor.accept().await.unwrap();
    let (count, _taken, _streams) = fill(&from).await;
    assert_eq!(count, 16);

    to.allow_streams(200);
    let (more, taken, _more_streams) = fill(&from).await;
    assert_eq!(more, 200 - 16);
    sleep(A_WHILE).await;
    let unread = to.stats().bytes_received;
    // The sender keeps as much as is unconfirmed beside what has come.
    let taken = taken.load(Ordering::Relaxed);
    assert!((30 << 20..80 << 20).contains(&unread), "{unread} bytes came, {taken} were taken");
    to.allow_streams(1);
    assert!(timeout(A_WHILE, from.closed()).await.is_err(), "a smaller number ends nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_dials_has_room_for_the_answer_at_once() {
    let (caller, broker) = (endpoint(AdmitAll).await, endpoint(AdmitOnTrial).await);
    let from = caller.connect(&broker.addr()).await.unwrap();
    let to = broker.accept().await.unwrap();
    let sending = tokio::spawn(async move {
        let mut sink = to.open_uni().await.unwrap();
        sink.send(&vec![1; 4 << 20]).await.unwrap();
        sink.finish().await.unwrap();
    });
    let mut source = from.accept_uni().await.unwrap();
    assert_eq!(source.recv().await.unwrap().unwrap().len(), 4 << 20);
    // The sender is not told that nobody reads on before it has said that this was all.
    sending.await.unwrap();
    drop(source);
}

async fn guests(broker: &Endpoint, count: usize) -> (Endpoint, Vec<fusionllm_transport::Session>) {
    let stranger = endpoint(AdmitAll).await;
    let mut sessions = Vec::new();
    for _ in 0..count {
        sessions.push(stranger.connect(&broker.addr()).await.unwrap());
    }
    (stranger, sessions)
}

/// Two hundred that say nothing; whoever comes after them and says hello gets in, and they stay few.
#[tokio::test(flavor = "multi_thread")]
async fn many_that_say_nothing_keep_nobody_out() {
    let broker = endpoint(AdmitOnTrial).await;
    let accepting = broker.clone();
    let accepted = tokio::spawn(async move {
        let mut greeted = JoinSet::new();
        while let Some(session) = accepting.accept().await {
            greeted.spawn(async move {
                let (mut sink, mut source) = session.accept_bi().await?;
                let hello = source.recv().await?;
                session.admitted();
                sink.send(&hello.unwrap_or_default()).await?;
                session.closed().await;
                Ok::<_, SessionError>(())
            });
        }
        greeted.shutdown().await;
    });
    let (_silent, sessions) = guests(&broker, 200).await;
    let (_honest, honest) = guests(&broker, 1).await;
    let (mut sink, mut source) = honest[0].open_bi().await.unwrap();
    sink.send(b"hello").await.unwrap();
    assert_eq!(timeout(A_WHILE * 60, source.recv()).await.unwrap().unwrap().unwrap(), b"hello");
    let mut sent_away = 0;
    for session in &sessions {
        if let Ok(reason) = timeout(Duration::from_millis(20), session.closed()).await {
            assert_eq!((reason.code, reason.reason.contains("too many")), (Some(503), true), "{reason:?}");
            sent_away += 1;
        }
    }
    assert!((70..=75).contains(&sent_away), "{sent_away}");
    // One that was admitted stays, whoever comes.
    let (_more, _sessions) = guests(&broker, 150).await;
    assert!(timeout(A_WHILE, honest[0].closed()).await.is_err());
    broker.close().await;
    accepted.await.unwrap();
}
