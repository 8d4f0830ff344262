//! Tests of reading text.

use fusionllm_protocol::DataFormat;

use super::*;

fn spec(paths: &[&Path], seq_len: usize) -> DataSpec {
    DataSpec {
        path: paths.iter().map(|p| p.to_path_buf()).collect(),
        format: DataFormat::Text,
        tokenizer: "bytes".to_owned(),
        seq_len,
        private: false,
        owner: None,
        eval_fraction: 0.25,
    }
}

#[test]
fn folders_are_read_in_order_and_ignored_files_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &[u8]| std::fs::write(folder.path().join(name), content).unwrap();
    write("b.txt", b"efgh");
    write("a.txt", b"abcd");
    write("skip.log", b"nothing of this");
    write("image.png", &[0xff, 0xd8, 0xff]);
    write(".gitignore", b"*.log\n");
    std::fs::create_dir(folder.path().join("target")).unwrap();
    write("target/c.txt", b"build output");
    let corpus = Corpus::read(&spec(&[folder.path()], 1), &Tokenizer::Bytes).unwrap();
    assert_eq!(Tokenizer::Bytes.decode(corpus.train()), "abcefg");
    assert_eq!(Tokenizer::Bytes.decode(corpus.eval()), "dh");
    assert_eq!(corpus.report(256).files, 2);
}

#[test]
fn too_little_text_says_how_much_is_needed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("short.txt");
    std::fs::write(&file, "12345678").unwrap();
    let error = Corpus::read(&spec(&[&file], 64), &Tokenizer::Bytes).unwrap_err().to_string();
    assert_eq!(
        error,
        "the training split has 6 tokens, but one sequence needs 65: give more text, or a smaller data.seq_len"
    );
}

#[test]
fn a_missing_path_is_named() {
    let error = Corpus::read(&spec(&[Path::new("/nowhere/x")], 4), &Tokenizer::Bytes).unwrap_err().to_string();
    assert!(error.starts_with("data.path /nowhere/x: "), "{error}");
}

#[test]
fn the_unigram_loss_of_a_fair_coin_is_ln_2() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("coin.txt");
    std::fs::write(&file, "01".repeat(40_000)).unwrap();
    let report = Corpus::read(&spec(&[&file], 4), &Tokenizer::Bytes).unwrap().report(256);
    assert!((report.unigram_loss - std::f64::consts::LN_2).abs() < 0.01, "{}", report.unigram_loss);
    assert!((report.bytes_per_token - 1.0).abs() < 1e-12);
}

#[test]
fn a_token_beyond_the_vocabulary_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.txt");
    std::fs::write(&file, "abcdefghijklmnop").unwrap();
    let corpus = Corpus::read(&spec(&[&file], 2), &Tokenizer::Bytes).unwrap();
    let error = corpus.check_vocabulary(100).unwrap_err().to_string();
    assert!(error.ends_with("set model.vocab_size to at least 113"), "{error}");
}
