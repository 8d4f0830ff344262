//! Adapting compression while training: ratios follow measured links, and stop where codecs introduce too much error.
//!
//! A direction of a link needs the ratio at which its messages of a step take no longer than the busiest CompNode
//! computes. It gets that ratio, no more than the job allows, and no more than keeps the measured error of its codec
//! within a budget, which tightens as the loss flattens. Several steps must agree before anything changes, and small
//! differences change nothing, so that under steady conditions it settles.

use std::collections::BTreeMap;

use fusionllm_codec::{Codec, TopKValues};
use fusionllm_graph::OpDag;

use crate::compression::{best_in_time, ratio_behind};
use crate::{Compression, Direction, EdgeId, NodeIndex, Placement, Route, Way, topk_of_ratio};

/// Steps between two decisions.
const PERIOD: u64 = 10;
/// Weight of a step in the averages of speeds, bytes and errors.
const WEIGHT: f64 = 0.2;
/// Weight of a step in the short average of the loss.
const SHORT_LOSS_WEIGHT: f64 = 0.1;
/// Weight of a step in the long average of the loss.
const LONG_LOSS_WEIGHT: f64 = 0.02;
/// Weight of a measured error in its average: errors are sampled, so each counts for more than a step does.
const ERROR_WEIGHT: f64 = 0.5;
/// A ratio is raised when more than this many times the ratio in force is needed.
const RAISED_ABOVE: f64 = 1.25;
/// A ratio is lowered when less than this share of the ratio in force is needed.
const LOWERED_BELOW: f64 = 0.7;
/// Decisions in a row that must agree before a ratio changes.
const PATIENCE: u32 = 2;
/// Least share of the error budget that is left when the loss is flat.
const LEAST_BUDGET: f64 = 0.25;
/// The budget is whole while the loss falls at least this share of the fastest that it fell.
const STEEP: f64 = 0.25;
/// A limit that the error set is loosened by this factor each decision, while the error is well within the budget.
const LOOSENING: f64 = 1.1;
/// What counts as well within.
const WELL_WITHIN: f64 = 0.7;
/// Fewer bytes than this in a step say nothing about a link's speed.
const LEAST_BYTES: u64 = 64 << 10;

/// What a step showed of one direction of a link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkObservation {
    /// The CompNode that sends.
    pub from: NodeIndex,
    /// The CompNode that receives.
    pub to: NodeIndex,
    /// Bytes of its tensors as dense f32.
    pub dense_bytes: u64,
    /// Bytes of payloads that came.
    pub received_bytes: u64,
    /// Seconds for which payloads were coming in.
    pub busy_s: f64,
    /// Relative error of its codec, where it was measured.
    pub error: Option<f64>,
}

/// What a step showed.
#[derive(Clone, Debug, PartialEq)]
pub struct StepObservation {
    /// Updates done, this one included.
    pub step: u64,
    /// Training loss of the step, in nats per token.
    pub loss: f64,
    /// Seconds that the busiest CompNode computed.
    pub compute_s: f64,
    /// What each direction of a link showed.
    pub links: Vec<LinkObservation>,
}

/// A codec that changes.
#[derive(Clone, Debug, PartialEq)]
pub struct CodecChange {
    /// The edge whose codec changes.
    pub edge: EdgeId,
    /// Whether the codec of its activations or of its gradients changes.
    pub way: Way,
    /// The CompNode that encodes.
    pub sender: NodeIndex,
    /// The codec from now on.
    pub codec: Codec,
    /// Why it changes, as a sentence.
    pub reason: String,
}

/// Watches steps and changes codecs.
#[derive(Debug)]
pub struct Controller {
    policy: Compression,
    most_ratio: f64,
    error_budget: f64,
    otherwise: Codec,
    compute_s: Average,
    short_loss: Average,
    long_loss: Average,
    fastest: f64,
    links: BTreeMap<Route, Link>,
}

/// An exponential moving average; nothing until something was seen.
#[derive(Clone, Copy, Debug, Default)]
struct Average(Option<f64>);

impl Average {
    fn add(&mut self, value: f64, weight: f64) {
        self.0 = Some(self.0.map_or(value, |old| old + weight * (value - old)));
    }
}

