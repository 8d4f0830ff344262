//! Latency and bandwidth between two peers, both directions, measured over a connection of their own.
//!
//! The peer that dialled leads. Bursts come first, of growing size until one takes long enough to time, then more of that
//! size until the two fastest agree: what disturbs a burst only slows it. A burst is timed where it arrives, from its
//! first to its last packet, so neither the request nor the way there counts. Then pings, whose median holds up under
//! jitter. What is sent is bounded in bytes and in time, so a slow link is not flooded.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::stream::{FrameSink, FrameSource};
use crate::{Session, SessionError};

/// Pings that count, after one that does not.
const PINGS: usize = 11;
/// Bytes of the first burst.
const FIRST_BYTES: u64 = 64 << 10;
/// Bytes of the largest burst.
const MOST_BYTES: u64 = 16 << 20;
/// A burst that takes this long can be timed.
const LONG_ENOUGH: Duration = Duration::from_millis(100);
/// And this many round trips, of which a new connection needs the first ones to reach its speed.
const ENOUGH_ROUND_TRIPS: u32 = 8;
/// Bursts that are timed, unless the two fastest agree before.
const MOST_TIMED_BURSTS: usize = 5;
/// Two speeds agree if the lower is this share of the higher.
const AGREEMENT: f64 = 0.9;
/// A direction is given up, or its bursts so far are enough, after this long.
const DIRECTION_LIMIT: Duration = Duration::from_secs(6);
/// Both directions and the pings take no longer.
const PROBE_LIMIT: Duration = Duration::from_secs(30);
/// A direct path is found in a few round trips over the relay, if at all.
const DIRECT_LIMIT: Duration = Duration::from_secs(3);
/// A burst uses several streams, as a large OP-Data does: one alone carries a window per round trip at the most.
const STREAMS: u64 = 4;
/// Largest frame of a probe's conversation.
const TALK_BYTES: u64 = 64;
/// Size of what is written at once.
const PIECE_BYTES: u64 = 64 << 10;

const PING: u8 = 1;
/// The leader sends: time it and say what you saw.
const TAKE: u8 = 2;
/// Send to the leader.
const GIVE: u8 = 3;

/// One direction between two peers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DirectionSpeed {
    /// Half of the median round-trip time.
    pub latency: Duration,
    /// What two bursts have reached, in payload bytes per second.
    pub bytes_per_s: f64,
}

/// Both directions, as the peer that leads sees them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairSpeed {
    /// The direction from this peer to the other.
    pub there: DirectionSpeed,
    /// The direction from the other peer to this one.
    pub back: DirectionSpeed,
    /// Whether the packets went over a relay, since no direct path was found.
    pub is_relayed: bool,
}

/// Measures the connection to a peer that [`answer_probe`]s: the direct path if one is found within three seconds, else that
/// over the relay.
///
/// # Errors
/// [`SessionError`] if the connection is lost, the peer does not keep to the form, or it takes too long.
pub async fn probe(session: &Session) -> Result<PairSpeed, SessionError> {
    timeout(PROBE_LIMIT, lead(session)).await.unwrap_or_else(|_| {
        Err(SessionError::Lost { reason: format!("the probe took longer than {} s", PROBE_LIMIT.as_secs()) })
    })
}

/// Answers a peer that [`probe`]s, until it is done.
///
/// # Errors
/// [`SessionError`] if the connection is lost or the peer does not keep to the form.
pub async fn answer_probe(session: &Session) -> Result<(), SessionError> {
    timeout(PROBE_LIMIT, follow(session)).await.unwrap_or(Ok(()))
}

async fn lead(session: &Session) -> Result<PairSpeed, SessionError> {
    session.direct_within(DIRECT_LIMIT).await;
    let (mut sink, mut source) = session.open_bi().await?;
    let round_trip = session.stats().rtt.unwrap_or_default();
    let long_enough = LONG_ENOUGH.max(round_trip * ENOUGH_ROUND_TRIPS);
    let mut directions = [TAKE, GIVE].map(|what| Bursts::new(what, long_enough));
    // In turn, and before the pings, by which a congestion controller learns nothing of the link's speed.
    while directions.iter().any(|d| !d.is_done()) {
        for direction in directions.iter_mut().filter(|d| !d.is_done()) {
            direction.next(session, &mut sink, &mut source).await?;
        }
    }
    let mut times = Vec::with_capacity(PINGS);
    for ping in 0..=PINGS {
        let began = Instant::now();
        ask(&mut sink, &mut source, PING, 0).await?;
        if ping > 0 {
            times.push(began.elapsed().as_secs_f64());
        }
    }
    let latency = Duration::from_secs_f64(median(times) / 2.0);
    let direction = |bursts: &Bursts| DirectionSpeed { latency, bytes_per_s: bursts.bytes_per_s() };
    let is_relayed = session.stats().is_relayed;
    Ok(PairSpeed { there: direction(&directions[0]), back: direction(&directions[1]), is_relayed })
}

