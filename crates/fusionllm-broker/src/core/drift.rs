//! Whether CompNodes and links are as fast as was planned, and whether another placement would pay for its move: by one that
//! has become slower or faster, or by one that is new.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use fusionllm_planner::{Cluster, NodeIndex, Prediction, format_seconds};

use super::{ConnectionId, Weighed};

/// A window has so many steps and takes so long at the least.
const WINDOW: (usize, Duration) = (20, Duration::from_secs(10));
/// In so many windows in a row another placement must be better.
const WINDOWS: u32 = 3;
/// A CompNode whose time differs from the plan by less than this share is as planned.
const AS_PLANNED: f64 = 0.1;
/// A link whose speed differs from what was measured by less than this many times is as measured: what a message carries in a
/// step says less than a probe.
const AS_MEASURED: f64 = 3.0;
/// It is looked at if payloads come over it for at least this share of the time, and so many bytes in a step: less says
/// nothing of its speed.
const BUSY_LINK: f64 = 0.1;
const LEAST_BYTES: f64 = (64 << 10) as f64;
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
/// No link is taken for slower than this.
const SLOWEST_LINK: f64 = 1e4;

/// A CompNode or one direction of a link, by names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    CompNode(String),
    Link(String, String),
}

/// How many times longer CompNodes compute, and links take, than was measured before the job.
pub(super) type Factors = BTreeMap<Part, f64>;

/// What came over one direction of a link in a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Came {
    pub(super) from: NodeIndex,
    pub(super) to: NodeIndex,
    pub(super) bytes: u64,
    /// Seconds for which at least one payload was coming in.
    pub(super) busy_s: f64,
}

/// What the steps are held against.
#[derive(Debug)]
pub(super) struct Planned<'a> {
    pub(super) prediction: &'a Prediction,
    /// Of whom the time is known, in the placement's order: a GPU works on while its CompNode does something else.
    pub(super) is_timed: Vec<bool>,
    /// Bytes a second that were measured before the job, by sender and receiver.
    pub(super) bytes_per_s: BTreeMap<(NodeIndex, NodeIndex), f64>,
}

/// What is seen of the steps of one job.
#[derive(Debug, Default)]
pub(super) struct Drift {
    /// Of each step since the window began: its seconds, and those that each CompNode has computed, in the placement's order.
    steps: Vec<(f64, Vec<f64>)>,
    /// What came over links meanwhile: bytes, and seconds.
    came: BTreeMap<(NodeIndex, NodeIndex), (u64, f64)>,
    began: Option<Duration>,
    /// Seconds of a step in the last window.
    step_s: f64,
    /// By which factors the placement at hand was planned, and when they were seen last.
    known: BTreeMap<Part, (f64, Duration)>,
    /// What was measured anew since that was planned: the next plan has it in its measurement.
    anew: BTreeSet<Part>,
    /// The same of the placement that is being worked out.
    planning: Option<BTreeMap<Part, (f64, Duration)>>,
    /// With these another placement did not pay.
    in_vain: Option<Factors>,
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

impl Drift {
    /// A placement is about to be worked out. How fast all are as far as is known, by which it goes.
    pub(super) fn plans(&mut self, now: Duration) -> Factors {
        for part in std::mem::take(&mut self.anew) {
            self.known.remove(&part);
            self.newest.remove(&part);
        }
        self.planning = Some(self.seen(now));
        self.factors(now)
    }

    /// How fast all are as far as is known, at work or not, and when that was seen last.
    fn seen(&self, now: Duration) -> BTreeMap<Part, (f64, Duration)> {
        let mut seen = self.known.clone();
        seen.retain(|_, (_, at)| now.saturating_sub(*at) < REMEMBERED);
        seen.extend(self.newest.iter().map(|(part, factor)| (part.clone(), (*factor, now))));
        seen.retain(|part, _| !self.anew.contains(part));
        seen
    }

