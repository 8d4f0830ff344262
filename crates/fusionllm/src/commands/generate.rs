//! `fusionllm generate`

use std::io::IsTerminal;
use std::sync::Arc;

use fusionllm_compnode::{Generator, SamplingSpec, open_device};
use fusionllm_graph::{Model, OpDag};
use fusionllm_protocol::clean_lines;

use super::model::{Trained, TrainedModel};
use crate::cli;
use crate::exit::{bad_input, refused};
use crate::render;

pub(super) fn run(args: &cli::Generate) -> anyhow::Result<()> {
    if args.prompt.is_empty() {
        return Err(bad_input("--prompt is empty, give at least one character"));
    }
    let temperature = args.temperature;
    if !(temperature.is_finite() && temperature >= 0.0) {
        return Err(bad_input(format!("--temperature is {temperature}, expected a number of at least 0")));
    }
    let model = super::model::open(&args.dir, args.tokenizer.as_deref())?;
    let sampling = SamplingSpec {
        tokens: args.tokens as usize,
        temperature: args.temperature,
        top_k: args.top_k,
        seed: args.seed,
    };
    if model.dag.image_size().is_some() {
        let what = args.dir.display();
        return Err(bad_input(format!("{what} is a model of images, which writes no text: give a language model")));
    }
    let ids = prompt_ids(&model, &args.prompt)?;
    let step = model.trained.as_ref().map(|trained| trained.step);
    let note = length_note(&model.dag, ids.len(), sampling.tokens);
    if let Some(Trained { step, folder }) = &model.trained {
        tracing::info!(step, folder = %folder.display(), "the model of a checkpoint");
    }
    let text = write(model, &ids, sampling, &args.device)?;
    if let Some(note) = note {
        tracing::warn!("{note}");
    }
    if args.json {
        render::json(&serde_json::json!({ "prompt": args.prompt, "text": text, "step": step }), true)
    } else {
        let text = format!("{}{text}", args.prompt);
        // A file gets what the model wrote; a terminal would act on some of it.
        render::line(&if std::io::stdout().is_terminal() { clean_lines(&text) } else { text })
    }
}

/// What must be known of a text that becomes longer than what the model reads at once.
fn length_note(dag: &OpDag, prompt: usize, tokens: usize) -> Option<String> {
    let length = prompt + tokens;
    let longest = dag.seq_len().filter(|&longest| length > longest && prompt <= longest);
    longest.map(|longest| {
        format!(
            "prompt and text have {length} tokens, and the model reads {longest} at once: what goes beyond follows from the \
             last {longest} alone"
        )
    })
}

/// The tokens of a prompt, begun as the model has seen texts begin.
pub(super) fn prompt_ids(model: &TrainedModel, prompt: &str) -> anyhow::Result<Vec<i32>> {
    let (mut ids, _) = model.tokenizer.around();
    ids.extend(model.tokenizer.encode(prompt).map_err(refused)?);
    if let Some(dropped) = model.tokenizer.dropped(prompt)? {
        tracing::warn!("the tokenizer has no token for these characters of the prompt: {dropped}");
    }
    Ok(ids)
}

/// The text with which a model continues the tokens of a prompt.
pub(super) fn write(model: TrainedModel, ids: &[i32], sampling: SamplingSpec, device: &str) -> anyhow::Result<String> {
    let model = model.merged()?;
    let largest = ids.iter().filter_map(|&id| usize::try_from(id).ok()).max();
    if let Some((id, vocab)) = largest.zip(model.dag.vocab()).filter(|(id, vocab)| id >= vocab) {
        let hint = "give with --tokenizer the tokenizer that it was trained with";
        return Err(bad_input(format!(
            "the prompt has token id {id}, but the model's vocabulary ends at {vocab}: {hint}"
        )));
    }
    if let Some(context) = model.dag.seq_len().filter(|&context| ids.len() > context) {
        let (all, first) = (ids.len(), ids.len() - context);
        tracing::warn!(
            "the prompt has {all} tokens and the model reads {context} at once: the first {first} are passed over, the \
             text goes on from the last {context}"
        );
    }
    let backend = open_device(device.parse().map_err(bad_input)?).map_err(refused)?;
    let length = ids.len() + sampling.tokens;
    let dag = for_sequences_of(length, model.dag, model.config.as_ref());
    let generator = Generator::new(Arc::new(dag), model.tensors, backend.as_ref());
    let mut generator = generator.map_err(|e| if e.is_bad_input() { bad_input(e) } else { e.into() })?;
    let written = generator.generate(ids, sampling)?;
    model.tokenizer.decode(&written).map_err(refused)
}

/// The model for sequences no longer than `tokens`: each token costs what the whole sequence does.
fn for_sequences_of(tokens: usize, dag: OpDag, model: Option<&Model>) -> OpDag {
    let shorter = dag.seq_len().filter(|&seq_len| tokens < seq_len);
    shorter.and_then(|_| model?.build(tokens).ok()).unwrap_or(dag)
}
