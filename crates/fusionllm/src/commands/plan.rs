//! `fusionllm plan`

use fusionllm_broker::{load_model, write_atomic};
use fusionllm_planner::{Cluster, place};
use serde_json::json;

use crate::cli;
use crate::exit::bad_input;
use crate::render;

/// CompNodes when neither job nor command line says.
pub(super) const DEFAULT_COMPNODES: u32 = 3;

pub(super) fn run(args: &cli::Plan) -> anyhow::Result<()> {
    let spec = super::job_file::read(&args.job, &args.overrides.overrides)?;
    let model = load_model(&spec).map_err(bad_input)?;
    let dag = &model.dag;
    let count = args.compnodes.or(spec.placement.compnodes).unwrap_or(DEFAULT_COMPNODES);
    let placement = place(dag, &Cluster::uniform(count as usize), &spec.placement_spec()).map_err(bad_input)?;
    if let Some(path) = &args.write_graph {
        write_atomic(path, dag.to_json().as_bytes())?;
    }
    if let Some(path) = &args.write_dot {
        write_atomic(path, dag.to_dot().as_bytes())?;
    }
    let micro_batch_size = spec.micro_batch_size() as usize;
    if args.json {
        let graph: serde_json::Value = serde_json::from_str(&dag.to_json())?;
        let cost = dag.total_cost(micro_batch_size);
        return render::json(
            &json!({
                "model": dag.name(),
                "parameters": dag.param_elements(),
                "fp_flops_per_micro_batch": cost.fp_flops,
                "bp_flops_per_micro_batch": cost.bp_flops,
                "placement": placement,
                "graph": args.graph.then_some(graph),
            }),
            true,
        );
    }
    if args.graph {
        render::line(&format!("{}\n", dag.table(micro_batch_size)))?;
    }
    let summary = format!("{}: {} ops, {} parameters", dag.name(), dag.ops().len(), dag.param_elements());
    render::line(&format!("{summary}\n\n{}", render::placement(dag, &placement, micro_batch_size)))
}