    /// Something was measured anew: how much slower it was than the measurement before must not be counted twice.
    pub(super) fn measured_anew(&mut self, part: Part) {
        self.anew.insert(part);
    }

    /// A placement begins its work. One that was not worked out just now goes by what was measured.
    pub(super) fn placed(&mut self) {
        self.known = self.planning.take().unwrap_or_default();
        (self.began, self.better, self.asked, self.moves, self.in_vain) = (None, 0, None, None, None);
        self.steps.clear();
        self.came.clear();
        self.weighed_on.clear();
        self.newest.clear();
    }

    /// The job has lost a CompNode, or one leaves: the last move is not judged by what comes then.
    pub(super) fn disturbed(&mut self) {
        (self.before, self.moves) = (None, None);
    }

    /// A step is done.
    pub(super) fn stepped(&mut self, step_s: f64, busy_s: Vec<f64>, came: &[Came], now: Duration) {
        // What is not asked for must not grow: the window begins anew.
        if self.steps.len() >= 64 * WINDOW.0 {
            self.steps.clear();
            self.came.clear();
            self.began = None;
        }
        self.began.get_or_insert(now);
        self.steps.push((step_s, busy_s));
        for came in came.iter().filter(|came| came.busy_s.is_finite()) {
            let (bytes, busy_s) = self.came.entry((came.from, came.to)).or_default();
            (*bytes, *busy_s) = (bytes.saturating_add(came.bytes), *busy_s + came.busy_s);
        }
    }

    /// Whether the window is long enough for [`Self::look`] to say something.
    pub(super) fn is_window_over(&self, now: Duration) -> bool {
        let is_long = |began: Duration| now.saturating_sub(began) >= WINDOW.1;
        self.steps.len() >= WINDOW.0 && self.began.is_some_and(is_long)
    }

    /// Ends the window, if it is long enough: whether a better placement is worth looking for, as somebody computes faster or
    /// slower than was planned, or a link is slower. `told` is what the user is to know.
    pub(super) fn look(&mut self, planned: &Planned<'_>, told: &mut Vec<String>, now: Duration) -> bool {
        if !self.is_window_over(now) {
            return false;
        }
        let (steps, came) = (std::mem::take(&mut self.steps), std::mem::take(&mut self.came));
        self.began = None;
        self.step_s = median(steps.iter().map(|(step_s, _)| *step_s));
        if let Some(before) = self.before.take() {
            told.extend(self.helped(before, now));
        }
        self.newest = self.computed(planned, &steps);
        self.newest.extend(carried(planned, &steps, &came));
        let has_drifted = self.newest.keys().any(|part| self.drifted(part).is_some());
        if !has_drifted {
            self.better = 0;
        }
        has_drifted && self.in_vain.as_ref().is_none_or(|before| !is_alike(before, &self.newest))
    }

    /// How many times longer each CompNode computes than was measured.
    fn computed(&self, planned: &Planned<'_>, steps: &[(f64, Vec<f64>)]) -> Factors {
        let mut factors = Factors::new();
        for (node, compnode) in planned.prediction.compnodes.iter().enumerate() {
            let planned_s = compnode.busy * planned.prediction.step_s;
            let seen_s = median(steps.iter().filter_map(|(_, busy_s)| busy_s.get(node).copied()));
            if planned_s > 0.0 && seen_s > 0.0 && planned.is_timed.get(node) == Some(&true) {
                let part = Part::CompNode(compnode.name.clone());
                let factor = (self.planned_by(&part) * seen_s / planned_s).clamp(BOUNDS.0, BOUNDS.1);
                factors.insert(part, factor);
            }
        }
        factors
    }

    /// By which factor the placement at hand was planned.
    fn planned_by(&self, part: &Part) -> f64 {
        self.known.get(part).map_or(1.0, |(factor, _)| *factor)
    }

