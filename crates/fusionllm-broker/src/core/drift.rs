//! Whether CompNodes are as fast as was planned, and whether another placement would pay for its move: by one that has
//! become slower or faster, or by one that is new.

use std::collections::BTreeMap;
use std::time::Duration;

use fusionllm_planner::{Cluster, Prediction, format_seconds};

use super::ConnectionId;

/// A window has so many steps and takes so long at the least.
const WINDOW: (usize, Duration) = (20, Duration::from_secs(10));
/// In so many windows in a row another placement must be better.
const WINDOWS: u32 = 3;
/// A CompNode whose time differs from the plan by less than this share is as planned.
const AS_PLANNED: f64 = 0.1;
/// By this share a step must become shorter.
const LEAST_GAIN: f64 = 0.1;
/// So many times what the move takes must be saved by it.
const PAYS: u32 = 3;
/// What a move takes besides preparing the parts: snapshots, and steps that fill the pipeline.
const MOVE: Duration = Duration::from_secs(2);
const MOVE_STEPS: u64 = 3;
/// First and longest rest after a move. It doubles when steps did not become faster by it.
const REST: (Duration, Duration) = (Duration::from_secs(600), Duration::from_secs(8 * 3600));
/// A move has helped if a step takes at most this share of what it took before.
const HELPED: f64 = 0.95;
/// What is known of one that is not at work counts for so long.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// Nobody is taken for slower or faster than this.
const BOUNDS: (f64, f64) = (0.05, 20.0);

/// How many times longer CompNodes compute than was measured before the job, by name.
pub(super) type Factors = BTreeMap<String, f64>;

/// What is seen of the steps of one job.
#[derive(Debug, Default)]
pub(super) struct Drift {
    /// Of each step since the window began: its seconds, and those that each CompNode has computed.
    steps: Vec<(f64, Vec<f64>)>,
    began: Option<Duration>,
    /// How many times longer each computes than was measured, and when that was seen last.
    known: BTreeMap<String, (f64, Duration)>,
    /// The same as the newest window has it, for the placement at hand.
    newest: Factors,
    /// How often in a row another placement was better, and on which newcomers it was tried.
    better: u32,
    weighed_on: Vec<ConnectionId>,
    /// Number of the weighing that is under way.
    pub(super) asked: Option<u64>,
    rest: Duration,
    rest_until: Duration,
    /// The seconds of a step before the last move, until it is known whether that has helped.
    before: Option<f64>,
    /// Why the job is about to move, and who is the reason.
    moves: Option<Move>,
}

/// A move to a better placement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Move {
    /// Who is slower or faster than planned, or new.
    pub(super) who: Vec<String>,
    /// Why, for people.
    pub(super) reason: String,
    /// Whether it is for the sake of newcomers.
    pub(super) is_for_new: bool,
}

/// What a weighing has shown: seconds of a step by the placement at work, and by the best that there is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Weighed {
    /// By the one at work.
    pub(crate) now_s: f64,
    /// By the best one.
    pub(crate) then_s: f64,
}

impl Drift {
    /// A placement begins its work.
    pub(super) fn placed(&mut self) {
        (self.steps, self.began, self.better, self.asked, self.moves) = (Vec::new(), None, 0, None, None);
        self.weighed_on.clear();
    }

    /// A step is done.
    pub(super) fn stepped(&mut self, step_s: f64, busy_s: Vec<f64>, now: Duration) {
        self.began.get_or_insert(now);
        // What is not asked for must not grow.
        if self.steps.len() >= 64 * WINDOW.0 {
            self.steps.drain(..32 * WINDOW.0);
        }
        self.steps.push((step_s, busy_s));
    }

