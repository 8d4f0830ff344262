//! Steps worked out by hand, and what must hold for all.

use proptest::prelude::*;

use super::*;
use crate::pipeline::{OrderSpec, Shares, eval_orders, train_orders};
use crate::{CompNodeProfile, LinkProfile, PassPlan, Pipeline, Shared, SharedId, Station, pipeline_formula};

/// Textbook orders.
fn order_spec(pipeline: Pipeline, micro_batches: u32) -> OrderSpec {
    OrderSpec { pipeline, run_ahead: 0, shares: Shares::whole(micro_batches), delays: Vec::new() }
}

/// A chain of stages, one on each CompNode, with links of one byte per second and this latency.
fn chain(stages: usize, micro_batches: u32, pipeline: Pipeline, latency_s: f64) -> (Placement, Cluster) {
    let ids: Vec<u32> = (0..stages as u32).collect();
    let (list, edges) = crate::testing::chain(&ids);
    let train = train_orders(&list, &edges, stages, &order_spec(pipeline, micro_batches)).unwrap();
    let eval = eval_orders(&list, &edges, stages, &Shares::whole(1)).unwrap();
    let names: Vec<String> = (0..stages).map(|i| format!("n{i}")).collect();
    let link = LinkProfile { latency_s, bytes_per_s: 1.0 };
    let cluster = Cluster {
        compnodes: names.iter().map(CompNodeProfile::unit).collect(),
        links: vec![vec![link; stages]; stages],
    };
    let placement = Placement {
        compnodes: names,
        stages: list,
        edges,
        shared: Vec::new(),
        pipeline,
        recompute: Vec::new(),
        train: PassPlan { micro_batches, orders: train },
        eval: PassPlan { micro_batches: 1, orders: eval },
    };
    (placement, cluster)
}

/// FP takes 1 s, BP 2 s, an activation and a gradient of `bytes` seconds each.
fn costs(stages: usize, bytes: f64) -> StepCosts {
    StepCosts {
        stage_s: vec![FpBp { fp_s: 1.0, bp_s: 2.0 }; stages],
        deferrable: vec![Deferrable::default(); stages],
        edge_bytes: vec![Ways { activation: bytes, gradient: bytes }; stages - 1],
        codec_s: vec![Ways::default(); stages - 1],
        update_s: vec![0.0; stages],
        shared_bytes: Vec::new(),
        clip: false,
    }
}

fn step_s(stages: usize, micro_batches: u32, pipeline: Pipeline, bytes: f64, latency_s: f64) -> f64 {
    let (placement, cluster) = chain(stages, micro_batches, pipeline, latency_s);
    simulate(&placement, &cluster, &costs(stages, bytes)).unwrap().step_s
}

/// Three CompNodes on a machine that computes for two at full speed.
#[test]
fn compnodes_of_one_machine_share_it() {
    let (placement, mut cluster) = chain(3, 8, Pipeline::OneFOneB, 0.0);
    let costs = costs(3, 0.0);
    let alone = simulate(&placement, &cluster, &costs).unwrap().step_s;
    for node in &mut cluster.compnodes {
        node.host = Some(crate::Host { name: "office".to_owned(), lanes: 2.0, threads: 1 });
    }
    let shared = simulate(&placement, &cluster, &costs).unwrap();
    // 3 stages x 8 micro-batches x 3 s are 72 s of work; two lanes cannot do them in less than 36.
    assert!(shared.step_s > alone && shared.step_s >= 36.0 && shared.step_s < 72.0, "{}", shared.step_s);
    for node in &mut cluster.compnodes {
        node.host = Some(crate::Host { name: "office".to_owned(), lanes: 1.0, threads: 1 });
    }
    let one_lane = simulate(&placement, &cluster, &costs).unwrap().step_s;
    assert!((one_lane - 72.0).abs() < 1e-6, "one lane is never idle: {one_lane}");
    for (node, name) in cluster.compnodes.iter_mut().zip(["a", "b", "c"]) {
        node.host = Some(crate::Host { name: name.to_owned(), lanes: 1.0, threads: 1 });
    }
    assert_eq!(simulate(&placement, &cluster, &costs).unwrap().step_s, alone);
}

/// Coding takes 2 s of a core for each activation, which only machines without a spare core notice.
#[test]
fn messages_take_cores_that_compute() {
    let (placement, mut cluster) = chain(2, 4, Pipeline::OneFOneB, 0.0);
    let mut costs = costs(2, 1e-3);
    costs.codec_s = vec![Ways { activation: 2.0, gradient: 0.0 }];
    let mut step_s = |lanes: f64, threads: u32| {
        for node in &mut cluster.compnodes {
            node.host = Some(crate::Host { name: "office".to_owned(), lanes, threads });
        }
        simulate(&placement, &cluster, &costs).unwrap().step_s
    };
    let spare = step_s(4.0, 1);
    // 2 stages x 4 micro-batches x 3 s of work, and 4 x 2 s of coding.
    let none = step_s(1.0, 1);
    assert!(none >= 24.0 + 8.0 && none > spare, "{none} {spare}");
    // One of four cores takes less from those who compute on all of them.
    let wide = step_s(1.0, 4);
    assert!(wide >= 24.0 + 2.0 && wide < none, "{wide} {none}");
    cluster.compnodes.iter_mut().for_each(|node| node.host = None);
    assert_eq!(simulate(&placement, &cluster, &costs).unwrap().step_s, spare, "a device of its own");
}