    /// Says so if the last move was in vain, and rests for longer then.
    fn helped(&mut self, before: f64, now: Duration) -> Option<String> {
        if self.step_s <= HELPED * before {
            self.rest = Duration::ZERO;
            return None;
        }
        self.rest = (self.rest.max(REST.0) * 2).min(REST.1);
        self.rest_until = now + self.rest;
        Some(format!(
            "steps did not become faster by the last move ({} before, {} now): the next one is not before {} min are over",
            format_seconds(before),
            format_seconds(self.step_s),
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

    /// How fast all are as far as is known, at work or not.
    pub(super) fn factors(&self, now: Duration) -> Factors {
        self.seen(now).into_iter().map(|(part, (factor, _))| (part, factor)).collect()
    }

    /// What came of a weighing. Whether the job moves now: another placement was better several times, and pays for the move,
    /// which takes `moved` for what goes over wires and for preparing the parts, and a little more.
    pub(super) fn weighed(&mut self, weighed: Weighed, steps_left: u64, moved: Duration, new: &[String]) -> bool {
        let Weighed { now_s, then_s } = weighed;
        let gain_s = now_s - then_s;
        let takes_s = (moved + MOVE).as_secs_f64() + MOVE_STEPS as f64 * now_s;
        let pays = gain_s * steps_left as f64 >= f64::from(PAYS) * takes_s;
        if !(gain_s >= LEAST_GAIN * now_s && pays) {
            (self.better, self.in_vain) = (0, Some(self.newest.clone()));
            return false;
        }
        self.better += 1;
        let drifted: Vec<(&Part, f64)> = self.newest.keys().filter_map(|part| self.drifted(part)).collect();
        if drifted.is_empty() && new.is_empty() {
            // Meanwhile all is as planned again.
            self.better = 0;
            return false;
        }
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
                let words = drifted.iter().map(|(part, factor)| part.told(*factor));
                let mut who: Vec<String> = drifted.iter().flat_map(|(part, _)| part.names()).collect();
                who.sort();
                who.dedup();
                (who, format!("the job moves, since {}", words.collect::<Vec<_>>().join(", ")))
            }
        };
        self.moves = Some(Move { who, reason: format!("{why}: {faster}"), is_for_new });
        true
    }

    /// How many times longer than planned something takes by the newest window; nothing if it is about as planned.
    fn drifted<'a>(&self, part: &'a Part) -> Option<(&'a Part, f64)> {
        let factor = self.newest.get(part)? / self.planned_by(part);
        let differs = match part {
            Part::CompNode(_) => (factor - 1.0).abs() > AS_PLANNED,
            Part::Link(..) => !(1.0 / AS_MEASURED..AS_MEASURED).contains(&factor),
        };
        differs.then_some((part, factor))
    }

