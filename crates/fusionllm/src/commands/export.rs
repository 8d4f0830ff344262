//! `fusionllm export`

use fusionllm_compnode::{ExportError, ExportFolder, export_adapters, export_hugging_face};

use super::model::Trained;
use crate::cli;
use crate::exit::bad_input;
use crate::outputs::Inputs;
use crate::render;

pub(super) fn run(args: &cli::Export) -> anyhow::Result<()> {
    let folder = ExportFolder::look(&args.dir).map_err(export_error)?;
    let mut inputs = Inputs::default();
    inputs.add("the model", &args.checkpoint);
    args.tokenizer.iter().for_each(|file| inputs.add("--tokenizer", file));
    if let Some((what, input)) = inputs.at_or_in(&args.dir) {
        let (dir, input) = (args.dir.display(), input.display());
        return Err(bad_input(format!("the export to {dir} would overwrite {what}, {input}: give another folder")));
    }
    let mut model = super::model::open(&args.checkpoint, args.tokenizer.as_deref())?;
    match &model.adapters {
        Some(adapters) if !args.merge => {
            let written = export_adapters((&folder, &model.origin), &model.dag, model.tensors, adapters);
            written.map_err(export_error)?;
            return said(args, &folder, (&model.origin, model.trained.as_ref()), "the adapters to ");
        }
        Some(_) => model = model.merged()?,
        None if args.merge => {
            let what = args.checkpoint.display();
            return Err(bad_input(format!("--merge: {what} has no adapters, leave the option out")));
        }
        None => {}
    }
    let config = model.config.ok_or_else(|| {
        bad_input("the checkpoint's model came from an OP-DAG file, only models of a family that Hugging Face knows can be exported")
    })?;
    let of = model.origin.as_str();
    let written =
        export_hugging_face((&folder, of), &model.dag, &config, model.tensors, &model.tokenizer, &model.carried);
    written.map_err(export_error)?;
    said(args, &folder, (of, model.trained.as_ref()), "")
}

/// Says what was written, and from which checkpoint.
fn said(
    args: &cli::Export,
    folder: &ExportFolder,
    (of, trained): (&str, Option<&Trained>),
    what: &str,
) -> anyhow::Result<()> {
    let replaced = if folder.holds_export_of(of) { ", in place of an earlier export of the same" } else { "" };
    let from = |Trained { step, folder }: &Trained| format!(" from {} (step {step})", folder.display());
    let from = trained.map(from).unwrap_or_default();
    render::line(&format!("wrote {what}{}{replaced}{from}", args.dir.display()))
}

fn export_error(error: ExportError) -> anyhow::Error {
    if error.is_bad_input() { bad_input(error) } else { error.into() }
}
