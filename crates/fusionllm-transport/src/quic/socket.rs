//! The sockets of one identity: one on which peers are awaited, and spare ones to dial from.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use iroh::endpoint::{BindOpts, EndpointHooks, PortmapperConfig, presets};
use iroh::{RelayMode, SecretKey};

use super::addresses::{self, Whereabouts};
use super::closing;
use super::settings;
use crate::error::chain;
use crate::{BindError, CongestionControl, io_reason, is_shortage};

/// The sockets of one identity.
#[derive(Debug)]
pub(super) struct Socket {
    inner: iroh::Endpoint,
    secret: SecretKey,
    bind: SocketAddr,
    congestion: CongestionControl,
    #[cfg(test)]
    spares: std::sync::Mutex<Vec<iroh::Endpoint>>,
}

impl Socket {
    /// Opens the one on which peers are awaited. `hooks` decides on every connection that others open.
    pub(super) async fn open(
        secret: SecretKey,
        bind: SocketAddr,
        congestion: CongestionControl,
        hooks: impl EndpointHooks + 'static,
    ) -> Result<Self, BindError> {
        let builder = builder(secret.clone(), congestion).alpns(settings::alpns());
        let inner = open(bind, builder.hooks(hooks)).await?;
        closing::remember(&inner);
        Ok(Self {
            inner,
            secret,
            bind,
            congestion,
            #[cfg(test)]
            spares: Default::default(),
        })
    }

    pub(super) fn inner(&self) -> &iroh::Endpoint {
        &self.inner
    }

    /// Another one of the same identity, on any port, to dial from.
    pub(super) async fn spare(&self) -> Result<iroh::Endpoint, BindError> {
        let bind = SocketAddr::new(self.bind.ip(), 0);
        let spare = open(bind, builder(self.secret.clone(), self.congestion)).await;
        #[cfg(test)]
        self.spares.lock().unwrap().extend(spare.as_ref().ok().cloned());
        spare
    }

    /// All that there ever were.
    #[cfg(test)]
    pub(crate) fn spares(&self) -> Vec<iroh::Endpoint> {
        self.spares.lock().unwrap().clone()
    }

    /// Where it is bound; nothing once it is closed.
    pub(super) fn whereabouts(&self) -> Whereabouts {
        Whereabouts { machine: addresses::own(), sockets: self.inner.bound_sockets() }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        closing::close_later(self.inner.clone());
    }
}

fn builder(secret: SecretKey, congestion: CongestionControl) -> iroh::endpoint::Builder {
    iroh::Endpoint::builder(presets::Minimal)
        .secret_key(secret)
        .clear_ip_transports()
        .relay_mode(RelayMode::Disabled)
        .portmapper_config(PortmapperConfig::Disabled)
        .transport_config(settings::transport_config(congestion))
}

/// The sockets for an address, and whether each must be there.
fn sockets(bind: SocketAddr) -> Vec<(SocketAddr, bool)> {
    let other: IpAddr = match bind.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv6Addr::UNSPECIFIED.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv4Addr::UNSPECIFIED.into(),
        _ => return vec![(bind, true)],
    };
    vec![(bind, true), (SocketAddr::new(other, bind.port()), false)]
}

async fn open(bind: SocketAddr, builder: iroh::endpoint::Builder) -> Result<iroh::Endpoint, BindError> {
    let failed = |reason: String| BindError::Address { addr: bind, reason };
    let mut builder = builder;
    for (addr, is_required) in sockets(bind) {
        let options = BindOpts::default().set_is_required(is_required);
        builder = builder.bind_addr_with_opts(addr, options).map_err(|e| failed(e.to_string()))?;
    }
    builder.bind().await.map_err(|error| match io_of(&error) {
        Some(io) if io.kind() == std::io::ErrorKind::AddrInUse => BindError::PortInUse { addr: bind },
        Some(io) if is_shortage(io) => BindError::Shortage { addr: bind, reason: io_reason(io).to_string() },
        _ => failed(chain(&error)),
    })
}

/// What the operating system said, if it did.
fn io_of<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a std::io::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            // One that carries another says itself nothing of the system.
            return io.get_ref().and_then(|inner| io_of(inner)).or(Some(io));
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::Identity;

    /// On any port of this machine.
    pub(crate) async fn socket() -> Socket {
        let (bind, congestion) = ("127.0.0.1:0".parse().unwrap(), CongestionControl::Cubic);
        let secret = Identity::generate().secret_key();
        let inner = open(bind, builder(secret.clone(), congestion).alpns(settings::alpns())).await.unwrap();
        Socket { inner, secret, bind, congestion, spares: Default::default() }
    }
}
