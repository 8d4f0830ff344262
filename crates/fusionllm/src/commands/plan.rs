//! `fusionllm plan`

mod compared;
mod table;

use std::path::Path;

use anyhow::Context;
use fusionllm_broker::{read_model, write_atomic};
use fusionllm_graph::OpDag;
use fusionllm_planner::{Cluster, ClusterFile, Compression, Plan, PlanSpec, compare, place, plan};
use fusionllm_protocol::JobSpec;
use serde_json::json;

use crate::cli;
use crate::exit::bad_input;
use crate::render;

/// CompNodes when neither job nor command line says.
pub(super) const DEFAULT_COMPNODES: u32 = 3;

/// A job with its graph.
struct Job {
    spec: JobSpec,
    dag: OpDag,
}

pub(super) fn run(args: &cli::Plan) -> anyhow::Result<()> {
    let jobs = args.jobs.iter().map(|path| read_job(path, args)).collect::<anyhow::Result<Vec<_>>>()?;
    let [job] = jobs.as_slice() else {
        if !args.compare {
            return Err(bad_input("several jobs can only be compared, add --compare"));
        }
        return compare_all(args, &jobs);
    };
    if let Some(path) = &args.write_graph {
        write_atomic(path, job.dag.to_json().as_bytes())?;
    }
    if let Some(path) = &args.write_dot {
        write_atomic(path, job.dag.to_dot().as_bytes())?;
    }
    if args.compare {
        return compare_all(args, &jobs);
    }
    match args.cluster.as_slice() {
        [] => without_cluster(args, job),
        [file] => on_cluster(args, job, file),
        _ => Err(bad_input("several clusters can only be compared, add --compare")),
    }
}

fn read_job(path: &Path, args: &cli::Plan) -> anyhow::Result<Job> {
    let spec = super::job_file::read(path, &args.overrides.overrides)?;
    let dag = read_model(&spec).map_err(bad_input)?.dag;
    Ok(Job { spec, dag })
}

/// Without a profile there is a placement on equal machines, but no time can be predicted.
fn without_cluster(args: &cli::Plan, job: &Job) -> anyhow::Result<()> {
    if args.svg.is_some() || args.trace.is_some() {
        return Err(bad_input("--svg and --trace show a predicted step, which needs --cluster FILE"));
    }
    let (spec, dag) = (&job.spec, &job.dag);
    let count = args.compnodes.or(spec.placement.compnodes).unwrap_or(DEFAULT_COMPNODES);
    let placement = place(dag, &Cluster::uniform(count as usize), &spec.placement_spec()).map_err(bad_input)?;
    if args.json {
        let mut document = describe(args, job)?;
        document["placement"] = serde_json::to_value(placement)?;
        return render::json(&document, true);
    }
    print_graph(args, job)?;
    let hint = "equal machines and free links; give --cluster FILE for predicted times";
    let size = spec.micro_batch_size() as usize;
    render::line(&format!("{}\n{hint}\n\n{}", summary(dag), render::placement(dag, &placement, size)))
}

fn on_cluster(args: &cli::Plan, job: &Job, file: &Path) -> anyhow::Result<()> {
    let mut cluster = read_cluster(file)?.1;
    if let Some(count) = args.compnodes.or(job.spec.placement.compnodes) {
        let indices: Vec<usize> = (0..count as usize).collect();
        if indices.len() > cluster.compnodes.len() {
            let have = cluster.compnodes.len();
            return Err(bad_input(format!("{count} CompNodes are asked for, {} has {have}", file.display())));
        }
        cluster = cluster.select(&indices);
    }
    let cluster = owner_first(cluster, job, file)?;
    let mut spec = plan_spec(job);
    spec.compression = compression(args)?;
    let plan = plan(&job.dag, &cluster, &spec).map_err(bad_input)?;
    write_drawings(args, &plan, &job.dag)?;
    if args.json {
        let mut document = describe(args, job)?;
        document["strategy"] = json!(spec.placement.strategy.name());
        document["compression"] = json!(spec.compression.name());
        document["placement"] = serde_json::to_value(&plan.placement)?;
        document["prediction"] = serde_json::to_value(&plan.prediction)?;
        return render::json(&document, true);
    }
    print_graph(args, job)?;
    render::line(&format!("{}\n\n{}", summary(&job.dag), table::plan(&job.dag, &plan)))
}

