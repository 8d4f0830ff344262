//! Memory for live micro-batches is bounded by the task order.

use fusionllm_planner::{NodeIndex, Pipeline};

use crate::run::{Outcome, Run, job, small_gpt2};

const TRAIN: &str = "steps = 2\nbatch = 16\nmicro_batches = 8\nlr = 1e-3\nwarmup = 0\neval_batches = 2";

fn live(pipeline: Pipeline) -> (Outcome, Vec<u32>) {
    let mut spec = job(TRAIN);
    spec.placement.pipeline = pipeline;
    spec.placement.run_ahead = Some(0);
    let run = Run::new(small_gpt2(0.0), spec, 3);
    let bounds = (0..3).map(|n| run.placement.live_bound(NodeIndex(n)).into_values().max().unwrap()).collect();
    (run.synthetic(), bounds)
}

#[test]
fn one_forward_one_backward_keeps_no_more_micro_batches_than_stages_follow() {
    let (outcome, bounds) = live(Pipeline::OneFOneB);
    assert_eq!(bounds, [3, 2, 1]);
    for (log, bound) in outcome.logs.iter().zip(bounds) {
        assert!(log.reports.iter().all(|r| r.live_max == bound), "{:?}", log.reports);
    }
}

#[test]
fn gpipe_keeps_every_micro_batch() {
    let (outcome, bounds) = live(Pipeline::GPipe);
    assert_eq!(bounds, [8, 8, 8]);
    assert!(outcome.logs.iter().all(|l| l.reports.iter().all(|r| r.live_max == 8)));
}
