//! `fusionllm plan`

mod compared;
mod survival;
mod table;

use std::path::Path;

use fusionllm_broker::{read_cluster, read_model, write_atomic};
use fusionllm_graph::OpDag;
use fusionllm_planner::{Cluster, Compression, Plan, PlanSpec, compare, kept_ops, place, plan};
use fusionllm_protocol::{CompressionPolicy, CompressionSpec, JobSpec};
use serde_json::json;

use crate::cli;
use crate::exit::{bad_input, refused};
use crate::outputs::{self, Inputs, Output};
use crate::render;

/// CompNodes when neither job nor command line says.
pub(super) const DEFAULT_COMPNODES: u32 = 3;
/// Ratio at which policies are compared when the command line says none.
const COMPARED_RATIO: f64 = 100.0;

/// A job with its graph.
struct Job {
    spec: JobSpec,
    dag: OpDag,
}

pub(super) fn run(args: &cli::Plan) -> anyhow::Result<()> {
    let outputs = outputs(args);
    outputs::check(&outputs)?;
    let jobs = args.jobs.iter().map(|path| read_job(path, args)).collect::<anyhow::Result<Vec<_>>>()?;
    outputs::check_against(&outputs, &inputs(args, &jobs))?;
    let [job] = jobs.as_slice() else {
        if let Some(Output { option, .. }) = outputs.first() {
            return Err(bad_input(format!("{option} is for one job, give one or leave it out")));
        }
        if !args.compare {
            return Err(bad_input("several jobs can only be compared, add --compare"));
        }
        return compare_all(args, &jobs);
    };
    if let Some(path) = &args.write_graph {
        write(path, job.dag.to_json().as_bytes())?;
    }
    if let Some(path) = &args.write_dot {
        write(path, [DOT_BEGINS, &job.dag.to_dot()].concat().as_bytes())?;
    }
    if args.compare {
        return compare_all(args, &jobs);
    }
    let of_job = job.spec.placement.cluster.as_slice();
    match if args.cluster.is_empty() { of_job } else { &args.cluster } {
        [] => without_cluster(args, job),
        [file] => on_cluster(args, job, file),
        _ => Err(bad_input("several clusters can only be compared, add --compare")),
    }
}

/// Writes a file where it comes to lie: a link stays one.
fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let place = outputs::absolute(path);
    Ok(write_atomic(place.as_deref().unwrap_or(path), bytes)?)
}

/// How files begin that say of themselves who made them.
const TRACE_BEGINS: &str = "{\"otherData\":{\"made_by\":\"fusionllm plan\"},";
const GRAPH_BEGINS: &str = "{\n  \"format\": \"fusionllm-op-dag\",";
const DOT_BEGINS: &str = "// made by fusionllm plan\n";

/// The files that are to be written.
fn outputs(args: &cli::Plan) -> Vec<Output<'_>> {
    let outputs = [
        ("--svg", &args.svg, "a drawing by plan", "<svg data-made-by=\"fusionllm plan\""),
        ("--trace", &args.trace, "a trace by plan", TRACE_BEGINS),
        ("--write-graph", &args.write_graph, "an OP-DAG in JSON", GRAPH_BEGINS),
        ("--write-dot", &args.write_dot, "a graph by plan in Graphviz form", DOT_BEGINS),
    ];
    let mut named = Vec::new();
    for (option, path, kind, begins) in outputs {
        named.extend(path.as_deref().map(|path| Output { option, path, kind, begins }));
    }
    named
}

/// The files that are read.
fn inputs(args: &cli::Plan, jobs: &[Job]) -> Inputs {
    let mut inputs = Inputs::default();
    for (path, job) in args.jobs.iter().zip(jobs) {
        inputs.add_job(path, &job.spec);
    }
    args.cluster.iter().for_each(|path| inputs.add("--cluster", path));
    inputs
}

fn read_job(path: &Path, args: &cli::Plan) -> anyhow::Result<Job> {
    let spec = super::job_file::read(path, &args.overrides.overrides)?;
    let dag = read_model(&spec).map_err(refused)?.dag;
    Ok(Job { spec, dag })
}

