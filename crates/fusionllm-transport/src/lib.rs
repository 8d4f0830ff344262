//! Bytes between authenticated peers: identity, tickets, admission, connections, streams of frames, probes.
//!
//! QUIC by [iroh](https://docs.rs/iroh) between public-key identities, encrypted and authenticated both ways. No
//! relay, no address lookup, no third party: peers are dialled at the addresses that they gave. What the bytes mean
//! is not known here.

mod accept;
mod addresses;
mod admission;
mod closing;
mod congestion;
mod dial;
mod doorway;
mod endpoint;
mod error;
mod files;
mod handshakes;
mod identity;
mod nudge;
mod peer;
mod private;
mod probe;
mod session;
mod settings;
mod shell;
mod stream;
mod throttle;
mod ticket;

pub use admission::{Admission, Admit, AdmitAll, AdmitOnTrial, Members};
pub use closing::close_all;
pub use endpoint::{CongestionControl, Endpoint, EndpointConfig};
pub use error::{BindError, ConnectError, IdentityError, PrivateError, SessionError, TicketError};
pub use files::{
    is_same_file, no_folder_above, open_or_make_regular, open_regular, read_regular, read_regular_text,
    read_regular_text_within, read_text, without_temporary_name,
};
pub use identity::Identity;
pub use peer::{PeerAddr, PeerId};
pub use private::{check_private, make_private_dir, read_private};
pub use probe::{DirectionSpeed, PairSpeed, answer_probe, probe};
pub use session::{CloseReason, Session, SessionStats};
pub use shell::{shell_path, shell_word};
pub use stream::{FrameSink, FrameSource, MAX_FRAME_BYTES, StreamMeter};
pub use ticket::{Secret, Ticket};