/// The bursts of one direction.
struct Bursts {
    what: u8,
    long_enough: Duration,
    bytes: u64,
    spent: Duration,
    last: f64,
    /// The fastest first.
    timed: Vec<f64>,
}

impl Bursts {
    fn new(what: u8, long_enough: Duration) -> Self {
        Self {
            what,
            long_enough,
            bytes: FIRST_BYTES,
            spent: Duration::ZERO,
            last: 0.0,
            timed: Vec::with_capacity(MOST_TIMED_BURSTS),
        }
    }

    fn is_done(&self) -> bool {
        let agree = matches!(self.timed[..], [first, second, ..] if second >= first * AGREEMENT);
        agree || self.timed.len() == MOST_TIMED_BURSTS || self.spent >= DIRECTION_LIMIT
    }

    async fn next(
        &mut self,
        session: &Session,
        sink: &mut FrameSink,
        source: &mut FrameSource,
    ) -> Result<(), SessionError> {
        let began = Instant::now();
        say(sink, self.what, self.bytes).await?;
        let arrival = if self.what == TAKE {
            send_burst(session, self.bytes).await?;
            Arrival::from_frame(&heard(source).await?)?
        } else {
            receive_burst(session, self.bytes).await?
        };
        self.spent += began.elapsed();
        self.last = arrival.bytes_per_s();
        if arrival.took >= self.long_enough || self.bytes == MOST_BYTES {
            self.timed.push(self.last);
            self.timed.sort_by(|a, b| b.total_cmp(a));
        } else {
            let growth = if arrival.took < self.long_enough / 4 { 4 } else { 2 };
            self.bytes = (self.bytes * growth).min(MOST_BYTES);
        }
        Ok(())
    }

    /// What two bursts have reached, or if there were fewer, the last one.
    fn bytes_per_s(&self) -> f64 {
        self.timed.get(1).copied().unwrap_or(self.last)
    }
}

async fn follow(session: &Session) -> Result<(), SessionError> {
    let (mut sink, mut source) = session.accept_bi().await?;
    while let Some(frame) = source.recv_limited(TALK_BYTES).await? {
        let (what, bytes) = request(&frame)?;
        match what {
            PING => sink.send(&[PING]).await?,
            TAKE => sink.send(&receive_burst(session, bytes).await?.to_frame()).await?,
            _ => send_burst(session, bytes).await?,
        }
    }
    Ok(())
}

/// What the leader asks for: never more than the largest burst.
fn request(frame: &[u8]) -> Result<(u8, u64), SessionError> {
    let fail = || SessionError::Lost { reason: "the peer's probe is not of our form".to_owned() };
    let (&what, rest) = frame.split_first().ok_or_else(fail)?;
    let bytes = u64::from_le_bytes(rest.try_into().map_err(|_| fail())?);
    if !(PING..=GIVE).contains(&what) || bytes > MOST_BYTES {
        return Err(fail());
    }
    Ok((what, bytes))
}

async fn say(sink: &mut FrameSink, what: u8, bytes: u64) -> Result<(), SessionError> {
    let mut frame = vec![what];
    frame.extend(bytes.to_le_bytes());
    sink.send(&frame).await
}

async fn heard(source: &mut FrameSource) -> Result<Vec<u8>, SessionError> {
    let lost = || SessionError::Lost { reason: "the peer ended the probe".to_owned() };
    source.recv_limited(TALK_BYTES).await?.ok_or_else(lost)
}

async fn ask(sink: &mut FrameSink, source: &mut FrameSource, what: u8, bytes: u64) -> Result<(), SessionError> {
    say(sink, what, bytes).await?;
    heard(source).await.map(drop)
}

