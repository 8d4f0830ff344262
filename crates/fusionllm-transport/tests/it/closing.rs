//! Endpoints that nobody closes. In a process of its own, since it closes all.

use std::io::Write;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fusionllm_transport::{AdmitAll, close_all};
use tokio::time::timeout;
use tracing_subscriber::fmt::MakeWriter;

use crate::{Pair, endpoint, pair};

const AS_CHILD: &str = "FUSIONLLM_TEST_CLOSING";

/// Collects a log.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[test]
fn endpoints_that_are_only_dropped_say_goodbye_and_nothing_else() {
    if std::env::var_os(AS_CHILD).is_none() {
        let name = "closing::endpoints_that_are_only_dropped_say_goodbye_and_nothing_else";
        let child = Command::new(std::env::current_exe().unwrap()).args([name, "--exact"]).env(AS_CHILD, "1").output();
        let child = child.unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
        return;
    }
    let log = Log::default();
    tracing_subscriber::fmt().with_writer(log.clone()).with_max_level(tracing::Level::WARN).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let Pair { from, to, dialler, acceptor } = pair().await;
        drop((dialler, from));
        let reason = timeout(Duration::from_secs(30), to.closed()).await.unwrap();
        assert_eq!(reason.code, Some(0), "{reason:?}");
        // One with a connection that never came about, one that a task still has, one that is dropped right before the end.
        let lonely = endpoint(AdmitAll).await;
        let forgotten = lonely.clone();
        tokio::spawn(async move { forgotten.accept().await });
        drop((acceptor, lonely));
        let _dropped = endpoint(AdmitAll).await;
        close_all().await;
    });
    runtime.shutdown_background();
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(text.is_empty(), "{text}");
}