#[derive(Debug)]
struct Link {
    carried: Vec<Carried>,
    /// Dense bytes over sent bytes of the codec in force.
    ratio: f64,
    /// The most that the error allows, as far as is known.
    error_limit: f64,
    bytes_per_s: Average,
    dense_bytes: Average,
    error: Average,
    /// Decisions in a row that wanted a higher (above 0) or a lower ratio.
    votes: i32,
}

/// One boundary tensor of a direction of a link, and the codec in force.
#[derive(Debug)]
struct Carried {
    edge: EdgeId,
    way: Way,
    shape: Vec<usize>,
    /// Of its dense message.
    dense_bytes: f64,
    codec: Codec,
}

impl Controller {
    /// A controller over the boundary edges of `placement`, whose codecs are in force, in micro-batches of `batch`
    /// samples. `policy` gives the family of codecs and the highest ratio; `otherwise` is for what need not be smaller.
    pub fn new(
        dag: &OpDag,
        placement: &Placement,
        batch: usize,
        policy: Compression,
        otherwise: Codec,
        error_budget: f64,
    ) -> Self {
        let mut links: BTreeMap<Route, Link> = BTreeMap::new();
        for edge in placement.edges.iter().filter(|e| e.is_real(dag) && placement.is_boundary(e)) {
            let output = &dag.op(edge.op).output;
            let (shape, dense_bytes) = (output.shape.resolve(batch), output.bytes(batch) as f64);
            for way in edge.ways() {
                let Some(route) = placement.route(edge, way) else { continue };
                let codec = edge.codec(way);
                let link = links.entry(route).or_insert_with(|| Link::new(ratio_behind(codec, &shape, way)));
                link.carried.push(Carried { edge: edge.id, way, shape: shape.clone(), dense_bytes, codec });
            }
        }
        Self {
            policy,
            most_ratio: policy.highest_ratio().max(1.0),
            error_budget,
            otherwise,
            compute_s: Average::default(),
            short_loss: Average::default(),
            long_loss: Average::default(),
            fastest: 0.0,
            links,
        }
    }

    /// Takes in what a step showed; gives what changes.
    pub fn observe(&mut self, step: &StepObservation) -> Vec<CodecChange> {
        self.compute_s.add(step.compute_s, WEIGHT);
        self.short_loss.add(step.loss, SHORT_LOSS_WEIGHT);
        self.long_loss.add(step.loss, LONG_LOSS_WEIGHT);
        self.fastest = self.fastest.max(self.fall());
        for seen in &step.links {
            let Some(link) = self.links.get_mut(&Route { from: seen.from, to: seen.to }) else { continue };
            link.dense_bytes.add(seen.dense_bytes as f64, WEIGHT);
            if seen.received_bytes >= LEAST_BYTES && seen.busy_s > 0.0 {
                link.bytes_per_s.add(seen.received_bytes as f64 / seen.busy_s, WEIGHT);
            }
            if let Some(error) = seen.error.filter(|e| e.is_finite()) {
                link.error.add(error, ERROR_WEIGHT);
            }
        }
        if step.step.is_multiple_of(PERIOD) { self.decide() } else { Vec::new() }
    }

    /// How much lower the short average of the loss is than the long one, as a share.
    fn fall(&self) -> f64 {
        match (self.short_loss.0, self.long_loss.0) {
            (Some(short), Some(long)) if long > 0.0 => ((long - short) / long).max(0.0),
            _ => 0.0,
        }
    }

    /// What codecs may drop now.
    fn budget(&self) -> f64 {
        let steep = if self.fastest > 0.0 { self.fall() / (STEEP * self.fastest) } else { 1.0 };
        self.error_budget * steep.clamp(LEAST_BUDGET, 1.0)
    }

