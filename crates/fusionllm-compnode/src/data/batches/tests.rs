//! Tests of what a step gets.

use std::collections::BTreeSet;

use fusionllm_protocol::JobSpec;

use crate::data::Tokenizer;
use crate::targets::target_weight;

use super::*;

/// A job on this text, with two micro-batches of two sequences of four tokens.
fn batches(text: &str, changes: &[&str]) -> TextBatches {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.txt");
    std::fs::write(&path, text).unwrap();
    let job = format!(
        "[model]\nname = \"gpt2\"\n[data]\npath = {path:?}\nseq_len = 4\ncache = false\neval_fraction = 0.2\n[train]\n\
         batch = 4\nmicro_batches = 2\neval_batches = 2\nseed = 3\n"
    );
    let changes: Vec<String> = changes.iter().map(|change| (*change).to_owned()).collect();
    let spec = JobSpec::from_toml(&job, &changes).unwrap();
    let corpus = Arc::new(Corpus::read(&spec.data, &Tokenizer::Bytes).unwrap());
    TextBatches::new(corpus, &spec.data, &spec.train.view(), spec.train.seed)
}

fn ids(tensor: &HostTensor) -> Vec<i32> {
    let Values::I32(ids) = tensor.values() else { panic!() };
    ids.clone()
}

/// The first tokens of the sequences of a step.
fn begins(batches: &TextBatches, step: u64) -> Vec<i32> {
    let of = |index| ids(&batches.train(step, index).unwrap().0).chunks(4).map(|row| row[0]).collect::<Vec<_>>();
    [of(0), of(1)].concat()
}

/// Text in which each fourth character tells where it is.
fn counted(sequences: u8) -> String {
    (0..sequences).map(|i| format!("{}---", char::from(b'0' + i))).collect()
}

#[test]
fn the_drawn_order_is_what_it_always_was() {
    let text: String = (0..200u8).map(|i| char::from(b'0' + i % 64)).collect();
    let (inputs, labels) = batches(&text, &[]).train(5, 1).unwrap();
    let (inputs, labels) = (ids(&inputs), ids(&labels));
    let mut rng = ChaCha8Rng::seed_from_u64(seed_for(3, &[b"batch", &5u64.to_le_bytes()]));
    let starts: Vec<usize> = (0..4).map(|_| rng.random_range(0..=160 - 4 - 1)).collect();
    let at = |start: usize| text.as_bytes()[start..start + 4].iter().map(|&b| i32::from(b)).collect::<Vec<_>>();
    assert_eq!(inputs, [at(starts[2]), at(starts[3])].concat());
    assert_eq!(labels, [at(starts[2] + 1), at(starts[3] + 1)].concat());
}

#[test]
fn shuffled_sequences_come_once_an_epoch_whatever_the_step_where_one_begins_again() {
    // 13 sequences to train on and the token after them, held out 13 others.
    let text = format!("{}{}", counted(13), "x".repeat(14));
    let shuffled = batches(&text, &["data.order=\"shuffled\"", "data.eval_fraction=0.2"]);
    assert_eq!(shuffled.corpus.train().len(), 52);
    // One token is needed behind the last.
    let all: Vec<i32> = (0..6).flat_map(|step| begins(&shuffled, step)).collect();
    for epoch in all.chunks_exact(12).take(2) {
        let once: BTreeSet<i32> = epoch.iter().copied().collect();
        assert_eq!(once, (0..12).map(|i| i32::from(b'0') + i).collect());
    }
    assert_ne!(all[..12], all[12..]);
    // Another process that begins at step 4 goes on with the very sample.
    let again = batches(&text, &["data.order=\"shuffled\""]);
    assert_eq!((4..6).flat_map(|step| begins(&again, step)).collect::<Vec<_>>(), all[16..]);
    // However the batch is cut.
    let whole = batches(&text, &["data.order=\"shuffled\"", "train.micro_batches=1"]);
    let of = ids(&whole.train(1, 0).unwrap().0).chunks(4).map(|row| row[0]).collect::<Vec<_>>();
    assert_eq!(of, all[4..8]);
    let other = batches(&text, &["data.order=\"shuffled\"", "train.seed=4"]);
    assert_ne!(begins(&other, 0), all[..4]);
}

