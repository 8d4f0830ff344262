//! When a silent CompNode counts as lost: its silence must be unlike it, those that train with it must hear nothing of it
//! either, and to wait for it must have cost as much as to go on without it.
//!
//! How unlike a silence is, is φ of the accrual failure detector: the negative decimal logarithm of the chance that a
//! sign of life comes even later, from the mean and spread of the times between those before (Hayashibara et al., "The φ
//! accrual failure detector", SRDS 2004).

use std::collections::VecDeque;
use std::time::Duration;

use fusionllm_protocol::FromBroker;

use super::members::LEASE;
use super::run::Run;
use super::{Action, ConnectionId, Core};

/// From this φ on, its peers are asked whether they hear of a CompNode.
pub(super) const SUSPECT: f64 = 3.0;
/// From this φ on, it may count as lost: one silence in a hundred million is longer.
const LOST: f64 = 8.0;
/// Heartbeats whose distances count.
const REMEMBERED: usize = 64;
/// Seconds between heartbeats before there are any to learn from.
const FIRST_MEAN_S: f64 = 1.0;
/// Distances are no more regular than this, in seconds: a thread may be held up for a moment.
const LEAST_SPREAD_S: f64 = 0.25;
/// A pause of this many seconds is nothing: a packet that was lost, and sent again.
const PAUSE_S: f64 = 1.0;

/// The signs of life of one CompNode.
#[derive(Debug)]
pub(super) struct Rhythm {
    last: Duration,
    beat: Option<Duration>,
    gaps_s: VecDeque<f64>,
}

impl Rhythm {
    /// Of one that is here now.
    pub(super) fn new(now: Duration) -> Self {
        Self { last: now, beat: None, gaps_s: VecDeque::new() }
    }

    /// It says something.
    pub(super) fn seen(&mut self, at: Duration) {
        self.last = self.last.max(at);
    }

    /// A heartbeat, which comes at even distances where nothing holds it up.
    pub(super) fn beat(&mut self, at: Duration) {
        self.seen(at);
        if let Some(before) = self.beat.replace(at) {
            self.gaps_s.push_back(at.saturating_sub(before).as_secs_f64());
            if self.gaps_s.len() > REMEMBERED {
                self.gaps_s.pop_front();
            }
        }
    }

    /// It has another connection: the distance to the heartbeat before says nothing.
    pub(super) fn resume(&mut self, now: Duration) {
        self.seen(now);
        self.beat = None;
    }

    /// Nobody could give a sign of life for so long.
    pub(super) fn forgive(&mut self, pause: Duration) {
        self.last += pause;
        self.beat = None;
    }

    /// For how long there was no sign of life.
    pub(super) fn silence(&self, now: Duration) -> Duration {
        now.saturating_sub(self.last)
    }

    /// φ of the present silence.
    pub(super) fn phi(&self, now: Duration) -> f64 {
        let count = self.gaps_s.len() as f64;
        let mean = if count > 0.0 { self.gaps_s.iter().sum::<f64>() / count } else { FIRST_MEAN_S };
        let variance = self.gaps_s.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / count.max(1.0);
        let spread = variance.sqrt().max(LEAST_SPREAD_S);
        let deviations = (self.silence(now).as_secs_f64() - PAUSE_S - mean) / spread;
        // The tail of the normal distribution, by the logistic approximation that Akka uses.
        let exponent = deviations * (1.5976 + 0.070_566 * deviations * deviations);
        if deviations > 0.0 { (exponent + (-exponent).exp().ln_1p()) / std::f64::consts::LN_10 } else { 0.0 }
    }
}