    /// Ends the window, if it is long enough: whether a better placement is worth looking for, as somebody computes faster or
    /// slower than was planned. `told` is what the user is to know.
    pub(super) fn look(&mut self, prediction: &Prediction, told: &mut Vec<String>, now: Duration) -> bool {
        let is_long = |began: Duration| now.saturating_sub(began) >= WINDOW.1;
        if self.steps.len() < WINDOW.0 || !self.began.is_some_and(is_long) {
            return false;
        }
        let steps = std::mem::take(&mut self.steps);
        self.began = None;
        let step_s = median(steps.iter().map(|(step_s, _)| *step_s));
        if let Some(before) = self.before.take() {
            told.extend(self.helped(before, step_s, now));
        }
        let mut has_drifted = false;
        self.newest.clear();
        for (node, planned) in prediction.compnodes.iter().enumerate() {
            let planned_s = planned.busy * prediction.step_s;
            let seen_s = median(steps.iter().filter_map(|(_, busy)| busy.get(node).copied()));
            if planned_s <= 0.0 || seen_s <= 0.0 {
                continue;
            }
            let factor = seen_s / planned_s;
            has_drifted |= (factor - 1.0).abs() > AS_PLANNED;
            let (before, _) = self.known.get(&planned.name).copied().unwrap_or((1.0, now));
            self.newest.insert(planned.name.clone(), (before * factor).clamp(BOUNDS.0, BOUNDS.1));
        }
        if !has_drifted {
            self.better = 0;
        }
        has_drifted
    }

    /// Says so if the last move was in vain, and rests for longer then.
    fn helped(&mut self, before: f64, after: f64, now: Duration) -> Option<String> {
        if after <= HELPED * before {
            self.rest = Duration::ZERO;
            return None;
        }
        self.rest = (self.rest * 2).clamp(REST.0, REST.1);
        self.rest_until = now + self.rest;
        Some(format!(
            "steps did not become faster by the last move ({} before, {} now): the next one is not before {} min are over",
            format_seconds(before),
            format_seconds(after),
            self.rest.as_secs() / 60
        ))
    }

    /// Whether a move may come at all now, with so much left to do.
    pub(super) fn may_move(&self, left: Duration, now: Duration) -> bool {
        self.moves.is_none() && now >= self.rest_until && left >= MOVE * PAYS
    }

    /// Whether some of these were not tried with the placement at hand.
    pub(super) fn is_new(&self, idle: &[ConnectionId]) -> bool {
        idle.iter().any(|c| !self.weighed_on.contains(c))
    }

    /// A weighing begins, in which these may take part besides those at work.
    pub(super) fn asks(&mut self, number: u64, idle: &[ConnectionId]) {
        self.asked = Some(number);
        self.weighed_on = idle.to_vec();
    }

    /// How fast everybody is as far as is known, at work or not.
    pub(super) fn factors(&self, now: Duration) -> Factors {
        let known = self.known.iter().filter(|(_, (_, seen))| now.saturating_sub(*seen) < REMEMBERED);
        let mut factors: Factors = known.map(|(name, (factor, _))| (name.clone(), *factor)).collect();
        factors.extend(self.newest.clone());
        factors
    }

    /// What came of a weighing. Whether the job moves now: another placement was better several times, and pays for the move,
    /// which takes as long as the parts took to prepare, and more.
    pub(super) fn weighed(
        &mut self,
        weighed: Weighed,
        steps_left: u64,
        prepared: Duration,
        prediction: &Prediction,
        new: &[String],
    ) -> bool {
        self.asked = None;
        let Weighed { now_s, then_s } = weighed;
        let gain_s = now_s - then_s;
        let takes_s = (prepared + MOVE).as_secs_f64() + MOVE_STEPS as f64 * now_s;
        let pays = gain_s * steps_left as f64 >= f64::from(PAYS) * takes_s;
        if !(gain_s >= LEAST_GAIN * now_s && pays) {
            self.better = 0;
            return false;
        }
        self.better += 1;
        let drifted: Vec<(&String, f64)> = prediction.compnodes.iter().filter_map(|c| self.drifted(&c.name)).collect();
        // Of one that is new nothing can be learnt by waiting.
        if self.better < WINDOWS && !drifted.is_empty() {
            return false;
        }
        let quoted = |names: &[String]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let faster =
            format!("a step is predicted to take {} instead of {}", format_seconds(then_s), format_seconds(now_s));
        let is_for_new = drifted.is_empty();
        let (who, why) = match is_for_new {
            true => (new.to_vec(), format!("the job moves to more CompNodes, {} may work for it", quoted(new))),
            false => {
                let who: Vec<String> = drifted.iter().map(|(name, _)| (*name).clone()).collect();
                let words = drifted.iter().map(|(name, factor)| slower(name, *factor));
                (who, format!("the job moves, since {}", words.collect::<Vec<_>>().join(", ")))
            }
        };
        self.moves = Some(Move { who, reason: format!("{why}: {faster}"), is_for_new });
        true
    }