    /// The job leaves its placement. Why, if that is for the sake of a better one: it rests after it.
    pub(super) fn leaves(&mut self, now: Duration) -> Option<Move> {
        let moves = self.moves.take()?;
        // Of one that began with newcomers there may be no window yet.
        self.before = (self.step_s > 0.0).then_some(self.step_s);
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

impl Part {
    /// The CompNodes that it is about.
    fn names(&self) -> Vec<String> {
        match self {
            Self::CompNode(name) => vec![name.clone()],
            Self::Link(from, to) => vec![from.clone(), to.clone()],
        }
    }

    /// Says how it differs from the plan.
    fn told(&self, factor: f64) -> String {
        let (times, slow) = if factor > 1.0 { (factor, true) } else { (1.0 / factor, false) };
        match self {
            Self::CompNode(name) if slow => format!("CompNode `{name}` computes {times:.1} times as long as planned"),
            Self::CompNode(name) => format!("CompNode `{name}` computes {times:.1} times as fast as planned"),
            Self::Link(from, to) => {
                let as_what = if slow { "slow" } else { "fast" };
                format!("the link from `{from}` to `{to}` is {times:.1} times as {as_what} as planned")
            }
        }
    }
}

/// A cluster as its CompNodes were seen to compute, and its links to carry.
pub(super) fn slowed(mut cluster: Cluster, factors: &Factors) -> Cluster {
    let names: Vec<String> = cluster.compnodes.iter().map(|compnode| compnode.name.clone()).collect();
    for compnode in &mut cluster.compnodes {
        if let Some(factor) = factors.get(&Part::CompNode(compnode.name.clone())) {
            *compnode = compnode.slowed(*factor);
        }
    }
    for (from, row) in names.iter().zip(&mut cluster.links) {
        for (to, link) in names.iter().zip(row) {
            if let Some(factor) = factors.get(&Part::Link(from.clone(), to.clone())) {
                link.bytes_per_s /= factor;
            }
        }
    }
    cluster
}

/// How many times longer each link takes than was measured, of those that carry something for a good part of the time.
fn carried(
    planned: &Planned<'_>,
    steps: &[(f64, Vec<f64>)],
    came: &BTreeMap<(NodeIndex, NodeIndex), (u64, f64)>,
) -> Factors {
    let all_s: f64 = steps.iter().map(|(step_s, _)| step_s).sum();
    let name = |node: NodeIndex| planned.prediction.compnodes.get(node.index()).map(|compnode| compnode.name.clone());
    let factor = |(&(from, to), &(bytes, busy_s)): (&(NodeIndex, NodeIndex), &(u64, f64))| {
        let measured = planned.bytes_per_s.get(&(from, to))?;
        let is_busy = busy_s >= BUSY_LINK * all_s && bytes as f64 >= LEAST_BYTES * steps.len() as f64;
        let factor = measured * busy_s / bytes as f64;
        let factor = if factor < AS_MEASURED { 1.0 } else { factor.min(SLOWEST_LINK) };
        Some((Part::Link(name(from)?, name(to)?), factor)).filter(|_| is_busy && factor.is_finite())
    };
    came.iter().filter_map(factor).collect()
}

/// Whether two windows say about the same.
fn is_alike(one: &Factors, other: &Factors) -> bool {
    let alike =
        |(part, factor): (&Part, &f64)| one.get(part).is_some_and(|before| (factor / before - 1.0).abs() <= AS_PLANNED);
    one.len() == other.len() && other.iter().all(alike)
}

/// 0 of nothing.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use fusionllm_planner::{CompNodePrediction, LinkProfile};

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
            recomputes: false,
        };
        let compnodes = [("a", 0.5), ("b", 0.25)].map(compnode).to_vec();
        let (links, critical_path) = (Vec::new(), Vec::new());
        Prediction { step_s: 1.0, formula_s: 1.0, tokens_per_s: 1.0, compnodes, links, critical_path }
    }

