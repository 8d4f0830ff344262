//! The end of `fusionllm train`: what came of it, and a line that the model writes.

use anyhow::Context;
use fusionllm_broker::{RunReport, newest_checkpoint};
use fusionllm_compnode::SamplingSpec;

use super::Checked;
use crate::cli;
use crate::commands::follow::Interrupts;
use crate::commands::generate;
use crate::render;

/// What the finished model continues.
const PROMPT: &str = "The ";
/// Tokens that it writes.
const SAMPLE_TOKENS: usize = 80;

/// Says what came of it, and lets a language model write a line unless that is interrupted.
pub(super) async fn finish(
    args: &cli::Train,
    checked: &Checked,
    report: &RunReport,
    interrupts: &mut Interrupts,
) -> anyhow::Result<()> {
    if !args.json {
        render::line(&format!("\n{}", report.summary()))?;
    }
    look_for_last(report);
    if checked.spec.data.format.is_images() {
        return ended(args, report, None);
    }
    let sampling = SamplingSpec { tokens: SAMPLE_TOKENS, temperature: 0.8, top_k: 40, seed: checked.spec.train.seed };
    let (run_dir, device) = (report.run_dir.clone(), args.device.clone());
    let writing = tokio::task::spawn_blocking(move || {
        let model = crate::commands::model::open_trained(&run_dir, None)?;
        let ids = generate::prompt_ids(&model, PROMPT)?;
        let text = generate::write(model, &ids, sampling, &device)?;
        anyhow::Ok(format!("{PROMPT}{text}"))
    });
    let sample = tokio::select! {
        // Training is done, whatever becomes of this.
        written = writing => match written.context("the thread that lets the model write").flatten() {
            Ok(text) => Some(text),
            Err(error) => {
                if !args.json {
                    render::line(&format!("note: the model writes nothing: {error:#}"))?;
                }
                None
            }
        },
        () = interrupts.next() => None,
    };
    ended(args, report, sample)
}

/// The last lines.
fn ended(args: &cli::Train, report: &RunReport, sample: Option<String>) -> anyhow::Result<()> {
    if args.json {
        let done = serde_json::json!({ "event": "done", "report": report, "sample": sample });
        return render::json(&done, false);
    }
    if let Some(sample) = sample {
        render::line(&format!("the model writes: {sample:?}"))?;
    }
    render::line(&format!("run directory: {}", report.run_dir.display()))
}

/// Says so if the checkpoint is not there any more with which the run has ended.
fn look_for_last(report: &RunReport) {
    if !newest_checkpoint(&report.run_dir).is_ok_and(|newest| newest == Some(report.step)) {
        let (step, dir) = (report.step, report.run_dir.display());
        tracing::warn!("the checkpoint of step {step} was written, and is not in {dir} any more: others have moved it");
    }
}
