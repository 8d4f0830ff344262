//! Who may connect.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::{Arc, PoisonError, RwLock};

use crate::PeerId;

/// What becomes of a connection that somebody opens to us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admit {
    /// It is kept, with the room of a member.
    Accept,
    /// It is kept, but has the room of a greeting only, one two-way stream of 64 KiB, until
    /// [`Session::admitted`](crate::Session::admitted).
    OnTrial,
    /// It is closed, and the peer is told why.
    Refuse {
        /// What the peer is told, in one line.
        reason: String,
    },
}

/// Decides on every connection that somebody opens to us, once the peer has proved its key.
pub trait Admission: Send + Sync + Debug {
    /// Whether this peer may connect.
    fn admit(&self, peer: PeerId) -> Admit;
}

/// Everybody may connect.
#[derive(Clone, Copy, Debug, Default)]
pub struct AdmitAll;

impl Admission for AdmitAll {
    fn admit(&self, _peer: PeerId) -> Admit {
        Admit::Accept
    }
}

/// Everybody may connect to say who they are: for a broker, which asks for the ticket's secret before anything else.
#[derive(Clone, Copy, Debug, Default)]
pub struct AdmitOnTrial;

impl Admission for AdmitOnTrial {
    fn admit(&self, _peer: PeerId) -> Admit {
        Admit::OnTrial
    }
}

/// Only listed peers may connect. Clones share the list.
#[derive(Clone, Debug, Default)]
pub struct Members(Arc<RwLock<BTreeSet<PeerId>>>);

impl Members {
    /// Makes the list exactly these.
    pub fn replace(&self, peers: impl IntoIterator<Item = PeerId>) {
        let peers = peers.into_iter().collect();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = peers;
    }

    /// Whether a peer is listed.
    pub fn contains(&self, peer: PeerId) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains(&peer)
    }
}

impl Admission for Members {
    fn admit(&self, peer: PeerId) -> Admit {
        if self.contains(peer) { Admit::Accept } else { Admit::Refuse { reason: "not a member".to_owned() } }
    }
}
