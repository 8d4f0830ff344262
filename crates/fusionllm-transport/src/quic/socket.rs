//! The sockets of one identity: one on which peers are awaited, and spare ones to dial from.

use std::net::SocketAddr;

use iroh::endpoint::{BindOpts, EndpointHooks, PortmapperConfig, presets};
use iroh::{RelayMode, RelayUrl, SecretKey};

use super::addresses::{self, Whereabouts};
use super::closing;
use super::relay::Use;
use super::settings;
use crate::error::chain;
use crate::{BindError, CongestionControl, Relay, RelayState, io_reason, is_shortage};

/// The sockets of one identity.
#[derive(Debug)]
pub(super) struct Socket {
    inner: iroh::Endpoint,
    secret: SecretKey,
    bind: SocketAddr,
    congestion: CongestionControl,
    relay: Option<Use>,
    #[cfg(test)]
    spares: std::sync::Mutex<Vec<iroh::Endpoint>>,
}

impl Socket {
    /// Opens the one on which peers are awaited, which alone uses the relay, if there is one. `hooks` decides on every
    /// connection that others open. `outer` are addresses at which it is reached besides its own.
    pub(super) async fn open(
        secret: SecretKey,
        bind: SocketAddr,
        congestion: CongestionControl,
        hooks: impl EndpointHooks + 'static,
        relay: Option<Relay>,
        outer: &[SocketAddr],
    ) -> Result<Self, BindError> {
        let mut builder = builder(secret.clone(), congestion).alpns(settings::alpns()).hooks(hooks);
        let mut used = None;
        if let Some(relay) = relay {
            let of_use = Use::new(&relay).ok_or(BindError::Relay { key: relay.key, port: relay.port })?;
            builder = outer.iter().fold(of_use.set_up(builder, relay), |builder, addr| builder.external_addr(*addr));
            used = Some(of_use);
        }
        let inner = open(bind, builder).await?;
        closing::remember(&inner);
        if let Some(used) = &used {
            tokio::spawn(used.clone().watch(inner.clone()));
        }
        Ok(Self {
            inner,
            secret,
            bind,
            congestion,
            relay: used,
            #[cfg(test)]
            spares: Default::default(),
        })
    }

    pub(super) fn inner(&self) -> &iroh::Endpoint {
        &self.inner
    }

    /// The relay over which peers may be dialled.
    pub(super) fn relay(&self) -> Option<&RelayUrl> {
        self.relay.as_ref().map(Use::url)
    }

    /// How this stands to the relay.
    pub(super) fn relay_state(&self) -> RelayState {
        self.relay.as_ref().map_or(RelayState::None, |relay| relay.state(&self.inner))
    }

    /// Another one of the same identity, on any port, to dial from. Not over the relay, which takes one of an identity.
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

async fn open(bind: SocketAddr, builder: iroh::endpoint::Builder) -> Result<iroh::Endpoint, BindError> {
    let failed = |reason: String| BindError::Address { addr: bind, reason };
    let mut builder = builder;
    for (addr, is_required) in addresses::families(bind) {
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
        Socket { inner, secret, bind, congestion, relay: None, spares: Default::default() }
    }
}
