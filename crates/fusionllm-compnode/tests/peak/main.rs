//! What training allocates at a real vocabulary, against what was planned for it.
//!
//! One test after the other: they share the counter of the allocator.
#![expect(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

#[allow(dead_code, reason = "the other tests use what this one does not")]
#[path = "../it/run.rs"]
mod run;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use fusionllm_graph::{Gpt2Config, OpDag, gpt2};
use fusionllm_planner::{Cluster, Host, PlanSpec, Recompute, plan};
use run::{Run, SEQ, assert_close, job, stages};

/// Counts what is allocated and not freed, and the most that was.
struct Counted;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static PEAK_OF_STEPS: AtomicUsize = AtomicUsize::new(0);
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// The matrix library keeps a block of this size for each thread, of which it touches little. No tensor here has it.
const OF_THE_LIBRARY: usize = 64 << 20;

fn grow(bytes: usize) {
    if bytes == OF_THE_LIBRARY {
        return;
    }
    let live = LIVE.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(live, Ordering::Relaxed);
}

fn shrink(bytes: usize) {
    if bytes != OF_THE_LIBRARY {
        LIVE.fetch_sub(bytes, Ordering::Relaxed);
    }
}

// SAFETY: every call goes on to the system's allocator.
#[expect(unsafe_code, reason = "an allocator cannot be written without")]
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        shrink(layout.size());
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        grow(size);
        shrink(layout.size());
        unsafe { System.realloc(pointer, layout, size) }
    }
}

const STEPS: u64 = 3;

/// A table of 26 MB under a small block.
fn real_vocabulary() -> OpDag {
    let config = Gpt2Config {
        vocab_size: 50_257,
        n_positions: SEQ,
        n_embd: 128,
        n_layer: 1,
        n_head: 4,
        layer_norm_epsilon: 1e-5,
        dropout: 0.0,
    };
    gpt2(&config, SEQ).unwrap()
}

/// Losses, the most that was allocated at once while training, and what was planned for all CompNodes together.
fn train(micro_batches: u32, last_ops: &[(u32, &str)]) -> (Vec<f64>, f64, f64) {
    train_model(real_vocabulary(), [4, micro_batches], last_ops, Recompute::Never)
}

/// The same of a given model, with so many sequences in a step, and micro-batches.
fn train_model(
    dag: OpDag,
    [batch, micro_batches]: [u32; 2],
    last_ops: &[(u32, &str)],
    recompute: Recompute,
) -> (Vec<f64>, f64, f64) {
    let _one_at_a_time = ONE_AT_A_TIME.lock().unwrap();
    let compnodes = last_ops.iter().map(|&(compnode, _)| compnode as usize + 1).max().unwrap();
    let mut spec = job(&format!(
        "steps = {STEPS}\nbatch = {batch}\nmicro_batches = {micro_batches}\nwarmup = 0\neval_batches = 1"
    ));
    spec.placement.stages = stages(last_ops);
    // Checkpoints are written tensor by tensor.
    spec.checkpoint.every = 1;
    let mut cluster = Cluster::uniform(compnodes);
    for compnode in &mut cluster.compnodes {
        compnode.host = Some(Host { name: "this".to_owned(), lanes: 2.0, threads: 1 });
    }
    let asked = PlanSpec { recompute, ..PlanSpec::dense(spec.placement_spec()) };
    let planned = plan(&dag, &cluster, &asked).unwrap();
    let run = Run { placement: planned.placement, ..Run::new(dag, spec, compnodes) };
    let planned: f64 = planned.prediction.compnodes.iter().map(|c| c.memory_bytes).sum();
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let losses = run.watched(remember_peak).losses();
    (losses, (PEAK_OF_STEPS.load(Ordering::Relaxed) - before) as f64, planned)
}

/// After a step: its checkpoint comes next, and for this count there are at least two before the end.
fn remember_peak(_: u64) {
    PEAK_OF_STEPS.store(PEAK.load(Ordering::Relaxed), Ordering::Relaxed);
}

const WHOLE: &[(u32, &str)] = &[(0, "loss")];
const TWO: &[(u32, &str)] = &[(0, "h.0.add_1"), (1, "loss")];
const U_SHAPE: &[(u32, &str)] = &[(0, "wpe"), (1, "h.0.add_2"), (0, "loss")];

#[test]
fn training_takes_no_more_memory_than_was_planned() {
    for micro_batches in [1, 4] {
        for last_ops in [WHOLE, TWO, U_SHAPE] {
            let (_, peak, planned) = train(micro_batches, last_ops);
            let share = peak / planned;
            println!("{micro_batches} micro-batches, {last_ops:?}: {:.0} of {:.0} MB", peak / 1e6, planned / 1e6);
            assert!(share <= 1.2, "{micro_batches} micro-batches, {last_ops:?}: {share:.2} of what was planned");
            assert!(share >= 0.7, "{micro_batches} micro-batches, {last_ops:?}: planned far too much, {share:.2}");
        }
    }
}

/// Eight wide blocks for sequences of 16 tokens, of which activations take most memory.
fn many_activations() -> OpDag {
    let config = Gpt2Config {
        vocab_size: 96,
        n_positions: SEQ,
        n_embd: 64,
        n_layer: 8,
        n_head: 4,
        layer_norm_epsilon: 1e-5,
        dropout: 0.0,
    };
    gpt2(&config, SEQ).unwrap()
}

#[test]
fn activations_that_are_made_anew_take_no_more_memory_than_was_planned_and_less_than_those_that_are_kept() {
    let train = |last_ops: &[(u32, &str)], recompute| train_model(many_activations(), [64, 4], last_ops, recompute);
    for last_ops in [WHOLE, &[(0, "h.3.add_2"), (1, "loss")]] {
        let (losses, kept, kept_planned) = train(last_ops, Recompute::Never);
        let (of_anew, anew, planned) = train(last_ops, Recompute::Always);
        println!("{last_ops:?}: {anew:.0} of {planned:.0} bytes, {kept:.0} of {kept_planned:.0} kept");
        // To the bit but for the tied table, whose two uses are in one stage of the whole model and in two pieces.
        assert_close("made anew", &of_anew, &losses, 1e-6);
        assert!(anew <= 1.2 * planned, "{last_ops:?}: {anew} of {planned} bytes");
        assert!(kept - anew >= 0.7 * (kept_planned - planned), "{last_ops:?}: {kept} kept, {anew} made anew");
        assert!(planned < 0.7 * kept_planned, "{last_ops:?}: {planned} of {kept_planned}");
    }
}

#[test]
fn a_table_of_many_pieces_trains_as_in_one_process() {
    let whole = train(2, WHOLE).0;
    for last_ops in [TWO, U_SHAPE] {
        assert_close(&format!("losses of {last_ops:?}"), &train(2, last_ops).0, &whole, 1e-5);
    }
}
