//! QUIC by [iroh](https://docs.rs/iroh) and noq: what stands behind an [`Endpoint`](crate::Endpoint) in the product.

mod accept;
mod addresses;
pub(crate) mod closing;
mod congestion;
mod connection;
mod dial;
mod doorway;
mod endpoint;
mod handshakes;
mod nudge;
pub(crate) mod relay;
mod settings;
mod socket;
mod throttle;

pub(crate) use endpoint::QuicEndpoint;
