//! What can go wrong on the way to and from a peer.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::{PeerId, RelayState, io_reason, shell_path};

/// Why an endpoint cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// Another process has the port.
    #[error("address {addr} is in use by another process, choose another port (0 takes any)")]
    PortInUse {
        /// The address to listen on.
        addr: SocketAddr,
    },
    /// The process or the machine has run out of something, such as open files.
    #[error("cannot listen on {addr}: {reason}")]
    Shortage {
        /// Where it was to listen.
        addr: SocketAddr,
        /// What the system said of it.
        reason: String,
    },
    /// The address is not this machine's, or may not be used.
    #[error("cannot listen on {addr}: {reason}")]
    Address {
        /// The address to listen on.
        addr: SocketAddr,
        /// Why nothing can listen there, in one line.
        reason: String,
    },
    /// What a ticket says of a relay cannot be.
    #[error("the ticket names a relay that cannot be: port {port} of peer {key}")]
    Relay {
        /// The key that the relay is to have.
        key: PeerId,
        /// Its port.
        port: u16,
    },
}

impl BindError {
    /// Whether another address would do.
    pub fn is_bad_input(&self) -> bool {
        !matches!(self, Self::Shortage { .. })
    }
}

/// Why a peer cannot be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// No address is known.
    #[error("no address of peer {peer} is known")]
    NoAddress {
        /// The peer that was to be dialled.
        peer: PeerId,
    },
    /// The bytes are no public key.
    #[error("{peer} is not a valid public key")]
    NotAKey {
        /// The bytes that should be a public key.
        peer: PeerId,
    },
    /// All addresses that are known lead back here.
    #[error(
        "peer {peer} tells of addresses that are all this endpoint's own ({}): have it listen on another port or address",
        join(addrs)
    )]
    OnlyOwn {
        /// The peer that was to be dialled.
        peer: PeerId,
        /// The addresses that the peer tells of.
        addrs: Vec<SocketAddr>,
    },
    /// Nobody answered in time.
    #[error("peer {peer} does not answer{} within {limit_s} s{relay}", at(addrs))]
    Unreachable {
        /// The peer that was dialled.
        peer: PeerId,
        /// The addresses that were tried.
        addrs: Vec<SocketAddr>,
        /// Seconds for which they were tried.
        limit_s: u64,
        /// Whether a relay was tried, too.
        relay: RelayState,
    },
    /// The peer or the network said no.
    #[error("cannot connect to peer {peer}{}: {reason}", at(addrs))]
    Failed {
        /// The peer that was dialled.
        peer: PeerId,
        /// The addresses that were tried.
        addrs: Vec<SocketAddr>,
        /// What the peer or the network said, with its causes, in one line.
        reason: String,
    },
}

fn at(addrs: &[SocketAddr]) -> String {
    if addrs.is_empty() { String::new() } else { format!(" at {}", join(addrs)) }
}

fn join(addrs: &[SocketAddr]) -> String {
    addrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Why a connection or a stream cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The peer closed the connection.
    #[error("the peer closed the connection: {reason}")]
    Closed {
        /// The close code that the peer gave, such as 403 where it refuses.
        code: u64,
        /// The peer's reason, in words; may be empty.
        reason: String,
    },
    /// This side closed the connection.
    #[error("the connection is closed")]
    ClosedHere,
    /// Nothing came from the peer for too long.
    #[error("the peer does not answer any more")]
    TimedOut,
    /// The connection broke otherwise.
    #[error("the connection is lost: {reason}")]
    Lost {
        /// How it broke, as the network stack says it.
        reason: String,
    },
    /// The peer gave the stream up.
    #[error("the peer gave up the stream (code {code})")]
    StreamEnded {
        /// The code with which the peer reset or stopped the stream.
        code: u64,
    },
    /// The stream ended within a frame.
    #[error("the stream ended after {got} of {expected} bytes of a frame")]
    Clipped {
        /// Bytes that came.
        got: u64,
        /// Bytes that were announced.
        expected: u64,
    },
    /// A frame is larger than the reader takes.
    #[error("a frame of {announced} bytes was announced, at most {limit} are taken")]
    TooLarge {
        /// Bytes of the frame that was announced.
        announced: u64,
        /// The most bytes that the reader takes in one frame.
        limit: u64,
    },
}

/// Why a text is no ticket.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TicketError {
    /// It does not begin as tickets do.
    #[error("not a ticket: it should begin with `{prefix}`; copy the whole line that the broker printed")]
    Prefix {
        /// How tickets begin.
        prefix: &'static str,
    },
    /// A character that no ticket has.
    #[error("not a ticket: unexpected character at position {position}; copy the whole line that the broker printed")]
    Character {
        /// Position of the character in the text, counted from 1.
        position: usize,
    },
    /// It is cut off or mistyped.
    #[error("the ticket is cut off or mistyped: copy the whole line that the broker printed")]
    Damaged,
    /// It is of another release.
    #[error("the ticket has form {version}, this build reads form {known}: use the broker's release")]
    Version {
        /// Version of the ticket's layout, its first byte.
        version: u8,
        /// The version that this build reads.
        known: u8,
    },
}

/// Why an identity file is unusable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// It is not what this program wrote.
    #[error("identity file {path} is damaged (64 hexadecimal digits expected); remove it to get a new identity")]
    Malformed {
        /// The identity file.
        path: PathBuf,
    },
    /// It could not be read or written, or others may read it.
    #[error(transparent)]
    File(#[from] PrivateError),
}

/// Why a file or folder that is to be its owner's alone cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrivateError {
    /// It could not be read or made.
    #[error("{path}: {}", io_reason(source), path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// Others may use it.
    #[error("{path} can be used by others on this machine (mode {mode:o}): run `chmod {right} {}`", shell_path(path))]
    Readable {
        /// The file or folder.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// The bits that are right, in octal digits.
        right: u32,
    },
    /// It is neither a file nor a folder.
    #[error("{path} is no regular file", path = path.display())]
    NotRegular {
        /// What is there instead.
        path: PathBuf,
    },
    /// It holds no text, or far more than a secret.
    #[error("{path} holds no secret: a short line of text was expected")]
    NotText {
        /// The file that should hold a secret.
        path: PathBuf,
    },
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let said = |error: &(dyn std::error::Error + 'static)| {
        error.downcast_ref().map_or_else(|| error.to_string(), |error| io_reason(error).to_string())
    };
    let mut words = vec![said(error)];
    let mut next = error.source();
    while let Some(error) = next {
        let text = said(error);
        if words.last().is_none_or(|last| !last.contains(&text)) {
            words.push(text);
        }
        next = error.source();
    }
    words.join(": ")
}
