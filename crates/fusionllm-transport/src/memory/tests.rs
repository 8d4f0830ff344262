//! What the network in memory promises to those who test over it.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::*;
use crate::{AdmitAll, AdmitOnTrial, ConnectError, FrameSink, FrameSource, Members, Session, SessionError};

const SOON: Duration = Duration::from_secs(60);

fn in_virtual_time<T>(history: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async { timeout(Duration::from_secs(600), history).await.expect("it does not end") })
}

async fn pair(network: &Network) -> (Endpoint, Endpoint, Session, Session) {
    let (a, b) = (network.endpoint(Arc::new(AdmitAll)), network.endpoint(Arc::new(AdmitAll)));
    let from = a.connect(&b.addr()).await.unwrap();
    let to = b.accept().await.unwrap();
    (a, b, from, to)
}

#[test]
fn frames_come_through_and_nothing_is_left() {
    in_virtual_time(async {
        let weather = Weather { window: 100, ..Weather::calm() };
        let network = Network::new(1, weather);
        let (a, b, from, to) = pair(&network).await;
        assert_eq!((from.peer(), to.peer()), (b.id(), a.id()));
        let frames: Vec<Vec<u8>> = [0, 1, 99, 5000].map(|n| (0..n).map(|i| i as u8).collect()).into();
        let sent = frames.clone();
        let sending = tokio::spawn(async move {
            let (mut sink, source) = from.open_bi().await.unwrap();
            for frame in &sent {
                sink.send(frame).await.unwrap();
            }
            sink.finish().await.unwrap();
            (from, source)
        });
        let (sink, mut source) = to.accept_bi().await.unwrap();
        for frame in frames {
            assert_eq!(source.recv().await.unwrap(), Some(frame));
        }
        assert_eq!(source.recv().await.unwrap(), None);
        let (from, mut back) = sending.await.unwrap();
        drop(sink);
        assert_eq!(back.recv().await.unwrap(), None);
        from.close(7, "done");
        let closed = to.closed().await;
        assert_eq!((closed.code, closed.reason.as_str()), (Some(7), "done"));
        assert!(matches!(from.open_uni().await, Err(SessionError::ClosedHere)));
        assert_eq!(network.connections(), 1);
        drop((from, to, source, back));
        assert_eq!(network.connections(), 0);
    });
}

#[test]
fn a_peer_has_the_streams_that_it_is_allowed() {
    in_virtual_time(async {
        let network = Network::new(2, Weather::calm());
        let (guest, host) = (network.endpoint(Arc::new(AdmitAll)), network.endpoint(Arc::new(AdmitOnTrial)));
        let from = guest.connect(&host.addr()).await.unwrap();
        let to = host.accept().await.unwrap();
        let _first = from.open_bi().await.unwrap();
        assert!(timeout(SOON, from.open_bi()).await.is_err() && timeout(SOON, from.open_uni()).await.is_err());
        to.admitted();
        let mut held: Vec<(FrameSink, FrameSource)> = Vec::new();
        while let Ok(stream) = timeout(SOON, from.open_bi()).await {
            held.push(stream.unwrap());
        }
        assert_eq!(held.len(), 15);
        // One is done once both sides have let go of it.
        let (mut sink, source) = held.pop().unwrap();
        sink.send(b"x").await.unwrap();
        drop((sink, source));
        assert!(timeout(SOON, from.open_bi()).await.is_err());
        for _ in 0..16 {
            drop(timeout(SOON, to.accept_bi()).await.unwrap().unwrap());
        }
        timeout(SOON, from.open_bi()).await.unwrap().unwrap();
    });
}

#[test]
fn strangers_are_refused_and_who_is_not_there_does_not_answer() {
    in_virtual_time(async {
        let network = Network::new(3, Weather::calm());
        let (a, b) = (network.endpoint(Arc::new(AdmitAll)), network.endpoint(Arc::new(Members::default())));
        let session = a.connect(&b.addr()).await.unwrap();
        assert_eq!(session.closed().await.code, Some(403));
        let addr = b.addr();
        drop(b);
        let began = Instant::now();
        assert!(matches!(a.connect(&addr).await, Err(ConnectError::Unreachable { .. })));
        assert!(began.elapsed() >= Duration::from_secs(10));
    });
}

/// Numbers from one side, on each connection until it breaks; what came over each.
async fn counted(seed: u64) -> (Vec<Vec<u64>>, String) {
    let network = Network::new(seed, Weather::stormy(seed));
    let (a, b) = (network.endpoint(Arc::new(AdmitAll)), network.endpoint(Arc::new(AdmitAll)));
    let to = b.addr();
    let dialling = async move {
        let mut next = 0u64;
        while next < 300 {
            let Ok(session) = a.connect(&to).await else { continue };
            let Ok(mut sink) = session.open_uni().await else { continue };
            while next < 300 && sink.send(&next.to_le_bytes()).await.is_ok() {
                next += 1;
                sleep(Duration::from_millis(20)).await;
            }
            if sink.finish().await.is_err() {
                let _ = session.closed().await;
            }
        }
    };
    let mut heard = JoinSet::new();
    let accepting = async {
        while let Some(session) = b.accept().await {
            heard.spawn(async move {
                let mut numbers = Vec::new();
                let Ok(mut source) = session.accept_uni().await else { return numbers };
                while let Ok(Some(frame)) = source.recv().await {
                    numbers.push(u64::from_le_bytes(frame.try_into().unwrap()));
                }
                numbers
            });
        }
    };
    tokio::select! {
        biased;
        () = dialling => {}
        () = accepting => {}
    }
    let heard = heard.join_all().await;
    // By then what was on its way has come, and is not accepted.
    sleep(SOON).await;
    drop(b);
    assert_eq!(network.connections(), 0, "{}", network.log());
    (heard, network.log())
}

#[test]
fn a_storm_loses_ends_and_never_the_middle_and_is_the_same_each_time() {
    let (mut came, mut connections) = (0, 0);
    for seed in 0..50 {
        let (heard, log) = in_virtual_time(counted(seed));
        for numbers in &heard {
            assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "seed {seed}: {numbers:?}");
            came += numbers.len();
            connections += 1;
        }
        assert!(in_virtual_time(counted(seed)).1 == log, "seed {seed} has two histories");
    }
    // Enough breaks, and not all the time.
    assert!(connections > 150 && came > 5_000, "{connections} connections, {came} numbers");
}
