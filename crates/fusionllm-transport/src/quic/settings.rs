//! What QUIC is set to.

use std::sync::Arc;
use std::time::Duration;

use iroh::endpoint::{Connection, IdleTimeout, QuicTransportConfig, VarInt};
use noq_proto::congestion::{Bbr3Config, CubicConfig};

use super::congestion::LinkRateConfig;
use crate::{CongestionControl, Purpose};

/// Both ends must speak the same.
pub(crate) const ALPN: &[u8] = b"fusionllm/1";
/// Of a connection that is there to be measured, and for nothing else.
const PROBE_ALPN: &[u8] = b"fusionllm-probe/1";
/// Of a connection for state in bulk.
const STATE_ALPN: &[u8] = b"fusionllm-state/1";
/// Close code of a refused peer.
pub(crate) const REFUSED: u32 = 403;
/// A connection that is not made by then fails.
pub(crate) const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// A silent peer is lost after this long.
const IDLE_LIMIT: Duration = Duration::from_secs(10);
/// Well within [`IDLE_LIMIT`] even when several are lost. Whoever is asked whether a silent peer is still there goes by
/// this, too.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// A stream's receive window. noq 1.4 ends a connection on which a stream buffers more than 2048 packets unread,
/// so this must stay below 2048 packets of 1150 bytes.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
/// Unconfirmed bytes per connection: 2.5 Gbit/s over 100 ms.
const SEND_WINDOW_BYTES: u64 = 32 << 20;
/// What a member may have unread here, all streams together: twice what it may have unconfirmed, so that it is the sender's
/// window that bounds the speed. 10 Gbit/s over 50 ms, or 1 Gbit/s over half a second.
const RECEIVE_WINDOW_BYTES: u32 = 64 << 20;
/// Streams of each kind that a member may have open at once: a conversation, blobs, a probe's bursts. Full and unread, half
/// of these leave room in the window for all others. A job's wires have more, see [`allow_streams`].
const MEMBER_STREAMS: u32 = 16;
/// What a peer may have unread here before it is admitted: a greeting.
const TRIAL_WINDOW_BYTES: u32 = 64 << 10;
/// Two-way streams before a peer is admitted. There are no others.
const TRIAL_STREAMS: u32 = 1;
/// A packet counts as lost when so many later ones have come. Three, as usual, takes each small detour of a packet for a
/// loss. noq 1.4 itself drops what comes after 128 later ones. Of shorter
/// messages losses show by [`LATE`] alone.
pub(crate) const OVERTAKEN_BY: u32 = 256;
/// Round trips after which a packet counts as lost if later ones have come: what jitter of most of a round trip makes late
/// is not sent twice.
pub(crate) const LATE: f32 = 2.0;
/// Single bytes that are sent to be confirmed are not read. What is not read is dropped beyond this.
const UNREAD_DATAGRAM_BYTES: usize = 64;

/// How every connection begins: with the room of a greeting.
pub(crate) fn transport_config(congestion: CongestionControl) -> QuicTransportConfig {
    let builder = QuicTransportConfig::builder()
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(TRIAL_WINDOW_BYTES.into())
        .send_window(SEND_WINDOW_BYTES)
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_concurrent_bidi_streams(TRIAL_STREAMS.into())
        .max_idle_timeout(IdleTimeout::try_from(IDLE_LIMIT).ok())
        .keep_alive_interval(KEEP_ALIVE)
        .packet_threshold(OVERTAKEN_BY)
        .time_threshold(LATE)
        .datagram_receive_buffer_size(Some(UNREAD_DATAGRAM_BYTES));
    match congestion {
        CongestionControl::LinkRate => builder.congestion_controller_factory(Arc::new(LinkRateConfig)),
        CongestionControl::Bbr3 => builder.congestion_controller_factory(Arc::new(Bbr3Config::default())),
        CongestionControl::Cubic => builder.congestion_controller_factory(Arc::new(CubicConfig::default())),
    }
    .build()
}

/// Gives a connection the room of a member.
pub(crate) fn give_room(connection: &Connection) {
    connection.set_max_concurrent_uni_streams(MEMBER_STREAMS.into());
    connection.set_max_concurrent_bi_streams(MEMBER_STREAMS.into());
    connection.set_receive_window(RECEIVE_WINDOW_BYTES.into());
}

/// Lets a member have so many two-way streams open at once, and no fewer than any member.
pub(crate) fn allow_streams(connection: &Connection, streams: u32) {
    connection.set_max_concurrent_bi_streams(streams.max(MEMBER_STREAMS).into());
}

/// What a connection for this purpose is called in its handshake.
pub(crate) fn alpn(purpose: Purpose) -> &'static [u8] {
    match purpose {
        Purpose::Work => ALPN,
        Purpose::Probe => PROBE_ALPN,
        Purpose::State => STATE_ALPN,
    }
}

/// All that are taken, as a listener names them.
pub(crate) fn alpns() -> Vec<Vec<u8>> {
    [Purpose::Work, Purpose::Probe, Purpose::State].map(|purpose| alpn(purpose).to_vec()).into()
}

/// The purpose that a handshake named.
pub(crate) fn purpose(alpn: &[u8]) -> Purpose {
    match alpn {
        PROBE_ALPN => Purpose::Probe,
        STATE_ALPN => Purpose::State,
        _ => Purpose::Work,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_kind_of_streams_unread_leaves_room_for_the_others() {
        const { assert!(MEMBER_STREAMS * STREAM_WINDOW_BYTES <= RECEIVE_WINDOW_BYTES / 2) };
        const { assert!(2 * SEND_WINDOW_BYTES <= RECEIVE_WINDOW_BYTES as u64) };
    }
}
