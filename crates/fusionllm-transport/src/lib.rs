//! Bytes between authenticated peers: identity, tickets, admission, connections, streams of frames, probes.
//!
//! QUIC by [iroh](https://docs.rs/iroh) between public-key identities, encrypted and authenticated both ways. No
//! address lookup, no third party: peers are dialled at the addresses that they gave, and over the relay of their broker if it
//! has one. What the bytes mean is not known here. Tests may have a network in memory instead ([`memory`]), which misbehaves from a seed.

mod admission;
mod config;
mod endpoint;
mod error;
mod files;
mod identity;
pub mod memory;
mod peer;
mod private;
mod probe;
mod quic;
mod relay;
mod relay_state;
mod session;
mod shell;
mod stream;
mod ticket;
mod wire;

pub use admission::{Admission, Admit, AdmitAll, AdmitOnTrial, Members};
pub use config::{CongestionControl, EndpointConfig};
pub use endpoint::Endpoint;
pub use error::{BindError, ConnectError, IdentityError, PrivateError, SessionError, TicketError};
pub use files::{
    FileMode, IoReason, KnownFolder, Stands, folder_above, folder_of, if_usable, io_reason, is_of_path, is_same_file,
    is_shortage, leads_to, no_folder_above, open_or_make_regular, open_regular, read_regular, read_regular_text,
    read_regular_text_within, read_text, remove_if_there, sync_folder, temporary_for, temporary_of,
    without_temporary_name, write_new_whole, write_whole,
};
pub use identity::Identity;
pub use peer::{PeerAddr, PeerId};
pub use private::{check_private, make_private_dir, read_private};
pub use probe::{DirectionSpeed, PairSpeed, answer_probe, probe};
pub use quic::closing::close_all;
pub use quic::relay::{RelayListener, RelayServer};
pub use relay::{Relay, RelayAccess, RelayStanding, RelayToken};
pub use relay_state::RelayState;
pub use session::{CloseReason, Session};
pub use shell::{shell_path, shell_word};
pub use stream::{FrameSink, FrameSource, MAX_FRAME_BYTES, StreamMeter};
pub use ticket::{Secret, Ticket};
pub use wire::{Purpose, SessionStats};
