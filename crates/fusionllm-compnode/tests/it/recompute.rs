//! Activations that are made anew in BP change no bit of what is trained.

use fusionllm_compnode::Batches;
use fusionllm_graph::OpDag;
use fusionllm_planner::Pipeline;

use crate::parity::small_llama;
use crate::resnet::BASIC;
use crate::run::{Outcome, Run, Synthetic, job, small_gpt2, stages};

const TRAIN: &str = "steps = 4\nbatch = 8\nmicro_batches = 4\nlr = 1e-2\nwarmup = 0\nclip = 1.0\neval_every = 2\neval_batches = 2\nseed = 3";

/// Runs `dag` cut after these ops, with activations kept and made anew on all CompNodes but those of `keeping`.
fn both<B: Batches + Clone + 'static>(
    dag: &OpDag,
    list: &[(u32, &str)],
    pipeline: Pipeline,
    keeping: &[usize],
    batches: &B,
) -> [Outcome; 2] {
    [false, true].map(|anew| {
        let mut spec = job(TRAIN);
        (spec.placement.stages, spec.placement.pipeline) = (stages(list), pipeline);
        // A CompNode that makes activations anew puts no weight gradients off.
        spec.placement.deferred = Some(0);
        let compnodes = list.iter().map(|&(compnode, _)| compnode as usize + 1).max().unwrap();
        let mut run = Run::new(dag.clone(), spec, compnodes);
        if anew {
            run.placement.recompute = run.placement.nodes().filter(|node| !keeping.contains(&node.index())).collect();
        }
        run.on(batches)
    })
}

fn check<B: Batches + Clone + 'static>(
    dag: &OpDag,
    list: &[(u32, &str)],
    pipeline: Pipeline,
    keeping: &[usize],
    on: &B,
) {
    let [kept, anew] = both(dag, list, pipeline, keeping, on);
    let what = format!("{list:?}, {pipeline:?}, {keeping:?}");
    assert_eq!(anew.losses(), kept.losses(), "{what}");
    assert_eq!(anew.norms(), kept.norms(), "{what}");
    assert_eq!(anew.eval_losses(), kept.eval_losses(), "{what}");
    assert_eq!(anew.checkpoint(4), kept.checkpoint(4), "{what}");
    for (anew, kept) in anew.logs.iter().zip(&kept.logs) {
        let live = |of: &crate::run::Log| of.reports.iter().map(|report| report.live_max).max();
        assert_eq!(live(anew), live(kept), "{what}");
    }
}

#[test]
fn a_gpt2_with_dropout_and_a_tied_table() {
    let batches = Synthetic { micro_batch_size: 2 };
    let dag = small_gpt2(0.2);
    for list in [
        &[(0, "h.0.add_2"), (1, "h.1.attn"), (2, "loss")][..],
        // Without the table's second use, a whole model.
        &[(0, "h.1.ln_2"), (1, "loss")],
        &[(0, "wpe"), (1, "h.1.ln_1"), (2, "h.2.mlp.act"), (0, "loss")],
    ] {
        check(&dag, list, Pipeline::OneFOneB, &[], &batches);
        check(&dag, list, Pipeline::GPipe, &[1], &batches);
    }
}

#[test]
fn a_llama() {
    let batches = Synthetic { micro_batch_size: 2 };
    for list in [&[(0, "loss")][..], &[(0, "layers.0.mlp.up_proj"), (1, "loss")]] {
        check(&small_llama(), list, Pipeline::OneFOneB, &[], &batches);
    }
}

/// Running means and variances are moved once, though FP comes twice.
#[test]
fn a_resnet_in_the_middle_of_residual_blocks() {
    let [first, second] = BASIC.cuts;
    for list in [&[(0, "loss")][..], &[(0, first), (1, second), (2, "loss")]] {
        check(&BASIC.dag(), list, Pipeline::OneFOneB, &[], &BASIC.batches());
    }
}
