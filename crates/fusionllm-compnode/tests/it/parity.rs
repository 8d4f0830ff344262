//! Any placement gives the same training, with a lossless codec.

use fusionllm_codec::Codec;
use fusionllm_graph::{Model, OpDag};
use fusionllm_planner::{Shared, Task};

use crate::run::{Outcome, Run, assert_close, job, small_gpt2, stages};

const TRAIN: &str = "steps = 20\nbatch = 8\nmicro_batches = 4\nlr = 1e-2\nwarmup = 5\nclip = 1.0\neval_every = 10\n\
                     eval_batches = 3\nseed = 3";
/// The loss of any placement against that of one process.
const TOLERANCE: f64 = 1e-5;

fn one_process() -> Outcome {
    Run::new(small_gpt2(0.0), job(TRAIN), 1).synthetic()
}

fn check(what: &str, spec_extra: &str, compnodes: usize, list: &[(u32, &str)]) -> Outcome {
    let mut spec = job(TRAIN);
    if spec_extra == "gpipe" {
        spec.placement.pipeline = fusionllm_planner::Pipeline::GPipe;
    }
    spec.placement.stages = stages(list);
    let outcome = Run::new(small_gpt2(0.0), spec, compnodes).synthetic();
    let expected = one_process();
    assert_close(what, &outcome.losses(), &expected.losses(), TOLERANCE);
    assert_close(&format!("{what}, evaluation"), &outcome.eval_losses(), &expected.eval_losses(), TOLERANCE);
    assert_close(&format!("{what}, norm"), &outcome.norms(), &expected.norms(), 1e-4);
    outcome
}

#[test]
fn the_one_process_run_learns() {
    let losses = one_process().losses();
    assert_eq!(losses.len(), 20);
    assert!(losses[19] < 0.8 * losses[0], "{losses:?}");
}

#[test]
fn cuts_at_block_edges() {
    check("2 CompNodes", "", 2, &[(0, "h.0.add_2"), (1, "loss")]);
    check("3 CompNodes", "", 3, &[(0, "h.0.add_2"), (1, "h.1.add_2"), (2, "loss")]);
}

#[test]
fn five_compnodes_cut_by_compute() {
    check("5 CompNodes", "", 5, &[]);
}

#[test]
fn cuts_inside_a_block_where_two_tensors_cross() {
    let outcome = check("inside a block", "", 2, &[(0, "h.1.attn"), (1, "loss")]);
    assert!(outcome.logs[0].reports[0].links[0].bytes > 0);
}

#[test]
fn a_compnode_with_two_disjoint_segments() {
    // The U-shape: input, head and loss at the data owner, so both uses of the tied embedding are there.
    check("U-shape", "", 3, &[(0, "wpe"), (1, "h.1.ln_1"), (2, "h.2.mlp.act"), (0, "loss")]);
}

/// Weight gradients that wait are those that do not, whenever the network lets them be made.
#[test]
fn deferred_weight_gradients() {
    let lists: [(usize, &[(u32, &str)]); 3] = [
        (2, &[(0, "h.1.attn"), (1, "loss")]),
        (3, &[(0, "h.0.add_2"), (1, "h.1.add_2"), (2, "loss")]),
        // Both uses of the tied embedding at the data owner, one of them deferred.
        (2, &[(0, "wpe"), (1, "h.2.add_2"), (0, "loss")]),
    ];
    let expected = one_process();
    for (compnodes, list) in lists {
        for deferred in [1, 4] {
            let mut spec = job(TRAIN);
            spec.placement.stages = stages(list);
            spec.placement.deferred = Some(deferred);
            let run = || Run::new(small_gpt2(0.0), spec.clone(), compnodes);
            let orders = run().placement.train.orders;
            assert!(orders.iter().all(|o| o.iter().any(|t| matches!(t, Task::Wg { .. }))));
            let (outcome, again) = (run().synthetic(), run().synthetic());
            let what = format!("{list:?}, {deferred} deferred");
            assert_close(&what, &outcome.losses(), &expected.losses(), TOLERANCE);
            assert_close(&format!("{what}, norm"), &outcome.norms(), &expected.norms(), 1e-4);
            // When they are made depends on the threads; what comes out must not.
            assert_eq!(outcome.losses(), again.losses(), "{what}");
        }
    }
}

