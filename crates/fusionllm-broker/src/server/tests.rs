//! A broker on a real socket, and peers that do not do what our own do.

use fusionllm_protocol::{Greeting, Hello, PROTOCOL_VERSION, PeerRecord, Role, Welcome, decode, encode};
use fusionllm_transport::{AdmitAll, FrameSink, FrameSource, Session};

use super::start::start_of;
use super::*;
use crate::run_dir::{FolderLock, RunStart};

/// A broker on loopback, and an endpoint to reach it from.
struct Bench {
    folder: tempfile::TempDir,
    broker: Broker,
    endpoint: Endpoint,
}

impl Bench {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = BrokerConfig {
            bind: "127.0.0.1:0".parse().unwrap(),
            advertise: Vec::new(),
            relay: None,
            state_dir: folder.path().join("state"),
            scratch: None,
            resumed_by: crate::ResumedBy::default(),
            runs_dir: folder.path().join("runs"),
            checkpoint_dirs: Vec::new(),
            model_dirs: Vec::new(),
        };
        let broker = Broker::start(config).await.unwrap();
        let config = EndpointConfig::new(Identity::generate(), "127.0.0.1:0".parse().unwrap());
        let endpoint = Endpoint::bind(config, Arc::new(AdmitAll)).await.unwrap();
        Self { folder, broker, endpoint }
    }

    async fn connect(&self) -> (Session, FrameSink, FrameSource) {
        let session = self.endpoint.connect(&self.broker.ticket().broker).await.unwrap();
        let (sink, source) = session.open_bi().await.unwrap();
        (session, sink, source)
    }

    /// The first frame that comes back for `frame`.
    async fn answer(&self, frame: &[u8]) -> Option<Vec<u8>> {
        let (session, mut sink, mut source) = self.connect().await;
        sink.send(frame).await.unwrap();
        let answer = source.recv().await.ok().flatten();
        session.close(0, "done");
        answer
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_of_another_version_hears_ours() {
    let bench = Bench::new().await;
    let later = bench.answer(&Greeting { version: 99 }.to_bytes()).await.unwrap();
    assert_eq!(Greeting::from_bytes(&later), Some(Greeting::OURS));
    // A hello as it was before greetings: version, secret, role.
    let mut hello = vec![6];
    hello.extend([0; 32]);
    hello.push(1);
    let Welcome::Refused { reason } = decode(&bench.answer(&hello).await.unwrap()).unwrap() else { panic!("let in") };
    assert_eq!(
        reason,
        format!("you speak protocol version 6, this broker speaks {PROTOCOL_VERSION}: use the same release")
    );
    assert_eq!(bench.answer(b"GET / HTTP/1.1").await, None);
}

/// Of two jobs of one name in one second, the first may be at work already.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_directory_in_use_makes_the_next_job_take_another_name() {
    let bench = Bench::new().await;
    let base = bench.folder.path().join("runs/x-20260101-000000");
    std::fs::create_dir_all(&base).unwrap();
    let _first = FolderLock::take(&base, &RunStart::new().run).unwrap();
    let spec = crate::testing::spec(&[]);
    let start = start_of(&spec, None).unwrap();
    let handle = &bench.broker.handle;
    let submitted = handle.submit_at(spec, start, RunDirChoice::Free(base.clone())).await.unwrap();
    assert_eq!(submitted.run_dir, base.with_file_name("x-20260101-000000-2"));
}

/// What a CompNode says of itself is shown in `status` and in logs.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_compnode_says_of_itself_cannot_act_on_a_terminal() {
    let bench = Bench::new().await;
    let secret = *bench.broker.ticket().secret.as_bytes();
    let (session, mut sink, mut source) = bench.connect().await;
    let addr = PeerRecord { id: [0; 32], addrs: Vec::new() };
    let device = "cpu\u{1b}]0;mine\u{7}\nwarning: forged".to_owned();
    let profile = crate::testing::profile("host\u{1b}[2J\u{202e}");
    let role = Role::CompNode { name: "n".to_owned(), device, addr, profile, org: None, resume: None, standing: None };
    sink.send(&Greeting::OURS.to_bytes()).await.unwrap();
    sink.send(&encode(&Hello { secret, role }).unwrap()).await.unwrap();
    source.recv().await.unwrap().unwrap();
    let Welcome::Accepted { .. } = decode(&source.recv().await.unwrap().unwrap()).unwrap() else { panic!("refused") };
    let status = bench.broker.handle.status().await.unwrap();
    assert_eq!(status.compnodes[0].device, "cpu\u{fffd}]0;mine\u{fffd} warning: forged");
    session.close(0, "done");
}