#[test]
fn one_compnode_computes_without_a_pause() {
    assert_eq!(step_s(1, 4, Pipeline::OneFOneB, 0.0, 0.0), 12.0);
}

/// With free links 1F1B takes (stages − 1 + micro-batches) beats of FP and BP.
#[test]
fn a_balanced_pipeline_takes_fill_and_beats() {
    for pipeline in [Pipeline::OneFOneB, Pipeline::GPipe] {
        assert_eq!(step_s(4, 8, pipeline, 0.0, 0.0), (3.0 + 8.0) * 3.0);
    }
}

#[test]
fn a_slow_link_sets_the_pace() {
    // Four activations of 10 s each are there after 1 + 40; one FP and the first BP later the four gradients go back.
    assert_eq!(step_s(2, 4, Pipeline::GPipe, 10.0, 0.0), 1.0 + 40.0 + 1.0 + 2.0 + 40.0 + 2.0);
}

#[test]
fn latency_delays_but_does_not_occupy() {
    let without = step_s(2, 4, Pipeline::GPipe, 10.0, 0.0);
    assert_eq!(step_s(2, 4, Pipeline::GPipe, 10.0, 5.0), without + 2.0 * 5.0);
}

#[test]
fn directions_do_not_hinder_each_other() {
    // In 1F1B gradients go back while activations come: the links overlap, or this would take twice as long.
    let both = step_s(2, 16, Pipeline::OneFOneB, 3.0, 0.0);
    assert!(both < 16.0 * 6.0 * 1.5, "{both}");
}

/// FP 1 s, BP 2 s of which half can wait, 10 s of latency: the first stage has the gradient a second sooner, and both
/// make weight gradients while nothing else is there to do.
#[test]
fn weight_gradients_wait_for_a_pause() {
    let put_off = |micro_batches, limit| {
        let (mut placement, cluster) = chain(2, micro_batches, Pipeline::OneFOneB, 10.0);
        for order in &mut placement.train.orders {
            *order = crate::deferred::defer(order, limit);
        }
        let half = Deferrable { seconds: 1.0, products: 2, bytes: 1.0 };
        simulate(&placement, &cluster, &StepCosts { deferrable: vec![half; 2], ..costs(2, 0.0) }).unwrap()
    };
    assert_eq!((put_off(1, 0).step_s, put_off(1, 1).step_s), (26.0, 25.0));
    let spans = put_off(1, 1).spans;
    let wg = |node: u32| spans.iter().find(|s| s.node.0 == node && matches!(s.task, Task::Wg { .. })).unwrap();
    assert_eq!((wg(1).start_s, wg(1).end_s, wg(0).start_s, wg(0).end_s), (13.0, 14.0, 24.0, 25.0));
    // The last stage does F0 B0 F1 B1 from 11 to 15 instead of 17 and sends the second gradient, which is there at 25.
    assert_eq!((put_off(2, 0).step_s, put_off(2, 2).step_s), (29.0, 27.0));
    // Where only one may wait, it is made before the next BP.
    assert_eq!(put_off(2, 1).step_s, 28.0);
}

#[test]
fn codec_time_delays_a_message() {
    let (placement, cluster) = chain(2, 1, Pipeline::GPipe, 0.0);
    let mut costs = costs(2, 1.0);
    let without = simulate(&placement, &cluster, &costs).unwrap().step_s;
    costs.codec_s = vec![Ways { activation: 0.25, gradient: 0.5 }];
    assert_eq!(simulate(&placement, &cluster, &costs).unwrap().step_s, without + 0.75);
}

#[test]
fn shared_gradients_and_the_norm_come_before_the_update() {
    let (mut placement, cluster) = chain(2, 1, Pipeline::GPipe, 1.0);
    let mut costs = costs(2, 0.0);
    // FP 1 + α 1 + FP 1 + BP 2 + α 1 + BP 2 = 8.
    assert_eq!(simulate(&placement, &cluster, &costs).unwrap().step_s, 8.0);
    costs.update_s = vec![0.5; 2];
    costs.clip = true;
    // n1 is done at 5, its norm is there at 6; n0 is done at 8 and tells n1, who updates at 9.
    assert_eq!(simulate(&placement, &cluster, &costs).unwrap().step_s, 9.5);
    placement.shared = vec![Shared {
        id: SharedId(0),
        params: vec![fusionllm_graph::ParamId(0)],
        holders: vec![NodeIndex(0), NodeIndex(1)],
        elements: 1,
        codec: fusionllm_codec::Codec::Dense,
    }];
    costs.shared_bytes = vec![vec![4.0; 2]];
    // n0's shared gradient leaves at 8 and is there at 13; n1's norm comes back at 14, the total at 15.
    assert_eq!(simulate(&placement, &cluster, &costs).unwrap().step_s, 15.5);
}