#[test]
fn a_tied_embedding_on_two_compnodes() {
    let outcome = check("tied", "", 2, &[(0, "h.1.add_2"), (1, "loss")]);
    let last = outcome.checkpoint(20);
    let copies: Vec<_> = last.iter().filter(|t| t.name == "transformer.wte.weight").collect();
    assert_eq!(copies.len(), 2);
    assert_eq!(copies[0].values, copies[1].values, "the copies of the tied embedding drifted apart");
}

#[test]
fn quantized_gradients_of_a_tied_embedding_keep_its_copies_equal() {
    let mut spec = job(TRAIN);
    spec.placement.stages = stages(&[(0, "h.1.add_2"), (1, "loss")]);
    let dense = Run::new(small_gpt2(0.0), spec.clone(), 2).synthetic();
    let mut run = Run::new(small_gpt2(0.0), spec, 2);
    run.placement.shared[0].codec = Codec::Int4;
    let outcome = run.synthetic();
    let last = outcome.checkpoint(20);
    let copies: Vec<_> = last.iter().filter(|t| t.name == "transformer.wte.weight").collect();
    assert_eq!(copies[0].values, copies[1].values, "the copies of the tied embedding drifted apart");
    assert_close("int4", &outcome.losses(), &dense.losses(), 0.02);
    assert_ne!(outcome.losses(), dense.losses());
    let bytes = |o: &Outcome| o.logs[1].reports[0].links[0].bytes;
    assert!(bytes(&outcome) < bytes(&dense));
}

/// Parameters that the same CompNodes hold may be shared one by one or as one vector.
#[test]
fn several_shared_parameters_travel_as_one_vector() {
    // The first norms of two blocks are one, so its weight and bias are shared beside the table.
    let text = small_gpt2(0.0).to_json();
    let mut graph: serde_json::Value = serde_json::from_str(&text).unwrap();
    graph["params"].as_array_mut().unwrap().retain(|param| !param["name"].as_str().unwrap().contains("h.2.ln_1."));
    let text = graph.to_string().replace("h.2.ln_1.", "h.0.ln_1.");
    let mut spec = job(TRAIN);
    spec.placement.stages = stages(&[(0, "h.1.add_2"), (1, "loss")]);
    let run = || Run::new(OpDag::from_json(&text).unwrap(), spec.clone(), 2);
    let apart = run();
    assert_eq!(apart.placement.shared.len(), 3);
    let together = |codec| {
        let mut run = run();
        let mut all = run.placement.shared.drain(..);
        let mut first = all.next().unwrap();
        for other in all {
            assert_eq!(other.holders, first.holders);
            first.params.extend(other.params);
            first.elements += other.elements;
        }
        run.placement.shared = vec![Shared { codec, ..first }];
        run.synthetic()
    };
    let (apart, exact, coarse) = (apart.synthetic(), together(Codec::Dense), together(Codec::Int4));
    let bits = |outcome: &Outcome| outcome.losses().into_iter().map(f64::to_bits).collect::<Vec<u64>>();
    assert_eq!(bits(&exact), bits(&apart));
    assert_close("norm", &exact.norms(), &apart.norms(), 1e-6);
    assert_close("int4", &coarse.losses(), &apart.losses(), 0.02);
    for (outcome, residuals) in [(&apart, 0), (&exact, 0), (&coarse, 6)] {
        let last = outcome.checkpoint(20);
        for name in ["transformer.wte.weight", "transformer.h.0.ln_1.weight", "transformer.h.0.ln_1.bias"] {
            let all: Vec<_> = last.iter().filter(|t| t.name == name).map(|t| &t.values).collect();
            assert_eq!(all.len(), 2, "{name}");
            assert_eq!(all[0], all[1], "the copies of {name} drifted apart");
        }
        // What the codec held back is kept under the name of each.
        let held_back = last.iter().filter(|t| t.name.starts_with("residual.tied.")).count();
        assert_eq!(held_back, residuals);
    }
}

