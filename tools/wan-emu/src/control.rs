//! The control socket: one JSON object a line, and one back for each.
//!
//! ```text
//! {"do": "status"}
//! {"do": "link", "rule": {"from": "berlin", "to": "*", "cut": true}}
//! {"do": "down"}
//! ```
//! The answer is `{"ok": true}`, with a `status` where that was asked, or `{"ok": false, "error": "..."}`.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::fabric::Counters;
use crate::lease;
use crate::link::LinkRule;
use crate::router::Health;

/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest line that is read.
const LINE: u64 = 1 << 16;

/// What may be asked of a running network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What it is and does.
    Status,
    /// Change links.
    Link {
        /// Which, and how.
        rule: Box<LinkRule>,
    },
    /// Take it down.
    Down,
}

/// The answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// Whether it was done.
    pub ok: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Whether the request was at fault, not the network.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bad_request: bool,
    /// What was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
}

/// A running network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub net: String,
    /// The process that carries its packets.
    pub pid: u32,
    /// Seconds since it came up.
    pub up_s: f64,
    /// How well the machine keeps up.
    pub health: Health,
    /// Its nodes.
    pub nodes: Vec<NodeStatus>,
    /// Its directed links.
    pub links: Vec<LinkStatus>,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Where it stands.
    pub site: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its namespace.
    pub namespace: String,
    /// Rate of its own uplink.
    pub up_mbit_per_s: Option<f64>,
    /// Rate of its own downlink.
    pub down_mbit_per_s: Option<f64>,
    /// Packets that it sent faster than this machine could read them: dropped, and by no link.
    pub overrun: u64,
}

/// A directed link.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// Sender.
    pub from: String,
    /// Receiver.
    pub to: String,
    /// Rate.
    pub mbit_per_s: f64,
    /// Delay one way.
    pub latency_ms: f64,
    /// Jitter.
    pub jitter_ms: f64,
    /// Loss.
    pub loss_percent: f64,
    /// Queue.
    pub queue_bytes: u64,
    /// Whether it is cut.
    pub cut: bool,
    /// What became of its packets.
    pub counters: Counters,
}

impl Response {
    /// Done, or not done and why.
    pub fn of(result: Result<Option<Status>, Error>) -> Self {
        match result {
            Ok(status) => Self { ok: true, status, ..Self::default() },
            Err(error) => Self { bad_request: error.is_input(), error: Some(error.to_string()), ..Self::default() },
        }
    }
}

/// A request with the way back to who asked.
pub type Asked = (Request, SyncSender<Response>);

/// Listens for requests, and hands each to `take`.
///
/// # Errors
/// [`Error::Io`].
pub fn listen(net: &str, take: impl Fn(Asked) + Send + 'static) -> Result<(), Error> {
    let path = lease::socket(net);
    // Whoever holds the name owns the socket; another one is left over.
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(Error::io(format!("listen on {}", path.display())))?;
    let serve = move || {
        // Only root can connect, and one after the other is enough.
        for stream in listener.incoming().flatten() {
            let _ = converse(&stream, &take);
        }
    };
    thread::Builder::new().name("control".to_owned()).spawn(serve).map_err(Error::io("start a thread"))?;
    Ok(())
}

fn converse(stream: &UnixStream, take: &impl Fn(Asked)) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if (&mut reader).take(LINE).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let response = match serde_json::from_str(&line) {
            Ok(request) => {
                let (reply, answer) = sync_channel(1);
                take((request, reply));
                let timeout = Error::Router { reason: "it does not answer".to_owned() };
                answer.recv_timeout(PATIENCE).unwrap_or_else(|_| Response::of(Err(timeout)))
            }
            Err(error) => Response::of(Err(Error::input(format!("not a request: {error}")))),
        };
        let mut stream = stream;
        writeln!(stream, "{}", serde_json::to_string(&response)?)?;
    }
}

/// Asks a running network.
///
/// # Errors
/// [`Error::NotUp`], [`Error::Input`], [`Error::Refused`], [`Error::Io`].
pub fn ask(net: &str, request: &Request) -> Result<Option<Status>, Error> {
    let Ok(mut stream) = UnixStream::connect(lease::socket(net)) else {
        return Err(Error::NotUp { net: net.to_owned() });
    };
    let mut exchange = || -> io::Result<Response> {
        stream.set_read_timeout(Some(2 * PATIENCE))?;
        writeln!(stream, "{}", serde_json::to_string(request)?)?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    };
    let response = exchange().map_err(Error::io(format!("talk to network `{net}`")))?;
    if response.ok {
        return Ok(response.status);
    }
    let reason = response.error.unwrap_or_default();
    Err(if response.bad_request { Error::Input { reason } } else { Error::Refused { reason } })
}

/// What a running network is and does.
///
/// # Errors
/// As [`ask`].
pub fn status(net: &str) -> Result<Status, Error> {
    ask(net, &Request::Status)?.ok_or_else(|| Error::Refused { reason: "it told no status".to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_short_lines() {
        let parse = |text: &str| serde_json::from_str::<Request>(text);
        assert_eq!(parse(r#"{"do": "status"}"#).unwrap(), Request::Status);
        let rule = LinkRule { from: "a".to_owned(), to: "*".to_owned(), cut: Some(true), ..LinkRule::default() };
        let request = Request::Link { rule: Box::new(rule) };
        assert_eq!(parse(r#"{"do": "link", "rule": {"from": "a", "to": "*", "cut": true}}"#).unwrap(), request);
        assert_eq!(parse(&serde_json::to_string(&request).unwrap()).unwrap(), request);
        assert!(parse(r#"{"do": "link", "rule": {"from": "a", "speed": 1}}"#).is_err());
        assert_eq!(serde_json::to_string(&Response::of(Ok(None))).unwrap(), r#"{"ok":true}"#);
    }
}