async fn send_burst(session: &Session, bytes: u64) -> Result<(), SessionError> {
    let mut streams = JoinSet::new();
    for _ in 0..STREAMS {
        let mut sink = session.open_uni().await?;
        streams.spawn(async move {
            let piece = vec![0u8; PIECE_BYTES as usize];
            let mut left = bytes / STREAMS;
            while left > 0 {
                let size = left.min(PIECE_BYTES);
                sink.send_raw(&piece[..size as usize]).await?;
                left -= size;
            }
            sink.finish().await
        });
    }
    while let Some(sent) = streams.join_next().await {
        sent.map_err(|e| SessionError::Lost { reason: e.to_string() })??;
    }
    Ok(())
}

/// What came of a burst after its first packet, and how long that took.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Arrival {
    bytes: u64,
    took: Duration,
}

impl Arrival {
    fn bytes_per_s(self) -> f64 {
        self.bytes as f64 / self.took.as_secs_f64().max(1e-6)
    }

    fn to_frame(self) -> [u8; 16] {
        let mut frame = [0; 16];
        frame[..8].copy_from_slice(&self.bytes.to_le_bytes());
        frame[8..].copy_from_slice(&u64::try_from(self.took.as_nanos()).unwrap_or(u64::MAX).to_le_bytes());
        frame
    }

    fn from_frame(frame: &[u8]) -> Result<Self, SessionError> {
        match frame.as_chunks::<8>() {
            (&[bytes, nanos], []) => {
                Ok(Self { bytes: u64::from_le_bytes(bytes), took: Duration::from_nanos(u64::from_le_bytes(nanos)) })
            }
            _ => Err(SessionError::Lost { reason: "the peer's answer to a probe is not of our form".to_owned() }),
        }
    }
}

/// When what of one stream came.
struct StreamArrival {
    first: Instant,
    first_bytes: u64,
    last: Instant,
    bytes: u64,
}

async fn receive_burst(session: &Session, bytes: u64) -> Result<Arrival, SessionError> {
    let mut streams = JoinSet::new();
    for _ in 0..STREAMS {
        let mut source = session.accept_uni().await?;
        streams.spawn(async move {
            let mut seen: Option<StreamArrival> = None;
            while let Some(count) = source.skip_some().await? {
                let now = Instant::now();
                let seen = seen.get_or_insert(StreamArrival { first: now, first_bytes: count, last: now, bytes: 0 });
                (seen.last, seen.bytes) = (now, seen.bytes + count);
                if seen.bytes > bytes {
                    return Err(SessionError::TooLarge { announced: seen.bytes, limit: bytes });
                }
            }
            Ok::<_, SessionError>(seen)
        });
    }
    let mut seen = Vec::new();
    while let Some(stream) = streams.join_next().await {
        seen.extend(stream.map_err(|e| SessionError::Lost { reason: e.to_string() })??);
    }
    let first = seen.iter().min_by_key(|s| s.first);
    let last = seen.iter().map(|s| s.last).max();
    let total: u64 = seen.iter().map(|s| s.bytes).sum();
    match (first, last) {
        (Some(first), Some(last)) => {
            Ok(Arrival { bytes: total - first.first_bytes, took: last.duration_since(first.first) })
        }
        _ => Err(SessionError::Lost { reason: "the peer sent nothing".to_owned() }),
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_asks_for_is_bounded_and_of_form() {
        let frame = |what: u8, bytes: u64| [vec![what], bytes.to_le_bytes().to_vec()].concat();
        assert_eq!(request(&frame(GIVE, MOST_BYTES)).unwrap(), (GIVE, MOST_BYTES));
        assert!(request(&frame(GIVE, MOST_BYTES + 1)).is_err());
        assert!(request(&frame(9, 1)).is_err() && request(&frame(0, 1)).is_err());
        assert!(request(&[]).is_err() && request(&[PING]).is_err() && request(&[0; 17]).is_err());
    }

    #[test]
    fn an_arrival_travels() {
        let arrival = Arrival { bytes: 1_000_000, took: Duration::from_millis(250) };
        assert_eq!(Arrival::from_frame(&arrival.to_frame()).unwrap(), arrival);
        assert!((arrival.bytes_per_s() - 4e6).abs() < 1e-6);
        assert!(Arrival::from_frame(&[0; 15]).is_err());
    }
}
