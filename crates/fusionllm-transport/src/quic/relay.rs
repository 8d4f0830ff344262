//! Over a relay: how an endpoint is set to use that of its broker, and the relay itself.

mod discovery;
mod establish;
mod find;
mod server;
mod tls;

use std::sync::Arc;
use std::time::Duration;

use data_encoding::BASE32_NOPAD;
use iroh::dns::DnsResolver;
use iroh::endpoint::{Builder, NetReportConfig};
use iroh::{Endpoint, RelayConfig, RelayMap, RelayMode, RelayUrl, Watcher};
use iroh_relay::RelayQuicConfig;
use tokio::time::{Instant, interval};

use crate::{PeerId, Relay, RelayState};

pub use server::{RelayListener, RelayServer};

/// How often it is looked whether the relay is there.
const LOOK: Duration = Duration::from_secs(1);
/// A relay that is away for so long is dialled as if for the first time: iroh's own dialling has been seen to stand still.
const ANEW: Duration = Duration::from_secs(45);

/// The relay that an endpoint uses.
#[derive(Clone, Debug)]
pub(super) struct Use {
    url: RelayUrl,
    config: Arc<RelayConfig>,
}

impl Use {
    pub(super) fn new(relay: &Relay) -> Option<Self> {
        let url = url(relay.key, relay.port)?;
        let config = RelayConfig::new(url.clone(), Some(RelayQuicConfig::new(relay.port)));
        Some(Self { url, config: Arc::new(config.with_auth_token(relay.token.to_text())) })
    }

    pub(super) fn url(&self) -> &RelayUrl {
        &self.url
    }

    /// Has an endpoint use it, trust nobody but it, and ask nobody else anything.
    pub(super) fn set_up(&self, builder: Builder, relay: Relay) -> Builder {
        // Where no UDP comes through, this alone finds that the relay is there. It asks the relay and nobody else.
        let mut report = NetReportConfig::minimal();
        report.https_probes = true;
        builder
            .relay_mode(RelayMode::Custom(RelayMap::from_iter([Arc::clone(&self.config)])))
            .ca_tls_config(tls::trust(relay.key))
            .dns_resolver(DnsResolver::custom(find::Finder::new(relay)))
            .net_report_config(report)
    }

    /// Whether the endpoint is connected to it, and if not, why.
    pub(super) fn state(&self, endpoint: &Endpoint) -> RelayState {
        let status = endpoint.home_relay_status().get();
        let status = status.iter().find(|status| *status.url() == self.url);
        if status.is_some_and(|status| status.is_connected()) {
            return RelayState::Connected;
        }
        let denied = status.and_then(|status| status.auth_denied_reason());
        let reason = denied.map_or_else(|| "it does not answer".to_owned(), |reason| format!("it refuses: {reason}"));
        RelayState::Away { reason }
    }

    /// Says when the relay is reached and lost, and has it dialled anew, until the endpoint is closed.
    pub(super) async fn watch(self, endpoint: Endpoint) {
        let closed = endpoint.closed();
        tokio::pin!(closed);
        let mut looks = interval(LOOK);
        let (mut was_connected, mut since) = (None, Instant::now());
        loop {
            tokio::select! {
                () = &mut closed => return,
                _ = looks.tick() => {}
            }
            let state = self.state(&endpoint);
            let is_connected = state == RelayState::Connected;
            // The first connection takes a moment.
            let is_news = was_connected.map_or(is_connected || since.elapsed() > 3 * LOOK, |was| was != is_connected);
            if is_news {
                (was_connected, since) = (Some(is_connected), Instant::now());
                match state {
                    RelayState::Away { reason } => {
                        tracing::warn!(reason, "the broker's relay is away, dialling until it is back");
                    }
                    RelayState::None | RelayState::Connected => tracing::info!("connected to the broker's relay"),
                }
            }
            if !is_connected && since.elapsed() > ANEW {
                since = Instant::now();
                endpoint.remove_relay(&self.url).await;
                endpoint.insert_relay(self.url.clone(), Arc::clone(&self.config)).await;
            }
        }
    }
}

/// The relay's name, which nobody but [`find::Finder`] knows an address of.
fn url(key: PeerId, port: u16) -> Option<RelayUrl> {
    let name = BASE32_NOPAD.encode(key.as_bytes()).to_ascii_lowercase();
    format!("https://{name}.relay.invalid:{port}").parse().ok()
}