    fn decide(&mut self) -> Vec<CodecChange> {
        let budget = self.budget();
        let Some(compute_s) = self.compute_s.0.filter(|s| *s > 0.0) else { return Vec::new() };
        let (policy, otherwise, most_ratio) = (self.policy, self.otherwise, self.most_ratio);
        let mut changes = Vec::new();
        for (&Route { from, .. }, link) in &mut self.links {
            let decision = link.decide(compute_s, budget, most_ratio);
            let (Some((ratio, reason)), Some(bytes_per_s)) = (decision, link.bytes_per_s.0) else { continue };
            link.ratio = ratio;
            for tensor in &mut link.carried {
                let Carried { edge, way, ref shape, dense_bytes, .. } = *tensor;
                let direction = Direction { shape: shape.clone(), dense_s: dense_bytes / bytes_per_s, way };
                let codec = codec_of(policy, &direction, ratio, otherwise);
                if codec != tensor.codec {
                    tensor.codec = codec;
                    changes.push(CodecChange { edge, way, sender: from, codec, reason: reason.clone() });
                }
            }
        }
        changes
    }
}

impl Link {
    fn new(ratio: f64) -> Self {
        Self {
            carried: Vec::new(),
            ratio,
            error_limit: f64::INFINITY,
            bytes_per_s: Average::default(),
            dense_bytes: Average::default(),
            error: Average::default(),
            votes: 0,
        }
    }

    /// A new ratio and its reason, once enough decisions agree.
    fn decide(&mut self, compute_s: f64, budget: f64, most_ratio: f64) -> Option<(f64, String)> {
        let dense_s = self.dense_bytes.0? / self.bytes_per_s.0?;
        let needed = (dense_s / compute_s).clamp(1.0, most_ratio);
        let error = self.error.0.unwrap_or(0.0);
        if error > budget {
            // As if the error grew in proportion to the ratio; if it does not, the next decision goes on from there.
            self.error_limit = (self.ratio * (budget / error)).max(1.0);
        } else if error < WELL_WITHIN * budget {
            self.error_limit *= LOOSENING;
        }
        let target = needed.min(self.error_limit);
        let vote = i32::from(target > self.ratio * RAISED_ABOVE) - i32::from(target < self.ratio * LOWERED_BELOW);
        self.votes = if vote == 0 || vote.signum() != self.votes.signum() { vote } else { self.votes + vote };
        if self.votes.unsigned_abs() < PATIENCE {
            return None;
        }
        self.votes = 0;
        // What was measured belongs to the codec that goes.
        self.error = Average::default();
        let reason = if target < needed {
            format!("its codec drops {:.0} %, {:.0} % are allowed", error * 100.0, budget * 100.0)
        } else if vote > 0 {
            format!("dense it would take {dense_s:.2} s a step, the busiest CompNode computes for {compute_s:.2} s")
        } else {
            format!("it is fast enough: {dense_s:.2} s a step dense, {compute_s:.2} s of compute")
        };
        Some((target, reason))
    }
}

