//! Private data: what stays with its owner is drawn from a seed of its own, and the losses are those of any placement.

use fusionllm_codec::Codec;
use fusionllm_compnode::NamedTensor;
use fusionllm_planner::Strategy;
use fusionllm_protocol::{CompressionPolicy, JobSpec};

use crate::run::{Outcome, Run, assert_close, job, small_gpt2, stages};

const TRAIN: &str = "steps = 8\nbatch = 8\nmicro_batches = 4\nlr = 1e-2\nwarmup = 2\nclip = 0.0\neval_every = 4\n\
                     eval_batches = 3\nseed = 3";
/// The loss of any placement against that of one process.
const TOLERANCE: f64 = 1e-5;

fn spec(keep_blocks: [u32; 2]) -> JobSpec {
    let mut spec = job(TRAIN);
    (spec.data.private, spec.data.keep_blocks) = (true, keep_blocks);
    spec.placement.strategy = Strategy::EqualCompute;
    spec
}

fn run(spec: JobSpec, compnodes: usize, own: u8) -> Run {
    Run { own: Some([own; 32]), ..Run::new(small_gpt2(0.2), spec, compnodes) }
}

fn all_losses(outcome: &Outcome) -> Vec<f64> {
    [outcome.losses(), outcome.eval_losses()].concat()
}

/// Whether two series are further apart than placements may be.
fn differ(a: &[f64], b: &[f64]) -> bool {
    a.iter().zip(b).any(|(a, b)| (a - b).abs() > 100.0 * TOLERANCE * b)
}

#[test]
fn a_private_run_has_the_same_losses_on_any_placement() {
    for keep in [[0, 0], [1, 0], [0, 1], [1, 1]] {
        let one = all_losses(&run(spec(keep), 1, 7).synthetic());
        for compnodes in [2, 3] {
            let cut = run(spec(keep), compnodes, 7);
            assert_eq!(cut.placement.stages.len(), compnodes + 1, "a U");
            let what = format!("{keep:?} on {compnodes} CompNodes");
            assert_close(&what, &all_losses(&cut.synthetic()), &one, TOLERANCE);
        }
        // The owner may hold more than it must: what is drawn does not depend on it.
        let mut more = spec(keep);
        more.placement.stages = stages(&[(0, "h.1.attn"), (1, "h.1.add_2"), (0, "loss")]);
        assert_close("a small middle", &all_losses(&run(more, 2, 7).synthetic()), &one, TOLERANCE);
        assert!(differ(&all_losses(&run(spec(keep), 1, 8).synthetic()), &one), "another seed");
    }
    let of = |keep| all_losses(&run(spec(keep), 1, 7).synthetic());
    assert!(differ(&of([0, 0]), &of([1, 0])), "a block that is kept has other values");
}

fn value(of: &[NamedTensor], name: &str) -> Vec<f32> {
    of.iter().find(|tensor| tensor.name == name).unwrap().values.clone()
}

/// What others hold begins with what the job's seed gives, and what stays does not.
#[test]
fn what_stays_begins_with_values_that_nobody_else_can_make() {
    let first = |own: Option<[u8; 32]>| {
        let mut still = spec([0, 0]);
        (still.train.lr, still.train.steps, still.train.warmup, still.checkpoint.every) = (1e-30, 1, 0, 1);
        Run { own, ..Run::new(small_gpt2(0.0), still, 2) }.synthetic().checkpoint(1)
    };
    let (own, public) = (first(Some([7; 32])), first(None));
    for name in ["transformer.wte.weight", "transformer.wpe.weight"] {
        assert_ne!(value(&own, name), value(&public, name), "{name}");
    }
    for name in ["transformer.h.0.attn.c_attn.weight", "transformer.h.2.mlp.c_proj.weight"] {
        assert_eq!(value(&own, name), value(&public, name), "{name}");
    }
}

#[test]
fn a_private_run_goes_on_as_if_nothing_had_been() {
    let mut whole = spec([0, 0]);
    whole.checkpoint.every = 4;
    let uninterrupted = run(whole.clone(), 2, 7).synthetic();
    let expected = &uninterrupted.losses()[4..];
    let rest = |own| {
        let weights = Some(uninterrupted.checkpoint(4));
        Run { weights, start_step: 4, ..run(whole.clone(), 3, own) }.synthetic().losses()
    };
    assert_close("resumed", &rest(7), expected, TOLERANCE);
    // With another seed only what is drawn from it differs: the weights are the checkpoint's.
    assert_close("another seed", &rest(8), expected, 0.2);
    assert!(differ(&rest(8), expected), "other masks");
}

#[test]
fn evaluations_go_by_the_codecs_of_training_where_data_is_private() {
    let mut still = spec([0, 0]);
    still.placement.stages = stages(&[(0, "h.0.add_2"), (1, "h.1.add_2"), (0, "loss")]);
    // No update changes anything, so that all evaluate the same model.
    (still.train.lr, still.train.steps, still.train.warmup, still.checkpoint.every) = (1e-30, 1, 0, 1);
    let weights = Run::new(small_gpt2(0.0), still.clone(), 2).synthetic().checkpoint(1);
    let evaluated = |private: bool, codec: Codec| {
        let mut spec = still.clone();
        spec.compression.policy = CompressionPolicy::Fixed;
        (spec.compression.activations, spec.compression.gradients) = (codec, codec);
        spec.data.private = private;
        let mut run = Run { weights: Some(weights.clone()), ..Run::new(small_gpt2(0.0), spec, 2) };
        for edge in &mut run.placement.edges {
            (edge.activation_codec, edge.gradient_codec) = (codec, codec);
        }
        run.synthetic().eval_losses()[0]
    };
    for name in ["int8", "int4", "transform:2", "topk:0.25:f32"] {
        let codec: Codec = name.parse().unwrap();
        assert_eq!(evaluated(true, Codec::Bf16), evaluated(false, codec), "others take bf16 whatever {name} is");
        assert_ne!(evaluated(true, codec), evaluated(false, codec), "{name}");
        assert_close("not far off", &[evaluated(true, codec)], &[evaluated(false, codec)], 0.1);
    }
    assert_eq!(evaluated(true, Codec::Dense), evaluated(false, Codec::Dense));
}
