//! Bytes over one connection for some seconds, counted where they come, by tenth of a second.
//!
//!     stream receive --dir DIR --bind ADDR --seconds 30
//!     stream send    --dir DIR --bind ADDR --peer ADDR --seconds 30 [--control NAME]
//!
//! Both share a folder for their keys. A lost connection is dialled again. `--control` is `link-rate`, `bbr3` or `cubic`. The
//! receiver prints one JSON line: the bytes of each tenth of a second since it began, which it first writes to DIR/began as
//! seconds since 1970. `benches/wire/storms.py` runs it over emulated links.
#![expect(clippy::print_stdout, reason = "a command prints its result")]

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use fusionllm_transport::{
    AdmitAll, CongestionControl, Endpoint, EndpointConfig, FrameSource, Identity, PeerAddr, Session, SessionError,
};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

type Failure = Box<dyn Error + Send + Sync>;

/// One stream carries 2 MiB a round trip at the most.
const STREAMS: usize = 4;
const FRAME_BYTES: usize = 32 << 10;
const TENTH: Duration = Duration::from_millis(100);
/// Between two dials.
const PAUSE: Duration = Duration::from_millis(200);

struct Options(BTreeMap<String, String>);

impl Options {
    fn get(&self, name: &str) -> Result<&str, Failure> {
        self.0.get(name).map(String::as_str).ok_or_else(|| format!("{name} is missing").into())
    }

    fn seconds(&self) -> Result<Duration, Failure> {
        Ok(Duration::from_secs_f64(self.get("--seconds")?.parse()?))
    }

    fn key(&self, role: &str) -> Result<Identity, Failure> {
        Ok(Identity::load_or_create(&Path::new(self.get("--dir")?).join(format!("{role}.key")))?)
    }

    async fn endpoint(&self, role: &str) -> Result<Endpoint, Failure> {
        let mut config = EndpointConfig::new(self.key(role)?, self.get("--bind")?.parse()?);
        config.congestion = match self.0.get("--control").map(String::as_str) {
            Some("bbr3") => CongestionControl::Bbr3,
            Some("cubic") => CongestionControl::Cubic,
            _ => CongestionControl::LinkRate,
        };
        Ok(Endpoint::bind(config, Arc::new(AdmitAll)).await?)
    }
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut words = std::env::args().skip(1);
    let role = words.next().unwrap_or_default();
    let mut options = BTreeMap::new();
    while let (Some(name), Some(value)) = (words.next(), words.next()) {
        options.insert(name, value);
    }
    let options = Options(options);
    match role.as_str() {
        "receive" => receive(&options).await,
        "send" => send(&options).await,
        _ => Err("say send or receive".into()),
    }
}

async fn send(options: &Options) -> Result<(), Failure> {
    let endpoint = options.endpoint("sender").await?;
    let peer = PeerAddr { id: options.key("receiver")?.id(), addrs: vec![options.get("--peer")?.parse()?] };
    let _ = timeout(options.seconds()?, async {
        loop {
            if let Ok(session) = endpoint.connect(&peer).await {
                let mut streams = JoinSet::new();
                for _ in 0..STREAMS {
                    streams.spawn(fill(session.clone()));
                }
                streams.join_next().await;
            }
            sleep(PAUSE).await;
        }
    })
    .await;
    endpoint.close().await;
    Ok(())
}

async fn fill(session: Session) -> Result<(), SessionError> {
    let mut sink = session.open_uni().await?;
    let frame = vec![0; FRAME_BYTES];
    loop {
        sink.send(&frame).await?;
    }
}

async fn receive(options: &Options) -> Result<(), Failure> {
    let endpoint = options.endpoint("receiver").await?;
    let began = Instant::now();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
    std::fs::write(Path::new(options.get("--dir")?).join("began"), now.to_string())?;
    let tenths = Arc::new(Mutex::new(Vec::<u64>::new()));
    let counting = Arc::clone(&tenths);
    let _ = timeout(options.seconds()?, async {
        while let Some(session) = endpoint.accept().await {
            let counting = Arc::clone(&counting);
            tokio::spawn(async move {
                while let Ok(source) = session.accept_uni().await {
                    tokio::spawn(count(source, began, Arc::clone(&counting)));
                }
            });
        }
    })
    .await;
    endpoint.close().await;
    println!("{:?}", *tenths.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(())
}

async fn count(mut source: FrameSource, began: Instant, tenths: Arc<Mutex<Vec<u64>>>) -> Result<(), SessionError> {
    while let Some(frame) = source.recv().await? {
        let tenth = (began.elapsed().as_millis() / TENTH.as_millis()) as usize;
        let mut tenths = tenths.lock().unwrap_or_else(PoisonError::into_inner);
        if tenths.len() <= tenth {
            tenths.resize(tenth + 1, 0);
        }
        tenths[tenth] += frame.len() as u64;
    }
    Ok(())
}