fn compare_all(args: &cli::Plan, jobs: &[Job]) -> anyhow::Result<()> {
    if args.cluster.is_empty() {
        return Err(bad_input("--compare needs --cluster FILE (repeatable)"));
    }
    if args.svg.is_some() || args.trace.is_some() || args.compnodes.is_some() {
        return Err(bad_input("--svg, --trace and --compnodes are for one plan, leave them or --compare out"));
    }
    check_ratio(args.ratio)?;
    let mut groups = Vec::new();
    for file in &args.cluster {
        let (name, cluster) = read_cluster(file)?;
        for job in jobs {
            let cluster = owner_first(cluster.clone(), job, file)?;
            let candidates = compare(&job.dag, &cluster, &plan_spec(job), args.ratio);
            groups.push(compared::Group { model: job.spec.name.clone(), cluster: name.clone(), candidates });
        }
    }
    if args.json {
        return render::json(&json!({ "ratio": args.ratio, "strategies": compared::rows(&groups) }), true);
    }
    render::line(&compared::tables(&groups, args.ratio))
}

fn describe(args: &cli::Plan, job: &Job) -> anyhow::Result<serde_json::Value> {
    let cost = job.dag.total_cost(job.spec.micro_batch_size() as usize);
    let graph: serde_json::Value = serde_json::from_str(&job.dag.to_json())?;
    Ok(json!({
        "model": job.dag.name(),
        "parameters": job.dag.param_elements(),
        "fp_flops_per_micro_batch": cost.fp_flops,
        "bp_flops_per_micro_batch": cost.bp_flops,
        "graph": args.graph.then_some(graph),
    }))
}

fn summary(dag: &OpDag) -> String {
    format!("{}: {} ops, {} parameters", dag.name(), dag.ops().len(), dag.param_elements())
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
    if ratio.is_finite() && ratio >= 1.0 {
        return Ok(());
    }
    Err(bad_input(format!("--ratio is {ratio}, expected at least 1")))
}

fn compression(args: &cli::Plan) -> anyhow::Result<Compression> {
    check_ratio(args.ratio)?;
    let ratio = args.ratio;
    Ok(match args.compression {
        cli::PlanCompression::Dense => Compression::Dense,
        cli::PlanCompression::UniformTopk => Compression::UniformTopk { ratio },
        cli::PlanCompression::AdaTopk => Compression::AdaTopk { ratio, literal: false },
        cli::PlanCompression::AdaTopkLiteral => Compression::AdaTopk { ratio, literal: true },
    })
}

/// Name and content of a cluster file.
fn read_cluster(path: &Path) -> anyhow::Result<(String, Cluster)> {
    let at = || path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(at).map_err(|e| bad_input(format!("{e:#}")))?;
    let file: ClusterFile = toml::from_str(&text).map_err(|e| bad_input(format!("{}: {}", at(), one_line(&e))))?;
    let cluster = file.resolve().map_err(|e| bad_input(format!("{}: {e}", at())))?;
    let stem = || path.file_stem().map_or_else(at, |s| s.to_string_lossy().into_owned());
    Ok((if file.name.is_empty() { stem() } else { file.name }, cluster))
}

/// A TOML error in one line, with the place.
fn one_line(error: &toml::de::Error) -> String {
    let first = error.to_string();
    let place = first.lines().next().unwrap_or_default().to_owned();
    if place.contains(error.message()) { place } else { format!("{place}: {}", error.message()) }
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
        write_atomic(path, plan.svg(dag).as_bytes())?;
    }
    if let Some(path) = &args.trace {
        let trace = serde_json::to_vec(&plan.simulated.trace(&plan.placement.compnodes))?;
        write_atomic(path, &trace)?;
    }
    Ok(())
}
