//! Latency and bandwidth over a real connection.

use std::time::Duration;

use fusionllm_transport::{PairSpeed, SessionError, answer_probe, probe};

use crate::{Pair, pair};

async fn probed() -> Result<PairSpeed, SessionError> {
    let Pair { from, to, dialler: _d, acceptor: _a } = pair().await;
    let follower = tokio::spawn(async move { answer_probe(&to).await });
    let speed = probe(&from).await;
    from.close(0, "done");
    // Being closed on is how it ends.
    let _ = follower.await.unwrap();
    speed
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_measures_both_directions() {
    let pair = probed().await.unwrap();
    for direction in [pair.there, pair.back] {
        assert!(direction.latency < Duration::from_secs(5), "{pair:?}");
        assert!(direction.bytes_per_s > 1e5 && direction.bytes_per_s < 1e12, "{pair:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_ends_when_the_peer_does_not_answer() {
    let Pair { from, to, dialler: _d, acceptor: _a } = pair().await;
    to.close(0, "no probes here");
    assert!(matches!(probe(&from).await, Err(SessionError::Closed { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_keep_to_the_form_is_not_answered() {
    let Pair { from, to, dialler: _d, acceptor: _a } = pair().await;
    let follower = tokio::spawn(async move { answer_probe(&to).await });
    let (mut sink, _source) = from.open_bi().await.unwrap();
    sink.send(&[2, 255, 255, 255, 255, 255, 255, 255, 255]).await.unwrap();
    assert!(follower.await.unwrap().unwrap_err().to_string().contains("not of our form"));
}