    /// Whom the newest window shows to be slower or faster than the plan has it, and how much.
    fn drifted<'a>(&self, name: &'a String) -> Option<(&'a String, f64)> {
        let before = self.known.get(name).map_or(1.0, |(factor, _)| *factor);
        let factor = self.newest.get(name)? / before;
        ((factor - 1.0).abs() > AS_PLANNED).then_some((name, factor))
    }

    /// The job leaves its placement. Why, if that is for the sake of a better one: it is planned by what was seen, and rests
    /// after it.
    pub(super) fn leaves(&mut self, step_s: f64, now: Duration) -> Option<Move> {
        let moves = self.moves.take()?;
        let newest = std::mem::take(&mut self.newest);
        self.known.extend(newest.into_iter().map(|(name, factor)| (name, (factor, now))));
        self.before = Some(step_s);
        self.rest_until = now + REST.0;
        Some(moves)
    }

    /// The move does not come about.
    pub(super) fn stays(&mut self) {
        (self.moves, self.better, self.asked) = (None, 0, None);
    }

    /// Who took part in the last weighing besides those at work.
    pub(super) fn candidates(&self) -> &[ConnectionId] {
        &self.weighed_on
    }
}

/// A cluster as its CompNodes were seen to compute.
pub(super) fn slowed(mut cluster: Cluster, factors: &Factors) -> Cluster {
    for compnode in &mut cluster.compnodes {
        if let Some(factor) = factors.get(&compnode.name) {
            *compnode = compnode.slowed(*factor);
        }
    }
    cluster
}

fn slower(name: &str, factor: f64) -> String {
    match factor > 1.0 {
        true => format!("CompNode `{name}` computes {factor:.1} times as long as planned"),
        false => format!("CompNode `{name}` computes {:.1} times as fast as planned", 1.0 / factor),
    }
}