fn codec_of(policy: Compression, direction: &Direction, ratio: f64, otherwise: Codec) -> Codec {
    let topk = |values| topk_of_ratio(&direction.shape, ratio, values, otherwise);
    match policy {
        Compression::UniformTopk { values, .. } | Compression::AdaTopk { values, .. } => topk(values),
        Compression::Adaptive { .. } => best_in_time(direction, ratio, otherwise),
        Compression::Dense => otherwise,
        Compression::Fixed { .. } => topk(TopKValues::Bf16),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::testing::small_gpt2;
    use crate::{Cluster, Pipeline, PlacementSpec, Strategy, place};

    const COMPUTE_S: f64 = 0.5;
    const DENSE_BYTES: f64 = 4e6;

    /// A run of two CompNodes over a link of `bytes_per_s(step)` each way, whose codecs drop `error(ratio)`.
    struct Run {
        controller: Controller,
        compute_s: f64,
        ratio: f64,
        changes: Vec<u64>,
        /// That it changed to.
        codecs: BTreeSet<String>,
    }

    const TOPK: Compression = Compression::AdaTopk { ratio: 50.0, values: TopKValues::Bf16, literal: false };

    impl Run {
        fn new(policy: Compression) -> Self {
            let dag = small_gpt2(2);
            let spec = PlacementSpec {
                strategy: Strategy::EqualCompute,
                stages: Vec::new(),
                pipeline: Pipeline::OneFOneB,
                run_ahead: None,
                deferred: None,
                micro_batches: 2,
                micro_batch_size: 2,
                eval_micro_batches: 1,
                private: false,
                keep_blocks: [0; 2],
                codec: Codec::Dense,
            };
            let placement = place(&dag, &Cluster::uniform(2), &spec).unwrap();
            let controller = Controller::new(&dag, &placement, 2, policy, Codec::Dense, 0.5);
            Self { controller, compute_s: COMPUTE_S, ratio: 1.0, changes: Vec::new(), codecs: BTreeSet::new() }
        }

        fn steps(
            &mut self,
            steps: std::ops::Range<u64>,
            bytes_per_s: f64,
            loss: impl Fn(u64) -> f64,
            error: impl Fn(f64) -> f64,
        ) {
            for step in steps {
                let link = |from, to| LinkObservation {
                    from: NodeIndex(from),
                    to: NodeIndex(to),
                    dense_bytes: DENSE_BYTES as u64,
                    received_bytes: (DENSE_BYTES / self.ratio) as u64,
                    busy_s: DENSE_BYTES / self.ratio / bytes_per_s,
                    error: Some(error(self.ratio)),
                };
                let links = vec![link(0, 1), link(1, 0)];
                let seen = StepObservation { step, loss: loss(step), compute_s: self.compute_s, links };
                let changes = self.controller.observe(&seen);
                if !changes.is_empty() {
                    self.changes.push(step);
                    self.ratio = self.controller.links[&Route { from: NodeIndex(0), to: NodeIndex(1) }].ratio;
                    assert!(changes.iter().all(|c| !c.reason.is_empty()));
                    self.codecs.extend(changes.iter().map(|c| c.codec.to_string()));
                }
            }
        }
    }

    fn falling(step: u64) -> f64 {
        4.0 * 0.99f64.powi(step as i32)
    }

    #[test]
    fn a_slow_link_is_compressed_and_gets_its_precision_back() {
        let mut run = Run::new(TOPK);
        run.steps(1..60, 1e9, falling, |_| 0.0);
        assert_eq!((run.ratio, run.changes.len()), (1.0, 0), "a fast link stays exact");
        run.steps(60..160, 1e6, falling, |_| 0.01);
        // 4 s dense beside 0.5 s of compute.
        assert!((run.ratio - 8.0).abs() < 2.0, "{}", run.ratio);
        run.steps(160..300, 1e9, falling, |_| 0.01);
        assert_eq!(run.ratio, 1.0);
    }

    #[test]
    fn under_steady_conditions_it_settles() {
        let mut run = Run::new(TOPK);
        run.steps(1..100, 1e6, falling, |ratio| 0.01 * ratio);
        let changes = run.changes.len();
        run.steps(100..1000, 1e6, falling, |ratio| 0.01 * ratio);
        assert_eq!(run.changes.len(), changes, "{:?}", run.changes);
    }

    #[test]
    fn the_error_stays_within_a_budget_that_tightens() {
        let mut run = Run::new(TOPK);
        let error = |ratio: f64| if ratio > 1.0 { 0.02 * ratio } else { 0.0 };
        run.steps(1..200, 1e5, falling, error);
        // 80 times would be needed, the job allows 50, and 50 % of error 25.
        assert!(run.ratio > 12.0 && error(run.ratio) < 0.55, "{}", run.ratio);
        let before = run.ratio;
        run.steps(200..600, 1e5, |_| 0.5, error);
        assert!(run.ratio < before / 2.0 && error(run.ratio) < 0.2, "{} after {before}", run.ratio);
    }

    #[test]
    fn a_link_that_is_faster_than_transform_coding_goes_no_further_than_int4() {
        let adaptive = Compression::Adaptive { ratio: 16.0 };
        let [mut fast, mut slow] = [Run::new(adaptive), Run::new(adaptive)];
        // Both need a ratio of 16 beside so little compute.
        fast.compute_s = 1e-3;
        fast.steps(1..100, 40e6, falling, |_| 0.01);
        assert_eq!(fast.codecs, BTreeSet::from(["int4".to_owned()]));
        assert_eq!(fast.changes.len(), 1, "once: {:?}", fast.changes);
        slow.steps(1..100, 1e5, falling, |_| 0.01);
        assert!(slow.codecs.iter().any(|codec| codec.starts_with("transform")), "{:?}", slow.codecs);
    }
}