/// Without a profile there is a placement on equal machines, but no time can be predicted.
fn without_cluster(args: &cli::Plan, job: &Job) -> anyhow::Result<()> {
    if args.svg.is_some() || args.trace.is_some() {
        return Err(bad_input("--svg and --trace show a predicted step, which needs --cluster FILE"));
    }
    if args.mtbf.is_some() {
        return Err(bad_input("--mtbf goes by a predicted step, which needs --cluster FILE"));
    }
    let (spec, dag) = (&job.spec, &job.dag);
    let count = args.compnodes.or(spec.placement.compnodes).unwrap_or(DEFAULT_COMPNODES);
    let placement = place(dag, &Cluster::uniform(count as usize), &spec.placement_spec()).map_err(refused)?;
    if args.json {
        let mut document = describe(args, job)?;
        document["placement"] = serde_json::to_value(placement)?;
        return render::json(&document, true);
    }
    print_graph(args, job)?;
    let hint = "equal machines and free links; give --cluster FILE for predicted times";
    let size = spec.micro_batch_size() as usize;
    let stays = stays(job)?;
    render::line(&format!("{}{stays}\n{hint}\n\n{}", summary(dag), render::placement(dag, &placement, size)))
}

fn on_cluster(args: &cli::Plan, job: &Job, file: &Path) -> anyhow::Result<()> {
    let mut cluster = read_cluster(file).map_err(refused)?.1;
    if let Some(count) = args.compnodes.or(job.spec.placement.compnodes) {
        let have = cluster.compnodes.len();
        if count as usize > have {
            return Err(bad_input(format!("{count} CompNodes are asked for, {} has {have}", file.display())));
        }
        let indices: Vec<usize> = (0..count as usize).collect();
        cluster = cluster.select(&indices);
    }
    let cluster = owner_first(cluster, job, file)?;
    let mut spec = plan_spec(job);
    spec.compression = compression(args, job)?;
    let plan = plan(&job.dag, &cluster, &spec).map_err(refused)?;
    let survival = args.mtbf.map(|mtbf| survival::Survival::of(job, &plan, mtbf));
    write_drawings(args, &plan, &job.dag)?;
    if args.json {
        let mut document = describe(args, job)?;
        document["strategy"] = json!(spec.placement.strategy.name());
        document["compression"] = json!(spec.compression.name());
        document["placement"] = serde_json::to_value(&plan.placement)?;
        document["prediction"] = serde_json::to_value(&plan.prediction)?;
        if let Some(survival) = survival {
            document["survival"] = survival.json();
        }
        return render::json(&document, true);
    }
    print_graph(args, job)?;
    let survival = survival.map_or_else(String::new, |survival| format!("\n{}", survival.text()));
    let stays = stays(job)?;
    render::line(&format!("{}{stays}\n\n{}{survival}", summary(&job.dag), table::plan(&job.dag, &plan)))
}

fn compare_all(args: &cli::Plan, jobs: &[Job]) -> anyhow::Result<()> {
    if args.cluster.is_empty() {
        return Err(bad_input("--compare needs --cluster FILE (repeatable)"));
    }
    if args.svg.is_some() || args.trace.is_some() || args.compnodes.is_some() || args.mtbf.is_some() {
        return Err(bad_input("--svg, --trace, --compnodes and --mtbf are for one plan, leave them or --compare out"));
    }
    let ratio = args.ratio.unwrap_or(COMPARED_RATIO);
    check_ratio(ratio)?;
    let mut groups = Vec::new();
    for file in &args.cluster {
        let (name, cluster) = read_cluster(file).map_err(refused)?;
        for job in jobs {
            let cluster = owner_first(cluster.clone(), job, file)?;
            let candidates = compare(&job.dag, &cluster, &plan_spec(job), ratio);
            groups.push(compared::Group { model: job.spec.name.clone(), cluster: name.clone(), candidates });
        }
    }
    if args.json {
        return render::json(&json!({ "ratio": ratio, "strategies": compared::rows(&groups) }), true);
    }
    render::line(&compared::tables(&groups, ratio))
}

fn describe(args: &cli::Plan, job: &Job) -> anyhow::Result<serde_json::Value> {
    let cost = job.dag.total_cost(job.spec.micro_batch_size() as usize);
    let graph: serde_json::Value = serde_json::from_str(&job.dag.to_json())?;
    Ok(json!({
        "model": job.dag.name(),
        "parameters": job.dag.param_elements(),
        "trained_parameters": job.dag.trained_elements(),
        "fp_flops_per_micro_batch": cost.fp_flops,
        "bp_flops_per_micro_batch": cost.bp_flops,
        "stays_with_the_data_owner": stays_with_the_owner(job)?,
        "graph": args.graph.then_some(graph),
    }))
}

fn summary(dag: &OpDag) -> String {
    let trained =
        if dag.has_frozen() { format!(", of which {} are trained", dag.trained_elements()) } else { String::new() };
    format!("{}: {} ops, {} parameters{trained}", dag.name(), dag.ops().len(), dag.param_elements())
}

