//! Whole runs over connections of this machine.

use std::sync::Arc;

use fusionllm_compnode::{Exchange, JobLinks, NetworkExchange};
use fusionllm_graph::{DagBuilder, OpDag};
use fusionllm_planner::NodeIndex;
use fusionllm_protocol::{Assignment, Generation, JobId, JobView, PeerRecord, RunKey, WeightSource};
use fusionllm_transport::{AdmitAll, Endpoint, EndpointConfig, Identity};
use tokio::runtime::{Builder, Runtime};

use crate::run::{Outcome, Run, Synthetic, assert_close, job, small_gpt2, stages};

const TRAIN: &str = "steps = 12\nbatch = 8\nmicro_batches = 4\nlr = 1e-2\nwarmup = 5\nclip = 1.0\neval_every = 6\n\
                     eval_batches = 2\nseed = 3";

/// A small GPT-2 all of whose blocks have one weight in common.
fn with_a_shared_weight() -> OpDag {
    let dag = small_gpt2(0.0);
    let mut builder = DagBuilder::new("shared");
    for op in dag.ops() {
        let shared = |&id| {
            let mut param = dag.param(id).clone();
            if param.name.ends_with(".attn.c_attn.weight") {
                param.name = "transformer.attn.weight".to_owned();
            }
            builder.param(param).unwrap()
        };
        let params: Vec<_> = op.params.iter().map(shared).collect();
        builder.op(&op.name, op.kind.clone(), &op.inputs, &params).unwrap();
    }
    builder.build().unwrap()
}

fn run(list: &[(u32, &str)], compnodes: usize) -> Run {
    let mut spec = job(TRAIN);
    spec.placement.stages = stages(list);
    Run::new(with_a_shared_weight(), spec, compnodes)
}

async fn endpoint() -> Endpoint {
    let config = EndpointConfig::new(Identity::generate(), "127.0.0.1:0".parse().unwrap());
    Endpoint::bind(config, Arc::new(AdmitAll)).await.unwrap()
}

/// The wires of each CompNode of a run, which take what connections come.
async fn wires(run: &Run) -> Vec<Arc<JobLinks>> {
    let mut endpoints = Vec::new();
    for _ in &run.placement.compnodes {
        endpoints.push(endpoint().await);
    }
    let record = |endpoint: &Endpoint| PeerRecord { id: *endpoint.id().as_bytes(), addrs: endpoint.addr().addrs };
    let peers: Vec<PeerRecord> = endpoints.iter().map(record).collect();
    let mut wires = Vec::new();
    for (node, endpoint) in (0..).zip(endpoints) {
        let assignment = Assignment {
            key: RunKey { job: JobId(1), generation: Generation(1) },
            node: NodeIndex(node),
            job: JobView::of(&run.spec),
            graph: String::new(),
            placement: run.placement.clone(),
            peers: peers.clone(),
            start_step: 0,
            planned_bytes: 0,
            weights: WeightSource::Seed,
        };
        let links = JobLinks::new(endpoint.clone(), &assignment);
        let to = Arc::downgrade(&links);
        tokio::spawn(async move {
            while let Some(session) = endpoint.accept().await {
                if let Some(links) = to.upgrade() {
                    links.accept(session);
                }
            }
        });
        wires.push(links);
    }
    wires
}

fn over_loopback(runtime: &Runtime, run: &Run) -> Outcome {
    let wires = runtime.block_on(wires(run));
    let exchanges = wires.iter().map(|links| {
        let exchange = NetworkExchange::new(Arc::clone(links), runtime.handle().clone());
        Box::new(exchange) as Box<dyn Exchange>
    });
    let batches = Synthetic { micro_batch_size: run.spec.micro_batch_size() as usize };
    let abort = || wires.iter().for_each(|links| links.abort("another CompNode failed"));
    let guard = runtime.enter();
    wires.iter().for_each(|links| links.dial_all());
    drop(guard);
    let outcome = run.exchanging(exchanges.collect(), &batches, None, &abort);
    abort();
    outcome
}

#[test]
fn a_parameter_that_three_compnodes_hold() {
    let run_of_three = run(&[(0, "h.0.add_2"), (1, "h.1.add_2"), (2, "loss")], 3);
    let shared = run_of_three.placement.shared.iter().find(|shared| shared.holders.len() == 3);
    assert!(shared.is_some(), "{:?}", run_of_three.placement.shared);
    let runtime = Builder::new_multi_thread().enable_all().build().unwrap();
    let outcome = over_loopback(&runtime, &run_of_three);
    let expected = run(&[], 1).synthetic();
    assert_close("three holders", &outcome.losses(), &expected.losses(), 1e-5);
    assert_close("three holders, norm", &outcome.norms(), &expected.norms(), 1e-4);
    let last = outcome.checkpoint(12);
    let copies: Vec<_> = last.iter().filter(|t| t.name == "transformer.attn.weight").collect();
    assert_eq!(copies.len(), 3);
    assert!(copies.iter().all(|copy| copy.values == copies[0].values), "the copies drifted apart");
}