#[test]
fn gpipe_gives_the_same_losses() {
    check("gpipe", "gpipe", 3, &[]);
}

#[test]
fn dropout_is_the_same_on_any_placement() {
    let run = |compnodes| Run::new(small_gpt2(0.2), job(TRAIN), compnodes).synthetic();
    let one = run(1);
    assert_close("dropout", &run(3).losses(), &one.losses(), TOLERANCE);
    let without = one_process().losses();
    assert!((one.losses()[5] - without[5]).abs() > 1e-4, "dropout changed nothing");
}

#[test]
fn a_resumed_run_gives_the_losses_of_an_uninterrupted_one() {
    let mut spec = job(TRAIN);
    spec.checkpoint.every = 8;
    let whole = Run::new(small_gpt2(0.0), spec.clone(), 2).synthetic();
    // Goes on with another number of CompNodes than it began with.
    let mut rest = Run::new(small_gpt2(0.0), spec, 3);
    rest.weights = Some(whole.checkpoint(8));
    rest.start_step = 8;
    let rest = rest.synthetic();
    assert_close("resumed", &rest.losses(), &whole.losses()[8..], TOLERANCE);
}

#[test]
fn a_half_codec_halves_the_bytes_and_still_learns() {
    let mut spec = job(TRAIN);
    let dense = Run::new(small_gpt2(0.0), spec.clone(), 2).synthetic();
    spec.compression.values = fusionllm_protocol::ValueFormat::Bf16;
    let half = Run::new(small_gpt2(0.0), spec, 2).synthetic();
    let bytes = |o: &Outcome| o.logs[1].reports[0].links[0].bytes;
    assert!(bytes(&half) < bytes(&dense));
    assert_eq!(half.logs[1].reports[0].links[0].codec, "bf16");
    assert_close("bf16", &half.losses(), &dense.losses(), 0.02);
}

/// Two layers of a small Llama, in which a norm has three consumers.
pub(crate) fn small_llama() -> OpDag {
    let config = r#"{ "model_type": "llama", "vocab_size": 96, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false }"#;
    Model::from_hugging_face(config).unwrap().model.build(16).unwrap()
}

/// Where several consumers send gradients back, each sum has its order, whichever of them are elsewhere.
#[test]
fn a_cut_before_any_op_changes_no_bit() {
    for dag in [small_llama(), small_gpt2(0.0)] {
        let names: Vec<String> = dag.ops().iter().map(|op| op.name.clone()).collect();
        let run = |list: &[(u32, &str)]| {
            let mut spec = job("steps = 3\nbatch = 4\nmicro_batches = 2\nlr = 1e-2\nclip = 0.0\nseed = 3");
            spec.placement.stages = stages(list);
            let outcome = Run::new(dag.clone(), spec, list.len()).synthetic();
            outcome.losses().into_iter().map(f64::to_bits).collect::<Vec<u64>>()
        };
        let whole = run(&[(0, "loss")]);
        // Of tied tables the sums are made elsewhere, and are tested there.
        let cuts = names.iter().skip_while(|name| !name.contains('.')).filter(|name| *name != "loss");
        for pair in cuts.collect::<Vec<_>>().windows(2) {
            let [first, second] = [pair[0].as_str(), pair[1].as_str()];
            assert_eq!(run(&[(0, first), (1, "loss")]), whole, "cut behind {first}");
            assert_eq!(run(&[(0, first), (1, second), (2, "loss")]), whole, "{second} alone");
        }
    }
}
