//! The end of `fusionllm train`: what came of it, and a line that the model writes.

use anyhow::Context;
use fusionllm_broker::RunReport;
use fusionllm_compnode::SamplingSpec;

use super::Checked;
use crate::cli;
use crate::commands::follow::Interrupts;
use crate::render;

/// What the finished model continues.
const PROMPT: &str = "The ";
/// Tokens that it writes.
const SAMPLE_TOKENS: usize = 80;

/// Says what came of it, and lets the model write a line unless that is interrupted.
pub(super) async fn finish(
    args: &cli::Train,
    checked: &Checked,
    report: &RunReport,
    interrupts: &mut Interrupts,
) -> anyhow::Result<()> {
    if !args.json {
        render::line(&format!("\n{}", report.summary()))?;
    }
    let sampling = SamplingSpec { tokens: SAMPLE_TOKENS, temperature: 0.8, top_k: 40, seed: checked.spec.train.seed };
    let (run_dir, device) = (checked.run_dir.clone(), args.device.clone());
    let writing = tokio::task::spawn_blocking(move || {
        let model = crate::commands::model::open_trained(&run_dir, None)?;
        let text = crate::commands::generate::write(model, PROMPT, sampling, &device)?;
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
    if args.json {
        let done = serde_json::json!({ "event": "done", "report": report, "sample": sample });
        return render::json(&done, false);
    }
    if let Some(sample) = sample {
        render::line(&format!("the model writes: {sample:?}"))?;
    }
    render::line(&format!("run directory: {}", checked.run_dir.display()))
}