#[test]
fn the_critical_path_names_what_the_step_waits_for() {
    let (placement, cluster) = chain(2, 4, Pipeline::GPipe, 0.0);
    let simulated = simulate(&placement, &cluster, &costs(2, 10.0)).unwrap();
    let path = simulated.critical_path(&placement.compnodes);
    assert_eq!(path[0].to_string(), "47 % of the step waits for the link n0 → n1");
    assert!((path.iter().map(|b| b.share).sum::<f64>() - 1.0).abs() < 1e-9);
    let free = simulate(&placement, &cluster, &costs(2, 0.0)).unwrap();
    assert!(free.critical_path(&placement.compnodes)[0].to_string().contains("computes on"));
}

#[test]
fn a_trace_has_a_bar_for_every_task_and_message() {
    let (placement, cluster) = chain(3, 2, Pipeline::OneFOneB, 0.0);
    let simulated = simulate(&placement, &cluster, &costs(3, 1.0)).unwrap();
    let trace = simulated.trace(&placement.compnodes);
    let bars = trace.events.iter().filter(|e| e.ph == "X").count();
    assert_eq!(bars, 3 * 2 * 2 + 3 + 2 * 2 * 2);
    let json = serde_json::to_value(&trace).unwrap();
    assert_eq!(json["traceEvents"][0]["args"]["name"], "n0");
    assert_eq!(serde_json::from_value::<Trace>(json).unwrap(), trace);
}

proptest! {
    /// No step is shorter than its busiest CompNode or link, nor than one micro-batch there and back; the shares of
    /// the critical path add up; and without links GPipe takes no longer than the formula.
    #[test]
    fn a_step_is_no_shorter_than_what_bounds_it(
        times in prop::collection::vec((0.1f64..3.0, 0.1f64..5.0), 1..6),
        bytes in prop::collection::vec((0.0f64..6.0, 0.0f64..6.0), 5),
        micro_batches in 1u32..8,
        latency_s in 0.0f64..2.0,
        gpipe in any::<bool>(),
        deferred in 0usize..5,
    ) {
        let stages = times.len();
        let pipeline = if gpipe { Pipeline::GPipe } else { Pipeline::OneFOneB };
        let (mut placement, cluster) = chain(stages, micro_batches, pipeline, latency_s);
        for order in &mut placement.train.orders {
            *order = crate::deferred::defer(order, deferred);
        }
        let times: Vec<FpBp> = times.into_iter().map(|(fp_s, bp_s)| FpBp { fp_s, bp_s }).collect();
        let edge = |&(activation, gradient): &(f64, f64)| Ways { activation, gradient };
        let wait = |s: &FpBp| Deferrable { seconds: 0.4 * s.bp_s, products: 3, bytes: 1.0 };
        let costs = StepCosts {
            stage_s: times.clone(),
            deferrable: times.iter().map(wait).collect(),
            edge_bytes: bytes[..stages - 1].iter().map(edge).collect(),
            codec_s: vec![Ways::default(); stages - 1],
            update_s: vec![0.0; stages],
            shared_bytes: Vec::new(),
            clip: false,
        };
        let simulated = simulate(&placement, &cluster, &costs).unwrap();
        let n = f64::from(micro_batches);
        let compute = times.iter().map(|s| n * (s.fp_s + s.bp_s)).fold(0.0, f64::max);
        let link = costs.edge_bytes.iter().map(|e| n * e.activation.max(e.gradient)).fold(0.0, f64::max);
        let share = if deferred > 0 { 0.6 } else { 1.0 };
        let way: f64 = times.iter().map(|s| s.fp_s + share * s.bp_s).sum::<f64>()
            + costs.edge_bytes.iter().map(|e| e.activation + e.gradient + 2.0 * latency_s).sum::<f64>();
        prop_assert!(simulated.step_s >= compute.max(link).max(way) - 1e-9);
        for (node, &FpBp { fp_s, bp_s }) in times.iter().enumerate() {
            let own = simulated.spans.iter().filter(|s| s.node.index() == node);
            let computed: f64 = own.map(|s| s.end_s - s.start_s).sum();
            prop_assert!((computed - n * (fp_s + bp_s)).abs() < 1e-6, "{} of {}", computed, n * (fp_s + bp_s));
        }
        let shares: f64 = simulated.critical_path(&placement.compnodes).iter().map(|b| b.share).sum();
        prop_assert!((shares - 1.0).abs() < 1e-6, "{}", shares);
        prop_assert!(simulated.busy(stages).iter().all(|b| *b <= 1.0 + 1e-9));
        prop_assert!(simulated.links().values().all(|used| used.busy <= 1.0 + 1e-9));
        if stages == 1 {
            let station = Station { compute_s: times[0].fp_s + times[0].bp_s, transfer_s: 0.0 };
            prop_assert!((simulated.step_s - pipeline_formula(&[station], micro_batches)).abs() < 1e-9);
        }
    }
}
