//! Frames, streams, and how connections end.

use std::time::Duration;

use fusionllm_transport::{FrameSource, SessionError};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::{Pair, pair};

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