/// Names of the ops that stay with the owner of private data; nothing if it is not private.
fn stays_with_the_owner(job: &Job) -> anyhow::Result<Option<Vec<&str>>> {
    if !job.spec.data.private {
        return Ok(None);
    }
    let kept = kept_ops(&job.dag, job.spec.data.keep_blocks).map_err(refused)?;
    let ops = job.dag.ops().iter().zip(kept).filter(|(_, kept)| *kept);
    Ok(Some(ops.map(|(op, _)| op.name.as_str()).collect()))
}

/// What stays with the owner of private data, in a line of its own.
fn stays(job: &Job) -> anyhow::Result<String> {
    if !job.spec.data.private {
        return Ok(String::new());
    }
    let kept = kept_ops(&job.dag, job.spec.data.keep_blocks).map_err(refused)?;
    let name = |at: usize| job.dag.ops().get(at).map_or("", |op| op.name.as_str());
    let mut pieces: Vec<String> = Vec::new();
    let mut first = None;
    for at in 0..=kept.len() {
        match (kept.get(at).copied().unwrap_or(false), first) {
            (true, None) => first = Some(at),
            (false, Some(begin)) => {
                pieces.push(format!("{} .. {}", name(begin), name(at - 1)));
                first = None;
            }
            _ => {}
        }
    }
    let count = kept.iter().filter(|kept| **kept).count();
    Ok(format!("\nprivate: {} stay with the data owner, {count} ops", pieces.join(", ")))
}

fn print_graph(args: &cli::Plan, job: &Job) -> anyhow::Result<()> {
    if !args.graph {
        return Ok(());
    }
    render::line(&format!("{}\n", job.dag.table(job.spec.micro_batch_size() as usize)))
}

fn plan_spec(job: &Job) -> PlanSpec {
    PlanSpec { tokens_per_step: tokens_per_step(job), ..job.spec.plan_spec() }
}

/// Labels in a step's global batch: tokens, or images.
fn tokens_per_step(job: &Job) -> u64 {
    match job.dag.label() {
        Some(label) => job.dag.op(label).output.shape.elements(job.spec.train.batch as usize),
        None => job.spec.tokens_per_step(),
    }
}

fn check_ratio(ratio: f64) -> anyhow::Result<()> {
    if CompressionSpec::RATIOS.contains(&ratio) {
        return Ok(());
    }
    let (least, most) = (CompressionSpec::RATIOS.start(), CompressionSpec::RATIOS.end());
    Err(bad_input(format!("--ratio is {ratio}, expected at least {least} and at most {most}")))
}

/// The job's compression, with what the command line says instead.
fn compression(args: &cli::Plan, job: &Job) -> anyhow::Result<Compression> {
    let ratio = args.ratio.unwrap_or(job.spec.compression.ratio);
    check_ratio(ratio)?;
    let policy = match &args.compression {
        None => job.spec.compression.policy,
        Some(name) => {
            let names = CompressionPolicy::NAMES;
            let known = names.iter().find(|(known, _)| known == name).map(|(_, policy)| *policy);
            let expected = || names.map(|(name, _)| name).join(", ");
            known.ok_or_else(|| bad_input(format!("--compression is `{name}`, expected one of: {}", expected())))?
        }
    };
    let spec = CompressionSpec { ratio, policy, ..job.spec.compression };
    Ok(JobSpec { compression: spec, ..job.spec.clone() }.compression())
}

/// The cluster with the data's owner in front.
fn owner_first(cluster: Cluster, job: &Job, file: &Path) -> anyhow::Result<Cluster> {
    let Some(owner) = &job.spec.data.owner else { return Ok(cluster) };
    let Some(at) = cluster.compnodes.iter().position(|c| c.name == *owner) else {
        return Err(bad_input(format!("data.owner is `{owner}`, which is no device of {}", file.display())));
    };
    let mut order: Vec<usize> = (0..cluster.compnodes.len()).collect();
    order[..=at].rotate_right(1);
    Ok(cluster.select(&order))
}

fn write_drawings(args: &cli::Plan, plan: &Plan, dag: &OpDag) -> anyhow::Result<()> {
    if let Some(path) = &args.svg {
        write(path, plan.svg(dag).as_bytes())?;
    }
    if let Some(path) = &args.trace {
        let trace = serde_json::to_string(&plan.simulated.trace(&plan.placement.compnodes))?;
        let events = trace.strip_prefix('{').unwrap_or(&trace);
        write(path, [TRACE_BEGINS, events].concat().as_bytes())?;
    }
    Ok(())
}
