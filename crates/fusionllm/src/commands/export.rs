//! `fusionllm export`

use fusionllm_compnode::{ExportError, ExportFolder, export_hugging_face};

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
    let model = super::model::open(&args.checkpoint, args.tokenizer.as_deref())?;
    let config = model.config.ok_or_else(|| {
        bad_input("the checkpoint's model came from an OP-DAG file, only models of a family that Hugging Face knows can be exported")
    })?;
    let of = model.origin.as_str();
    let written =
        export_hugging_face((&folder, of), &model.dag, &config, model.tensors, &model.tokenizer, &model.carried);
    written.map_err(export_error)?;
    let replaced = if folder.holds_export_of(of) { ", in place of an earlier export of the same" } else { "" };
    render::line(&format!("wrote {}{replaced}", args.dir.display()))
}

fn export_error(error: ExportError) -> anyhow::Error {
    if error.is_bad_input() { bad_input(error) } else { error.into() }
}
