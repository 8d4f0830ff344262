//! Frames, streams, and how connections end.

use std::sync::Arc;
use std::time::Duration;

use fusionllm_transport::{AdmitAll, CongestionControl, Endpoint, EndpointConfig, FrameSource, Identity, SessionError};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::{Pair, any_port, pair};

/// Bytes that differ along the frame.
fn frame(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_of_any_size_come_through_whole_and_in_order() {
    let Pair { from, to, dialler: _d, acceptor: _a } = pair().await;
    let sizes = [0, 1, 7, 8, 65_537, 70 << 20, 0, 3];
    let sender = tokio::spawn(async move {
        let mut sink = from.open_uni().await.unwrap();
        for size in sizes {
            sink.send(&frame(size)).await.unwrap();
        }
        sink.finish().await.unwrap();
    });
    let mut source = to.accept_uni().await.unwrap();
    for size in sizes {
        let got = source.recv().await.unwrap().unwrap();
        assert!(got == frame(size), "frame of {size} bytes");
    }
    assert_eq!(source.recv().await.unwrap(), None);
    sender.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_streams_do_not_mix() {
    let Pair { from, to, dialler: _d, acceptor: _a } = pair().await;
    let senders: Vec<_> = (0..100u8)
        .map(|n| {
            let from = from.clone();
            tokio::spawn(async move {
                let mut sink = from.open_uni().await.unwrap();
                for _ in 0..5 {
                    sink.send(&vec![n; 10_000 + usize::from(n)]).await.unwrap();
                }
                sink.finish().await.unwrap();
            })
        })
        .collect();
    for _ in 0..100 {
        let mut source = to.accept_uni().await.unwrap();
        let first = source.recv().await.unwrap().unwrap();
        assert_eq!(first.len(), 10_000 + usize::from(first[0]));
        for _ in 1..5 {
            assert!(source.recv().await.unwrap().unwrap() == first);
        }
        assert_eq!(source.recv().await.unwrap(), None);
    }
    for sender in senders {
        sender.await.unwrap();
    }
}

/// Both directions are full of large frames that go on until the pings are through, so each ping passes bulk each way.
#[tokio::test(flavor = "multi_thread")]
async fn small_frames_of_a_higher_priority_pass_bulk_in_both_directions() {
    let Pair { from, to, dialler: _d, acceptor: _a } = pair().await;
    let (over, is_over) = tokio::sync::watch::channel(false);
    let mut bulk = tokio::task::JoinSet::new();
    for (sender, receiver) in [(from.clone(), to.clone()), (to.clone(), from.clone())] {
        let is_over = is_over.clone();
        bulk.spawn(async move {
            let mut sink = sender.open_uni().await.unwrap();
            let bytes = frame(8 << 20);
            sink.send(&bytes).await.unwrap();
            while !*is_over.borrow() {
                sink.send(&bytes).await.unwrap();
            }
            sink.finish().await.unwrap();
        });
        bulk.spawn(async move {
            let mut source = receiver.accept_uni().await.unwrap();
            while let Some(got) = source.recv().await.unwrap() {
                assert_eq!(got.len(), 8 << 20);
            }
        });
    }
    let (mut sink, mut source) = from.open_bi().await.unwrap();
    sink.set_priority(1);
    let answering = tokio::spawn(async move {
        let (mut sink, mut source) = to.accept_bi().await.unwrap();
        sink.set_priority(1);
        while let Some(ping) = source.recv().await.unwrap() {
            sink.send(&ping).await.unwrap();
        }
    });
    for n in 0..100u8 {
        sink.send(&[n]).await.unwrap();
        assert_eq!(source.recv().await.unwrap().unwrap(), [n]);
    }
    sink.finish().await.unwrap();
    over.send(true).unwrap();
    answering.await.unwrap();
    bulk.join_all().await;
}

/// The controller of endpoints that are not on loopback, on a path of a few microseconds.
#[tokio::test(flavor = "multi_thread")]
async fn bursts_and_small_frames_come_through_under_every_congestion_control() {
    for congestion in [CongestionControl::LinkRate, CongestionControl::Bbr3, CongestionControl::Cubic] {
        let open = async || {
            let config = EndpointConfig::new(Identity::generate(), any_port());
            Endpoint::bind(EndpointConfig { congestion, ..config }, Arc::new(AdmitAll)).await.unwrap()
        };
        let (dialler, acceptor) = (open().await, open().await);
        let from = dialler.connect(&acceptor.addr()).await.unwrap();
        let to = acceptor.accept().await.unwrap();
        let sender = tokio::spawn(async move {
            let mut sink = from.open_uni().await.unwrap();
            for size in [10, 300_000, 10, 10, 5 << 20, 10] {
                sink.send(&frame(size)).await.unwrap();
            }
            sink.finish().await.unwrap();
        });
        let mut source = to.accept_uni().await.unwrap();
        for size in [10, 300_000, 10, 10, 5 << 20, 10] {
            assert!(source.recv().await.unwrap().unwrap() == frame(size), "{congestion:?}: {size} bytes");
        }
        sender.await.unwrap();
    }
}

/// noq ends a connection on which a stream buffers too many packets; the receive window keeps it from that.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_lags_stops_the_sender_and_loses_nothing() {
    let Pair { from, to, dialler: _d, acceptor: _a } = pair().await;
    let (blocked, is_blocked) = oneshot::channel();
    let sender = tokio::spawn(async move {
        let mut sink = from.open_uni().await.unwrap();
        let bytes = frame(64 << 20);
        let mut blocked = Some(blocked);
        {
            let mut sending = std::pin::pin!(sink.send(&bytes));
            // Not done within that time: window and send buffer are full.
            while timeout(Duration::from_millis(500), &mut sending).await.map(Result::unwrap).is_err() {
                let _ = blocked.take().map(|b| b.send(()));
            }
        }
        sink.finish().await.unwrap();
    });
    let mut source = to.accept_uni().await.unwrap();
    is_blocked.await.unwrap();
    assert!(source.recv().await.unwrap().unwrap() == frame(64 << 20));
    sender.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reader_hears_why_the_peer_left() {
    let Pair { from, to, dialler: _d, acceptor: _a } = pair().await;
    from.close(7, "moving house");
    let reason = to.closed().await;
    assert_eq!((reason.code, reason.reason.as_str()), (Some(7), "moving house"));
    let error = to.accept_uni().await.unwrap_err();
    assert_eq!(error.to_string(), "the peer closed the connection: moving house");
    assert_eq!(from.open_uni().await.unwrap_err(), SessionError::ClosedHere);
}

async fn first_stream(send: &[u8]) -> (Pair, FrameSource) {
    let pair = pair().await;
    let (mut sink, _source) = pair.from.open_bi().await.unwrap();
    sink.send(send).await.unwrap();
    let (_, source) = pair.to.accept_bi().await.unwrap();
    (pair, source)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_beyond_the_limit_is_refused_before_it_is_read() {
    let (_pair, mut source) = first_stream(&[0; 1000]).await;
    assert_eq!(source.recv_limited(999).await, Err(SessionError::TooLarge { announced: 1000, limit: 999 }));
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_the_endpoint_ends_accepting_and_tells_the_peers() {
    let Pair { from, to: _to, dialler: _d, acceptor } = pair().await;
    timeout(Duration::from_secs(20), acceptor.close()).await.unwrap();
    assert!(acceptor.accept().await.is_none());
    from.closed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_told_apart() {
    let Pair { from, to: _to, dialler, acceptor } = pair().await;
    let again = dialler.connect(&acceptor.addr()).await.unwrap();
    assert!(from.is_same(&from.clone()) && !from.is_same(&again));
    assert!(from.stats().bytes_sent > 0 && from.stats().rtt.is_some());
}
