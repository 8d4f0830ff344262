//! What `plan` is told.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use fusionllm_planner::MAX_COMPNODES;

use super::Overrides;
use crate::values;

#[derive(Debug, Args)]
pub(crate) struct Plan {
    /// Job file (see docs/job.md); several can be compared
    #[arg(required = true, value_name = "JOB")]
    pub(crate) jobs: Vec<PathBuf>,
    /// Cluster file with devices and links (see docs/planning.md); with --compare repeatable
    #[arg(long, value_name = "FILE")]
    pub(crate) cluster: Vec<PathBuf>,
    /// CompNodes to plan for [default: placement.compnodes, or all of the cluster, or 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MAX_COMPNODES as i64))]
    pub(crate) compnodes: Option<u32>,
    /// What the links carry, instead of compression.policy: dense, uniform-topk, ada-topk, ada-topk-literal, adaptive
    #[arg(long, value_name = "POLICY")]
    pub(crate) compression: Option<String>,
    /// Dense bytes over sent bytes on the slowest link [default: compression.ratio, or 100 with --compare]
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub(crate) ratio: Option<f64>,
    /// All strategies and compressions side by side
    #[arg(long)]
    pub(crate) compare: bool,
    /// Predict the useful share of the time if a failure hits the job as often, such as 4h or 30m
    #[arg(long, value_name = "TIME", value_parser = values::time_between)]
    pub(crate) mtbf: Option<Duration>,
    /// Draw placement and timeline; replaces an earlier drawing and nothing else
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
    /// Write the simulated step as a trace for ui.perfetto.dev; replaces an earlier trace and nothing else
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Print the OP-DAG's table too
    #[arg(long)]
    pub(crate) graph: bool,
    /// Write the OP-DAG as JSON, which a job can name as model.path; replaces an earlier one and nothing else
    #[arg(long, value_name = "FILE")]
    pub(crate) write_graph: Option<PathBuf>,
    /// Write the OP-DAG in Graphviz form; replaces an earlier one and nothing else
    #[arg(long, value_name = "FILE")]
    pub(crate) write_dot: Option<PathBuf>,
    /// One JSON document
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) overrides: Overrides,
}