impl Core {
    /// Asks about members of runs that are silent. Gives those that count as lost, and why.
    pub(super) fn detect(&mut self, now: Duration) -> (Vec<Action>, Vec<(ConnectionId, String)>) {
        let (mut questions, mut lost) = (Vec::new(), Vec::new());
        for job in self.jobs.values_mut() {
            let snapshot = job.snapshots.newest();
            let Some(run) = &mut job.run else { continue };
            let members = run.members.clone();
            let speaks = |&&m: &&ConnectionId| self.compnodes.phi(m, now) < SUSPECT && !self.compnodes.is_away(m);
            let witnesses: Vec<ConnectionId> = members.iter().filter(speaks).copied().collect();
            for &member in &members {
                let phi = self.compnodes.phi(member, now);
                if phi < SUSPECT {
                    run.hearsay.remove(&member);
                    continue;
                }
                let Some(peer) = run.node_of(member) else { continue };
                let key = run.key;
                let hearsay = run.hearsay.entry(member).or_default();
                if hearsay.asks(now) {
                    let ask = |&to| Action::Send { to, message: FromBroker::CheckPeer { key, peer } };
                    questions.extend(witnesses.iter().map(ask));
                }
                if self.compnodes.is_replaced(member, now) {
                    lost.push((member, "its process was started again".to_owned()));
                    continue;
                }
                let silence = self.compnodes.silence(member, now);
                if phi >= LOST && hearsay.agrees(now) && silence >= worth_waiting(run, snapshot) {
                    let seconds = silence.as_secs_f64();
                    lost.push((member, format!("no sign of life for {seconds:.1} s, nor do its peers hear of it")));
                }
            }
        }
        (questions, lost)
    }
}

/// How long a silent member is worth waiting for: as long as it would take the others to be where they are now without it.
/// Who then still waits has lost at most twice what was the least.
fn worth_waiting(run: &Run, snapshot: Option<u64>) -> Duration {
    run.restart_cost(snapshot).min(LEASE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beats(gaps_ms: impl IntoIterator<Item = u64>) -> (Rhythm, Duration) {
        let mut now = Duration::from_secs(100);
        let mut rhythm = Rhythm::new(now);
        rhythm.beat(now);
        for gap in gaps_ms {
            now += Duration::from_millis(gap);
            rhythm.beat(now);
        }
        (rhythm, now)
    }

    /// Seconds of silence after which φ is that large.
    fn until(phi: f64, rhythm: &Rhythm, now: Duration) -> f64 {
        (0..1000)
            .map(|tenth| f64::from(tenth) / 10.0)
            .find(|s| rhythm.phi(now + Duration::from_secs_f64(*s)) >= phi)
            .unwrap()
    }

    #[test]
    fn regular_heartbeats_make_a_short_silence_suspicious() {
        let (rhythm, now) = beats(std::iter::repeat_n(1000, 80));
        let (suspect, lost) = (until(SUSPECT, &rhythm, now), until(LOST, &rhythm, now));
        assert!((2.5..3.0).contains(&suspect) && (3.2..3.8).contains(&lost), "{suspect} {lost}");
        assert_eq!(rhythm.phi(now + Duration::from_secs(2)), 0.0);
        assert!(rhythm.phi(now + Duration::from_secs(100_000)).is_finite());
    }

    #[test]
    fn irregular_heartbeats_are_given_more_time() {
        let (rhythm, now) = beats((0..80).map(|i| if i % 5 == 0 { 4000 } else { 900 }));
        assert!(until(LOST, &rhythm, now) > 8.0, "{}", until(LOST, &rhythm, now));
        // Before there is anything to learn from, they are taken for regular.
        let (rhythm, now) = beats([]);
        assert!((3.2..3.8).contains(&until(LOST, &rhythm, now)));
    }

    #[test]
    fn what_held_all_up_says_nothing_of_one() {
        let (mut rhythm, now) = beats(std::iter::repeat_n(1000, 20));
        rhythm.forgive(Duration::from_secs(30));
        assert_eq!(rhythm.phi(now + Duration::from_secs(31)), 0.0);
        rhythm.beat(now + Duration::from_secs(31));
        rhythm.beat(now + Duration::from_secs(32));
        assert!(until(LOST, &rhythm, now + Duration::from_secs(32)) < 4.0);
    }
}