/// 0 of nothing.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use fusionllm_planner::CompNodePrediction;

    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// A step takes a second; `a` computes half of it, and `b` a quarter.
    fn prediction() -> Prediction {
        let compnode = |(name, busy): (&str, f64)| CompNodePrediction {
            name: name.to_owned(),
            ops: 1,
            parameters: 1,
            fp_s: 0.1,
            bp_s: 0.2,
            memory_bytes: 1.0,
            memory_limit_bytes: None,
            busy,
        };
        let compnodes = [("a", 0.5), ("b", 0.25)].map(compnode).to_vec();
        let (links, critical_path) = (Vec::new(), Vec::new());
        Prediction { step_s: 1.0, formula_s: 1.0, tokens_per_s: 1.0, compnodes, links, critical_path }
    }

    /// Twenty steps of a second each.
    fn window(drift: &mut Drift, busy_s: [f64; 2], from: u64) -> (bool, Vec<String>) {
        for second in from..from + 20 {
            assert!(!drift.look(&prediction(), &mut Vec::new(), at(second)), "too early");
            drift.stepped(1.0, busy_s.to_vec(), at(second));
        }
        let mut told = Vec::new();
        (drift.look(&prediction(), &mut told, at(from + 19)), told)
    }

    fn weighed(drift: &mut Drift, now_s: f64, then_s: f64, left: u64) -> bool {
        drift.weighed(Weighed { now_s, then_s }, left, at(1), &prediction(), &["c".to_owned()])
    }

    #[test]
    fn speeds_are_held_against_the_plan() {
        let mut drift = Drift::default();
        assert!(!window(&mut drift, [0.52, 0.24], 0).0);
        assert!(window(&mut drift, [0.5, 0.5], 100).0);
        let factors = drift.factors(at(120));
        assert_eq!((factors["a"], factors["b"]), (1.0, 2.0));
        // Twenty steps within a second say little.
        let mut drift = Drift::default();
        for _ in 0..40 {
            drift.stepped(0.01, vec![9.0, 9.0], at(0));
        }
        assert!(!drift.look(&prediction(), &mut Vec::new(), at(1)));
    }

    #[test]
    fn a_job_moves_when_another_placement_was_better_three_times_and_pays() {
        let mut drift = Drift::default();
        for (n, moves) in [(0, false), (1, false), (2, true)] {
            assert!(window(&mut drift, [0.5, 0.5], 100 * n).0);
            assert_eq!(weighed(&mut drift, 1.0, 0.7, 1000), moves);
        }
        assert!(!drift.may_move(at(1000), at(221)), "it is about to");
        let Move { who, reason, is_for_new } = drift.leaves(1.0, at(230)).unwrap();
        assert_eq!((who, is_for_new), (vec!["b".to_owned()], false));
        let expected = "the job moves, since CompNode `b` computes 2.0 times as long as planned: a step is predicted to take \
                        700.0 ms instead of 1.00 s";
        assert_eq!(reason, expected);
        drift.placed();
        // The next plan goes by it, and so do the factors that come after it.
        assert_eq!(drift.factors(at(240))["b"], 2.0);
        assert!(window(&mut drift, [0.5, 0.125], 300).0);
        assert_eq!(drift.factors(at(340))["b"], 1.0);
        assert!(!drift.factors(at(230 + 3600)).contains_key("c"));
    }

    #[test]
    fn what_gains_little_or_does_not_pay_moves_nothing() {
        let mut drift = Drift::default();
        for (now_s, then_s, left) in [(1.0, 0.95, 10_000), (1.0, 0.7, 50), (1.0, 1.2, 10_000), (f64::NAN, 1.0, 10_000)]
        {
            for n in 0..4 {
                window(&mut drift, [0.5, 0.5], 100 * n);
                assert!(!weighed(&mut drift, now_s, then_s, left), "{now_s} {then_s} {left}");
            }
        }
        // One window as planned in between, and it is counted anew.
        for (busy, gain) in [(0.5, true), (0.5, true), (0.25, false), (0.5, true), (0.5, true)] {
            let (drifted, _) = window(&mut drift, [0.5, busy], 1000);
            assert_eq!(drifted, gain);
            assert!(!gain || !weighed(&mut drift, 1.0, 0.5, 10_000));
        }
    }

    #[test]
    fn newcomers_are_taken_in_at_once_if_they_pay() {
        let mut drift = Drift::default();
        let c = [ConnectionId(3)];
        assert!(drift.is_new(&c));
        drift.asks(1, &c);
        assert!(!drift.is_new(&c));
        assert!(!weighed(&mut drift, 1.0, 0.99, 10_000));
        assert!(!drift.is_new(&c), "it was of no use");
        assert!(weighed(&mut drift, 1.0, 0.6, 10_000));
        let moves = drift.leaves(1.0, at(7)).unwrap();
        assert!(moves.is_for_new && moves.reason.starts_with("the job moves to more CompNodes, `c` may work for it: "));
    }

    #[test]
    fn after_a_move_in_vain_it_rests_longer_and_says_so() {
        let mut drift = Drift::default();
        let mut now = 0;
        for rest in [600, 1200, 2400] {
            drift.moves = Some(Move { who: Vec::new(), reason: String::new(), is_for_new: false });
            drift.leaves(1.0, at(now)).unwrap();
            drift.placed();
            assert!(!drift.may_move(at(100_000), at(now + 599)), "it rests after each move");
            let (_, told) = window(&mut drift, [0.5, 0.25], now + 1);
            assert_eq!(told.len(), 1, "{told:?}");
            assert!(told[0].contains(&format!("not before {} min", rest / 60)), "{told:?}");
            assert!(!drift.may_move(at(100_000), at(now + 20 + rest - 1)));
            now += 20 + rest;
            assert!(drift.may_move(at(100_000), at(now)));
        }
        // One that helps makes up for it.
        drift.moves = Some(Move { who: Vec::new(), reason: String::new(), is_for_new: false });
        drift.leaves(2.0, at(now)).unwrap();
        assert_eq!(window(&mut drift, [0.5, 0.25], now + 1).1, Vec::<String>::new());
        assert!(drift.may_move(at(100_000), at(now + 600)));
    }
}