    fn planned(prediction: &Prediction, is_timed: [bool; 2]) -> Planned<'_> {
        let bytes_per_s = [((NodeIndex(0), NodeIndex(1)), 1e6)].into();
        Planned { prediction, is_timed: is_timed.to_vec(), bytes_per_s }
    }

    fn look(drift: &mut Drift, is_timed: [bool; 2], told: &mut Vec<String>, now: u64) -> bool {
        drift.look(&planned(&prediction(), is_timed), told, at(now))
    }

    fn of(name: &str) -> Part {
        Part::CompNode(name.to_owned())
    }

    /// Twenty steps of a second each.
    fn window(drift: &mut Drift, busy_s: [f64; 2], from: u64) -> (bool, Vec<String>) {
        for second in from..from + 20 {
            assert!(!look(drift, [true; 2], &mut Vec::new(), second), "too early");
            drift.stepped(1.0, busy_s.to_vec(), &[], at(second));
        }
        let mut told = Vec::new();
        (look(drift, [true; 2], &mut told, from + 19), told)
    }

    fn weighed(drift: &mut Drift, now_s: f64, then_s: f64, left: u64) -> bool {
        drift.weighed(Weighed { now_s, then_s }, left, at(1), &["c".to_owned()])
    }

    #[test]
    fn speeds_are_held_against_the_plan() {
        let mut drift = Drift::default();
        assert!(!window(&mut drift, [0.52, 0.24], 0).0);
        assert!(window(&mut drift, [0.5, 0.5], 100).0);
        let factors = drift.factors(at(120));
        assert_eq!((factors[&of("a")], factors[&of("b")]), (1.0, 2.0));
        // Of a GPU nothing is concluded.
        window(&mut drift, [0.5, 0.25], 200);
        (0..20).for_each(|second| drift.stepped(1.0, vec![0.5, 9.0], &[], at(300 + second)));
        assert!(!look(&mut drift, [true, false], &mut Vec::new(), 319));
        // Twenty steps within a second say little.
        let mut drift = Drift::default();
        for _ in 0..40 {
            drift.stepped(0.01, vec![9.0, 9.0], &[], at(0));
        }
        assert!(!look(&mut drift, [true; 2], &mut Vec::new(), 1));
    }

    #[test]
    fn a_job_moves_when_another_placement_was_better_three_times_and_pays() {
        let mut drift = Drift::default();
        for (n, moves) in [(0, false), (1, false), (2, true)] {
            assert!(window(&mut drift, [0.5, 0.5], 100 * n).0);
            assert_eq!(weighed(&mut drift, 1.0, 0.7, 1000), moves);
        }
        assert!(!drift.may_move(at(1000), at(221)), "it is about to");
        let Move { who, reason, is_for_new } = drift.leaves(at(230)).unwrap();
        assert_eq!((who, is_for_new), (vec!["b".to_owned()], false));
        let expected = "the job moves, since CompNode `b` computes 2.0 times as long as planned: a step is predicted to take \
                        700.0 ms instead of 1.00 s";
        assert_eq!(reason, expected);
        assert_eq!(drift.plans(at(231))[&of("b")], 2.0, "the next plan goes by it");
        drift.placed();
        // And so do the factors that come after it.
        assert!(window(&mut drift, [0.5, 0.125], 300).0);
        assert_eq!(drift.factors(at(340))[&of("b")], 1.0);
    }

    #[test]
    fn what_is_measured_anew_is_not_counted_twice() {
        let mut drift = Drift::default();
        window(&mut drift, [1.0, 1.0], 0);
        drift.measured_anew(of("b"));
        assert_eq!(drift.factors(at(21)).get(&of("b")), None);
        assert_eq!(drift.plans(at(22)), [(of("a"), 2.0)].into());
        drift.placed();
        // This plan's time of `b` is that of the new measurement.
        window(&mut drift, [0.5, 0.25], 100);
        assert_eq!(drift.factors(at(121)), [(of("a"), 2.0), (of("b"), 1.0)].into());
        // Meanwhile the placement at hand is held against its own plan.
        drift.measured_anew(of("a"));
        assert!(!window(&mut drift, [0.5, 0.25], 200).0);
        assert_eq!(drift.plans(at(222)), [(of("b"), 1.0)].into());
    }

    /// However it came to the next placement, that was planned by what was seen.
    #[test]
    fn what_was_seen_is_known_after_a_loss_and_is_forgotten_after_an_hour_without_work() {
        let mut drift = Drift::default();
        window(&mut drift, [0.5, 1.0], 0);
        drift.plans(at(30));
        drift.disturbed();
        drift.placed();
        // It computes as this plan has it, which is slowly.
        assert!(!window(&mut drift, [0.5, 0.25], 100).0);
        assert_eq!(drift.factors(at(120))[&of("b")], 4.0);
        drift.plans(at(130));
        drift.placed();
        assert_eq!(drift.factors(at(140))[&of("b")], 4.0);
        assert_eq!(drift.plans(at(130 + 3600)).get(&of("b")), None);
        drift.placed();
        assert!(window(&mut drift, [0.5, 1.0], 4000).0);
        assert_eq!(drift.factors(at(4020))[&of("b")], 4.0, "and is found out anew");
        // A placement that nobody has planned just now goes by what was measured.
        drift.placed();
        assert_eq!(drift.factors(at(4030)), Factors::new());
    }

    /// A plan each ten seconds would slow down what is measured.
    #[test]
    fn what_did_not_pay_is_not_weighed_again_as_long_as_nothing_changes() {
        let mut drift = Drift::default();
        assert!(window(&mut drift, [0.5, 0.5], 0).0);
        assert!(!weighed(&mut drift, 1.0, 0.99, 10_000));
        assert!(!window(&mut drift, [0.5, 0.51], 100).0);
        assert!(window(&mut drift, [0.5, 0.7], 200).0);
    }

    /// Two seconds of ten in which a megabyte came each, where 10 MB/s were measured.
    #[test]
    fn a_link_that_has_become_slow_is_a_reason_too() {
        let mut drift = Drift::default();
        let came = |bytes, busy_s| [Came { from: NodeIndex(0), to: NodeIndex(1), bytes, busy_s }];
        let link = Part::Link("a".to_owned(), "b".to_owned());
        let see = |drift: &mut Drift, bytes, busy_s, from: u64| {
            for second in from..from + 20 {
                drift.stepped(1.0, vec![0.5, 0.25], &came(bytes, busy_s), at(second));
            }
            look(drift, [true; 2], &mut Vec::new(), from + 19)
        };
        assert!(!see(&mut drift, 150_000, 0.2, 0), "it is near what was measured");
        assert!(!see(&mut drift, 1000, 0.2, 100), "it carries little");
        assert!(!see(&mut drift, 100_000, 0.09, 100), "it is mostly idle");
        assert!(see(&mut drift, 80_000, 0.8, 200));
        assert!((drift.factors(at(220))[&link] - 10.0).abs() < 1e-9);
        for _ in 0..2 {
            assert!(!weighed(&mut drift, 1.0, 0.5, 10_000));
        }
        assert!(weighed(&mut drift, 1.0, 0.5, 10_000));
        let moves = drift.leaves(at(230)).unwrap();
        assert_eq!(moves.who, ["a", "b"]);
        assert!(moves.reason.contains("the link from `a` to `b` is 10.0 times as slow as planned"), "{}", moves.reason);
        let slower = slowed(
            Cluster {
                links: vec![vec![LinkProfile { latency_s: 0.0, bytes_per_s: 1e6 }; 2]; 2],
                ..Cluster::uniform(2)
            },
            &Factors::new(),
        );
        assert_eq!(slower.link(0, 1).bytes_per_s, 1e6);
        let factors = [(Part::Link("compnode-0".to_owned(), "compnode-1".to_owned()), 10.0)].into();
        let slower = slowed(slower, &factors);
        assert_eq!((slower.link(0, 1).bytes_per_s, slower.link(1, 0).bytes_per_s), (1e5, 1e6));
        drift.plans(at(235));
        drift.placed();
        assert!(see(&mut drift, 200_000, 0.2, 300), "it is fast again");
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
        drift.placed();
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
        let moves = drift.leaves(at(7)).unwrap();
        assert!(moves.is_for_new && moves.reason.starts_with("the job moves to more CompNodes, `c` may work for it: "));
    }

    #[test]
    fn after_a_move_in_vain_it_rests_longer_and_says_so() {
        let mut drift = Drift::default();
        let mut now = 0;
        for rest in [1200, 2400, 4800] {
            drift.moves = Some(Move { who: Vec::new(), reason: String::new(), is_for_new: false });
            drift.step_s = 1.0;
            drift.leaves(at(now)).unwrap();
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
        drift.step_s = 2.0;
        drift.leaves(at(now)).unwrap();
        assert_eq!(window(&mut drift, [0.5, 0.25], now + 1).1, Vec::<String>::new());
        assert!(drift.may_move(at(100_000), at(now + 600)));
    }
}
