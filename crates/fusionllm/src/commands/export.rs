//! `fusionllm export`

use fusionllm_compnode::export_hugging_face;

use crate::cli;
use crate::exit::bad_input;
use crate::render;

pub(super) fn run(args: &cli::Export) -> anyhow::Result<()> {
    let model = super::model::open(&args.checkpoint, args.tokenizer.as_deref())?;
    let config = model.config.ok_or_else(|| {
        bad_input("the checkpoint's model came from an OP-DAG file, only GPT-2 models can be exported")
    })?;
    export_hugging_face(&args.dir, &model.dag, &config, model.tensors, &model.tokenizer, &model.carried)?;
    render::line(&format!("wrote {}", args.dir.display()))
}