#[test]
fn in_sequence_the_files_are_read_from_begin_to_end() {
    let text = format!("{}{}", counted(13), "x".repeat(14));
    let sequential = batches(&text, &["data.order=\"sequential\""]);
    let all: Vec<i32> = (0..4).flat_map(|step| begins(&sequential, step)).map(|id| id - i32::from(b'0')).collect();
    assert_eq!(all, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3]);
}

/// Conversations of the golden files.
fn chat(changes: &[&str]) -> TextBatches {
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/chat");
    let job = format!(
        "[model]\nname = \"gpt2\"\n[data]\npath = {:?}\nformat = \"jsonl\"\nrows = \"chat\"\ntokenizer = {:?}\n\
         seq_len = 96\neval_fraction = 0.2\ncache = false\norder = \"sequential\"\n[train]\nbatch = 4\nmicro_batches = 2\n",
        golden.join("data.jsonl"),
        golden.join("chatml/tokenizer.json")
    );
    let changes: Vec<String> = changes.iter().map(|change| (*change).to_owned()).collect();
    let spec = JobSpec::from_toml(&job, &changes).unwrap();
    let tokenizer = Tokenizer::open(&spec.data.tokenizer).unwrap();
    let readable = crate::data::ReadableData::everything();
    let template = crate::data::ChatTemplate::of_job(&spec.data, &Default::default(), &readable).unwrap();
    let by = crate::data::Tokenizing { tokenizer: &tokenizer, template: template.as_ref() };
    let corpus = Arc::new(Corpus::read(&spec.data, by).unwrap());
    TextBatches::new(corpus, &spec.data, &spec.train.view(), spec.train.seed)
}

#[test]
fn only_answers_are_targets_and_all_of_a_batch_weigh_alike() {
    let batches = chat(&[]);
    let mut weights = Vec::new();
    let mut targets = 0;
    for index in 0..2 {
        let (inputs, labels) = batches.train(0, index).unwrap();
        assert_eq!((inputs.shape(), labels.shape()), (&[2, 96][..], &[2, 96][..]));
        let (inputs, labels) = (ids(&inputs), ids(&labels));
        weights.push(target_weight(labels.iter().copied()).unwrap());
        for (inputs, labels) in inputs.chunks(96).zip(labels.chunks(96)) {
            assert!(labels[95] < 0, "the last position has no target");
            for at in 0..95 {
                targets += usize::from(labels[at] >= 0);
                assert!(labels[at] < 0 || labels[at] == inputs[at + 1], "{at}");
            }
        }
    }
    // Rows of 5, 16, 12 and 5 targets, in two micro-batches.
    assert_eq!((targets, weights), (38, vec![2.0 / 38.0, 2.0 / 38.0]));
    // The last conversation is padded, and nothing of the padding is a target.
    let row = ids(&chat(&["train.batch=1", "train.micro_batches=1"]).train(0, 0).unwrap().1);
    assert!(row[54..].iter().all(|&label| label < 0));
}

#[test]
fn conversations_are_shuffled_by_default_and_the_evaluation_is_all_of_them() {
    let mut spec = JobSpec::from_toml("[model]\nname = \"gpt2\"\n[data]\npath = \"x\"\n", &[]).unwrap();
    assert_eq!(spec.data.sample_order(), SampleOrder::Drawn);
    spec.data.rows = fusionllm_protocol::RowKind::Chat;
    assert_eq!(spec.data.sample_order(), SampleOrder::Shuffled);
    let batches = chat(&["train.micro_batches=4", "train.eval_batches=3"]);
    let labels: Vec<Vec<i32>> = (0..3).map(|index| ids(&batches.eval(index).unwrap().1)).collect();
    let targets: Vec<usize> = labels.iter().map(|row| row.iter().filter(|&&label| label >= 0).count()).collect();
    assert_eq!(targets, [14, 23, 12]);
    let weights: BTreeSet<u32> =
        labels.iter().map(|row| target_weight(row.iter().copied()).unwrap().to_bits()).collect();
    assert_eq!(weights, [(3.0f32 / 49.0).to_bits()].into());
}
