//! Tests of reading text.

use fusionllm_protocol::DataFormat;

use std::path::Path;

use super::*;

fn spec(paths: &[&Path], seq_len: usize) -> DataSpec {
    DataSpec {
        path: paths.iter().map(|p| p.to_path_buf()).collect(),
        format: DataFormat::Text,
        column: DataSpec::TEXT_COLUMN.to_owned(),
        rows: fusionllm_protocol::RowKind::Documents,
        chat_template: None,
        order: None,
        cache: false,
        tokenizer: "bytes".to_owned(),
        seq_len,
        private: false,
        private_seed: None,
        keep_blocks: [0; 2],
        mean: None,
        std: None,
        crop_padding: 0,
        flip: false,
        owner: None,
        eval_fraction: 0.25,
    }
}

fn ids(tokens: &Tokens) -> Vec<i32> {
    tokens.slice(0..tokens.len()).unwrap()
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
    assert_eq!(Tokenizer::Bytes.decode(&ids(corpus.train())).unwrap(), "abcefg");
    assert_eq!(Tokenizer::Bytes.decode(&ids(corpus.eval())).unwrap(), "dh");
    let report = corpus.report(256).unwrap();
    assert_eq!(report.files, 2);
    let notes = report.notes.join("\n");
    for words in [
        "1 file or folder, not UTF-8 text: `image.png`",
        "1 file or folder, named in an ignore file: `skip.log`",
        "1 file or folder, folders named target, node_modules or runs: `target`",
    ] {
        assert!(notes.contains(words), "`{words}` is missing in\n{notes}");
    }
}

/// The one sentence on what of `folder` was left out for `reason`.
fn left_out(notes: &[String], reason: &str) -> String {
    let found: Vec<&String> = notes.iter().filter(|n| n.contains(&format!("{reason}: "))).collect();
    assert_eq!(found.len(), 1, "{reason}: {notes:?}");
    found[0].split(": ").last().unwrap().to_owned()
}

#[test]
fn what_is_left_out_of_a_folder_is_counted_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &[u8]| std::fs::write(folder.path().join(name), content).unwrap();
    write("good.txt", b"some text that is long enough");
    write("copy.txt", b"some text that is long enough");
    for i in 0..5 {
        write(&format!("latin-{i}.txt"), &[b'a', 0xe9, b'b']);
    }
    write("nul.txt", b"a\0b");
    write("wide.txt", &[0xff, 0xfe, b'a', 0]);
    write("empty.txt", b"");
    write("mark.txt", "\u{feff}marked".as_bytes());
    write(".hidden", b"x");
    std::fs::create_dir(folder.path().join("old-run")).unwrap();
    write("old-run/job.json", b"{}");
    write("old-run/placement.json", b"{}");
    // Where checkpoints go to a folder of the data.
    std::fs::create_dir_all(folder.path().join("ck/step-2")).unwrap();
    write("ck/step-2/run.id", b"0123456789abcdef0123456789abcdef\n");
    write("ck/step-2/manifest.json", b"{}");
    write("ck/fusionllm.lock", b"run 1");
    #[cfg(unix)]
    std::os::unix::fs::symlink(folder.path(), folder.path().join("loop")).unwrap();
    let corpus = Corpus::read(&spec(&[folder.path()], 1), &Tokenizer::Bytes).unwrap();
    let report = corpus.report(256).unwrap();
    assert_eq!(report.files, 3);
    let notes = &report.notes;
    assert_eq!(left_out(notes, "not UTF-8 text"), "`latin-0.txt`, `latin-1.txt`, `latin-2.txt`, 2 more");
    assert_eq!(left_out(notes, "with NUL bytes"), "`nul.txt`");
    assert_eq!(left_out(notes, "UTF-16, expected UTF-8"), "`wide.txt`");
    assert_eq!(left_out(notes, "empty"), "`empty.txt`");
    assert_eq!(left_out(notes, "hidden"), "`.hidden`");
    let ours = left_out(notes, "run directories and checkpoints of fusionllm");
    assert_eq!(ours, "`ck`, `old-run`");
    #[cfg(unix)]
    assert_eq!(left_out(notes, "symbolic links"), "`loop`");
    let notes = notes.join("\n");
    assert!(
        notes.contains("byte order mark at the start of 1 files") && notes.contains("`good.txt` is `copy.txt` again")
    );
    assert!(!Tokenizer::Bytes.decode(&ids(corpus.train())).unwrap().contains('\u{feff}'));

    // Where data is private, names stay with its owner.
    let private = DataSpec { private: true, ..spec(&[folder.path()], 1) };
    let report = Corpus::read(&private, &Tokenizer::Bytes).unwrap().report(256).unwrap();
    let told = serde_json::to_string(&report).unwrap();
    assert!(!told.contains("good") && !told.contains("latin") && told.contains("file-"), "{told}");
}

#[test]
fn a_named_file_that_is_no_text_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    for (content, reason) in [
        (b"caf\xe9" as &[u8], "not UTF-8 text (byte 3 is not)"),
        (b"caf\xc3\xa9\0", "it has a NUL byte at 5, so it is no text"),
        (b"\xfe\xff\0a", "it is UTF-16, expected UTF-8 text"),
    ] {
        let file = folder.path().join("x.txt");
        std::fs::write(&file, content).unwrap();
        let error = Corpus::read(&spec(&[&file], 1), &Tokenizer::Bytes).unwrap_err().to_string();
        assert!(error.ends_with(reason), "{error}");
        // A folder with nothing else says why there is nothing.
        let error = Corpus::read(&spec(&[folder.path()], 1), &Tokenizer::Bytes).unwrap_err().to_string();
        assert!(error.starts_with("data.path holds no UTF-8 text files") && error.contains("`x.txt`"), "{error}");
    }
}

#[test]
fn a_file_that_is_meant_twice_is_read_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.txt");
    std::fs::write(&file, "abcdefgh").unwrap();
    let again = folder.path().join(".").join("a.txt");
    let corpus = Corpus::read(&spec(&[&file, folder.path(), &again, &file], 1), &Tokenizer::Bytes).unwrap();
    assert_eq!(corpus.train().len() + corpus.eval().len(), 8);
}

#[test]
fn a_fingerprint_follows_content_and_order_and_what_is_held_out() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("a.txt", "first text");
    write("b.txt", "second text");
    let of = |spec: &DataSpec| Corpus::read(spec, &Tokenizer::Bytes).unwrap().report(256).unwrap().fingerprint.unwrap();
    let job = spec(&[folder.path()], 1);
    let before = of(&job);
    assert_eq!((before.count, before.bytes, before.files[0].name.as_str()), (2, 21, "a.txt"));
    assert_eq!(of(&job), before);
    let later = of(&DataSpec { eval_fraction: 0.5, ..job.clone() });
    assert!(later.changes_since(&before)[0].contains("are held out now"));
    write("b.txt", "second text, longer");
    let changes = of(&job).changes_since(&before);
    assert!(
        changes[0].contains("`b.txt` has 19 bytes, had 11") && changes[1].contains("trained on now"),
        "{changes:?}"
    );
}

#[test]
fn characters_without_a_token_are_counted_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.txt");
    let tokenizer = |model: &str| {
        let text = format!("{{\"version\":\"1.0\",\"added_tokens\":[],\"model\":{model}}}");
        Tokenizer::from_json(text, "tok.json").unwrap()
    };
    let vocab = "{\"a\":0,\"b\":1,\" \":2,\"?\":3}";
    let drops = tokenizer(&format!("{{\"type\":\"BPE\",\"vocab\":{vocab},\"merges\":[]}}"));
    std::fs::write(&file, "ab cab dab ".repeat(100)).unwrap();
    let error = Corpus::read(&spec(&[&file], 4), &drops).unwrap_err().to_string();
    assert!(error.contains("no token for 200 of 1100 characters of the text ('c', 'd')"), "{error}");

    // A stray sign is said; bits per byte count what was predicted.
    std::fs::write(&file, format!("{}é", "ab ".repeat(1000))).unwrap();
    let report = Corpus::read(&spec(&[&file], 4), &drops).unwrap().report(4).unwrap();
    assert!(report.notes.iter().any(|n| n.contains("no token for 1 of 3001 characters")), "{:?}", report.notes);
    assert!((report.bytes_per_token - 1.0).abs() < 1e-12, "{}", report.bytes_per_token);

    let unknown = tokenizer(&format!("{{\"type\":\"BPE\",\"vocab\":{vocab},\"merges\":[],\"unk_token\":\"?\"}}"));
    let report = Corpus::read(&spec(&[&file], 4), &unknown).unwrap().report(4).unwrap();
    assert!(report.notes.iter().any(|n| n.contains("1 of 3001 tokens are the one for")), "{:?}", report.notes);
    std::fs::write(&file, "xyz ".repeat(100)).unwrap();
    let error = Corpus::read(&spec(&[&file], 4), &unknown).unwrap_err().to_string();
    assert!(error.contains("does not know 300 of 400 tokens"), "{error}");
}

#[test]
fn what_a_normalizer_takes_away_is_counted_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.txt");
    let read = |text: &str, normalizer: &str| {
        std::fs::write(&file, text).unwrap();
        let mut keys: serde_json::Value = serde_json::from_str(&Tokenizer::Bytes.to_json()).unwrap();
        keys["normalizer"] = serde_json::from_str(normalizer).unwrap();
        let tokenizer = Tokenizer::from_json(keys.to_string(), "tok.json").unwrap();
        Corpus::read(&spec(&[&file], 4), &tokenizer)
    };
    let digits = "{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"[0-9]\"},\"content\":\"\"}";
    let error = read(&"ab 12 ".repeat(100), digits).unwrap_err().to_string();
    assert!(error.contains("no token for 200 of 600 characters of the text ('1', '2')"), "{error}");
    let report = read(&format!("{}7", "ab ".repeat(1000)), digits).unwrap().report(256).unwrap();
    assert!(report.notes.iter().any(|n| n.contains("no token for 1 of 3001 characters")), "{:?}", report.notes);
    // Bits per byte are those of the bytes that became tokens.
    assert!((report.bytes_per_token - 1.0).abs() < 1e-12, "{}", report.bytes_per_token);
    let report = read(&"Ab ".repeat(1000), "{\"type\":\"Lowercase\"}").unwrap().report(256).unwrap();
    let said = "makes others of 1000 of 3000 characters ('A')";
    assert!(report.notes.iter().any(|n| n.contains(said)), "{:?}", report.notes);
}

/// A number of bits per byte is of the text as it is, or there is none.
#[test]
fn bits_per_byte_of_a_text_that_tokens_do_not_tell_are_left_out_with_a_word() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.txt");
    let read = |text: &str, normalizer: &str| {
        std::fs::write(&file, text.repeat(1000)).unwrap();
        let mut keys: serde_json::Value = serde_json::from_str(&Tokenizer::Bytes.to_json()).unwrap();
        keys["normalizer"] = serde_json::from_str(normalizer).unwrap();
        let tokenizer = Tokenizer::from_json(keys.to_string(), "tok.json").unwrap();
        Corpus::read(&spec(&[&file], 4), &tokenizer).unwrap().report(256).unwrap()
    };
    let spaces =
        |into: &str| format!("{{\"type\":\"Replace\",\"pattern\":{{\"Regex\":\"\\\\s+\"}},\"content\":\"{into}\"}}");
    let swap = |from: &str, to: &str| {
        format!("{{\"type\":\"Replace\",\"pattern\":{{\"String\":\"{from}\"}},\"content\":\"{to}\"}}")
    };
    let (lower, nfc) = ("{\"type\":\"Lowercase\"}", "{\"type\":\"NFC\"}");
    let both = format!("{{\"type\":\"Sequence\",\"normalizers\":[{},{lower}]}}", spaces(" "));
    for (text, normalizer, lost) in [
        ("ab    ba ", spaces(" "), Some(3000)),
        ("Ab    BA ", both, Some(6000)),
        ("AB ab ", lower.to_owned(), Some(2000)),
        ("ab ba ", spaces(" "), None),
        ("ab ba ", nfc.to_owned(), None),
        ("ab ba ", swap("b", "c"), None),
        ("ab ca ", swap("b", "c"), Some(1000)),
    ] {
        let report = read(text, &normalizer);
        assert_eq!(report.bits_per_byte(1.0).is_some(), lost.is_none(), "{text}: {report:?}");
        let said = lost.map(|lost| format!("{lost} of {} bytes of the text cannot be had back", 1000 * text.len()));
        let is_said = |n: &String| said.as_ref().map_or(n.contains("bits per byte"), |said| n.contains(said));
        assert_eq!(report.notes.iter().any(is_said), lost.is_some(), "{text}: {:?}", report.notes);
    }
    // Of tokens that stand for anything, too.
    let text = "{\"version\":\"1.0\",\"added_tokens\":[],\"model\":{\"type\":\"BPE\",\"merges\":[],\"unk_token\":\"?\",\
                \"vocab\":{\"a\":0,\"b\":1,\" \":2,\"?\":3}}}";
    std::fs::write(&file, "ab c ".repeat(1000)).unwrap();
    let tokenizer = Tokenizer::from_json(text.to_owned(), "tok.json").unwrap();
    let report = Corpus::read(&spec(&[&file], 4), &tokenizer).unwrap().report(4).unwrap();
    assert_eq!(report.bits_per_byte(1.0), None, "{report:?}");
}

/// What stands for two texts cannot be read back, whatever made one token of them.
#[test]
fn bits_per_byte_are_left_out_where_a_token_stands_for_two_texts() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.txt");
    let read = |text: &str, change: &dyn Fn(&mut serde_json::Value)| {
        std::fs::write(&file, text).unwrap();
        let vocab: serde_json::Map<String, serde_json::Value> =
            "abdehnot _\u{2581}\n".chars().zip(0..).map(|(c, id)| (c.to_string(), id.into())).collect();
        let mut keys = serde_json::json!({
            "version": "1.0", "added_tokens": [], "model": { "type": "BPE", "merges": [], "vocab": vocab }
        });
        change(&mut keys);
        let tokenizer = Tokenizer::from_json(keys.to_string(), "tok.json").unwrap();
        Corpus::read(&spec(&[&file], 4), &tokenizer).unwrap().report(20).unwrap()
    };
    let metaspace = |replacement: &str, scheme: &str| {
        let step = serde_json::json!({
            "type": "Metaspace", "replacement": replacement, "prepend_scheme": scheme, "split": true
        });
        move |keys: &mut serde_json::Value| keys["pre_tokenizer"] = step.clone()
    };
    let sentence_piece = |keys: &mut serde_json::Value| {
        let replace = serde_json::json!({ "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" });
        let prepend = serde_json::json!({ "type": "Prepend", "prepend": "\u{2581}" });
        keys["normalizer"] = serde_json::json!({ "type": "Sequence", "normalizers": [prepend, replace] });
    };
    let added = |lstrip: bool, rstrip: bool, single_word: bool| {
        let token = serde_json::json!({
            "id": 12, "content": "the", "single_word": single_word, "lstrip": lstrip, "rstrip": rstrip,
            "normalized": false, "special": false
        });
        move |keys: &mut serde_json::Value| keys["added_tokens"] = serde_json::json!([token])
    };
    let (plain, signs) = ("the note on hand\n".repeat(500), "the_note on the_hand\n".repeat(500));
    let sparks = "the note\u{2581}on hand\n".repeat(500);
    let is_left_out = |text: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let report = read(text, change);
        let is_said = report.notes.iter().any(|note| note.contains("there are no bits per byte"));
        assert_eq!(is_said, report.bits_per_byte(1.0).is_none(), "{report:?}");
        is_said
    };
    assert!(is_left_out(&signs, &metaspace("_", "never")));
    assert!(is_left_out(&plain, &metaspace("a", "never")));
    assert!(is_left_out(&sparks, &metaspace("\u{2581}", "always")));
    assert!(is_left_out(&sparks, &sentence_piece));
    assert!(is_left_out(&plain, &added(true, false, false)));
    assert!(is_left_out(&plain, &added(false, true, true)));
    // What tells one from the other loses nothing.
    assert!(!is_left_out(&plain, &metaspace("_", "never")));
    assert!(!is_left_out(&signs, &metaspace("\u{2581}", "always")));
    assert!(!is_left_out(&plain, &sentence_piece));
    assert!(!is_left_out(&plain, &added(false, false, false)));
}

#[test]
fn words_without_the_space_between_them_are_said() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.txt");
    std::fs::write(&file, "ab ba ".repeat(100)).unwrap();
    let text = "{\"version\":\"1.0\",\"added_tokens\":[],\"pre_tokenizer\":{\"type\":\"WhitespaceSplit\"},\
                \"model\":{\"type\":\"WordLevel\",\"vocab\":{\"ab\":0,\"ba\":1,\"?\":2},\"unk_token\":\"?\"}}";
    let tokenizer = Tokenizer::from_json(text.to_owned(), "tok.json").unwrap();
    let report = Corpus::read(&spec(&[&file], 4), &tokenizer).unwrap().report(3).unwrap();
    assert!(report.notes.iter().any(|n| n.contains("no token for 200 white space characters")), "{:?}", report.notes);
    assert!((report.bytes_per_token - 2.0).abs() < 0.05, "{}", report.bytes_per_token);
}

#[test]
fn a_tokenizer_that_is_too_large_is_refused_even_where_the_text_is_small() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.txt");
    std::fs::write(&file, "ababababab").unwrap();
    let json = |added: &str| {
        format!(
            "{{\"version\":\"1.0\",\"added_tokens\":[{added}],\"model\":{{\"type\":\"BPE\",\"merges\":[],\
             \"vocab\":{{\"a\":0,\"b\":1,\"c\":2}}}}}}"
        )
    };
    let read = |added: &str| {
        Corpus::read(&spec(&[&file], 1), &Tokenizer::from_json(json(added), "tok.json").unwrap()).unwrap()
    };
    let error = read("").check_vocabulary(2, true).unwrap_err().to_string();
    let expected = "data.tokenizer tok.json has token id 2, but the model's vocabulary ends at 2: set model.vocab_size to at least 3";
    assert_eq!(error, expected);
    // A token that was added and does not come is no reason to refuse.
    let pad = "{\"id\":3,\"content\":\"[PAD]\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\
               \"normalized\":false,\"special\":true}";
    assert!(read(pad).check_vocabulary(3, false).unwrap().unwrap().contains("4 entries, more than"));
    assert_eq!(read(pad).check_vocabulary(4, false).unwrap(), None);
    std::fs::write(&file, "ab[PAD]ababababa").unwrap();
    assert!(read(pad).check_vocabulary(3, false).is_err());
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
fn too_little_text_says_what_was_left_out_of_it() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.txt"), "a").unwrap();
    std::fs::write(folder.path().join("b.txt"), [0xe9, b'x']).unwrap();
    let error = Corpus::read(&spec(&[folder.path()], 64), &Tokenizer::Bytes).unwrap_err().to_string();
    assert!(
        error.ends_with("data.seq_len; left out of the data: 1 file or folder, not UTF-8 text: `b.txt`"),
        "{error}"
    );
}

/// Some would make gigabytes of a small text, of single characters, of words, or step by step.
#[test]
fn a_normalizer_that_makes_too_much_is_refused_before_memory_is_filled() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text.txt");
    std::fs::write(&file, "a bc ".repeat(400_000)).unwrap();
    let replace = |pattern: &str, content: &str| serde_json::json!({ "type": "Replace", "pattern": { "String": pattern }, "content": content });
    let doublings: Vec<serde_json::Value> = (0..40).map(|_| replace("a", "aa")).collect();
    for normalizer in [
        replace("b", &"a".repeat(5000)),
        replace("bc", &"a".repeat(5000)),
        serde_json::json!({ "type": "Sequence", "normalizers": doublings }),
    ] {
        let mut keys: serde_json::Value = serde_json::from_str(&Tokenizer::Bytes.to_json()).unwrap();
        keys["normalizer"] = normalizer;
        let tokenizer = Tokenizer::from_json(keys.to_string(), "tok.json").unwrap();
        let began = std::time::Instant::now();
        let error = Corpus::read(&spec(&[&file], 4), &tokenizer).unwrap_err().to_string();
        assert!(error.contains("its normalizer makes") && error.contains("expected at most"), "{error}");
        assert!(began.elapsed().as_secs() < 20, "{:?}", began.elapsed());
    }
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
    let report = Corpus::read(&spec(&[&file], 4), &Tokenizer::Bytes).unwrap().report(256).unwrap();
    assert!((report.unigram_loss - std::f64::consts::LN_2).abs() < 0.01, "{}", report.unigram_loss);
    assert!((report.bytes_per_token - 1.0).abs() < 1e-12);
}

#[test]
fn a_token_beyond_the_vocabulary_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.txt");
    std::fs::write(&file, "abcdefghijklmnop").unwrap();
    let corpus = Corpus::read(&spec(&[&file], 2), &Tokenizer::Bytes).unwrap();
    let error = corpus.check_vocabulary(100, true).unwrap_err().to_string();
    assert!(error.ends_with("set model.vocab_size to at least 113"), "{error}");
    // A model by path has the vocabulary that it has.
    let error = corpus.check_vocabulary(100, false).unwrap_err().to_string();
    assert!(error.ends_with("give in data.tokenizer the tokenizer that the model was made with"), "{error}");
    assert_eq!(corpus.check_vocabulary(256, true).unwrap(), None);
    assert!(corpus.check_vocabulary(300, true).unwrap().unwrap().contains("256 entries, the model's vocabulary 300"));
}

/// Reads these files as somebody who has so much memory, or who has stopped.
fn read_with(paths: &[&Path], tokenizer: &Tokenizer, reading: &Reading) -> Result<Corpus, DataError> {
    Corpus::read_within(&spec(paths, 4), tokenizer.into(), &ReadableData::everything(), reading)
}

#[test]
fn reading_ends_when_nobody_wants_it_and_says_how_far_it_is() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a.txt", "b.txt"] {
        std::fs::write(folder.path().join(name), "some text\n".repeat(100)).unwrap();
    }
    let stop = crate::stop::StopFlag::default();
    let reading = Reading::new(stop.clone());
    read_with(&[folder.path()], &Tokenizer::Bytes, &reading).unwrap();
    assert!(reading.progress() > 2000, "{}", reading.progress());
    stop.set();
    let reading = Reading::new(stop);
    let stopped = read_with(&[folder.path()], &Tokenizer::Bytes, &reading);
    assert!(matches!(stopped, Err(DataError::Stopped)), "{stopped:?}");
    assert!(reading.progress() < 10, "no file was read");
}

#[test]
fn what_does_not_fit_beside_the_model_is_refused_with_the_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.txt");
    std::fs::write(&file, "some text\n".repeat(100)).unwrap();
    std::fs::write(folder.path().join("b.txt"), "some text\n".repeat(50)).unwrap();
    // Two bytes a token, and the text that becomes tokens last: a quarter of a file.
    for (path, room, is_refused) in
        [(&*file, 2250, false), (&*file, 1999, true), (folder.path(), 3125, false), (folder.path(), 3124, true)]
    {
        let reading = Reading::default();
        reading.limit(room);
        let read = read_with(&[path], &Tokenizer::Bytes, &reading);
        match read {
            Err(DataError::Memory { needed, room: of }) if is_refused => {
                assert!(needed > room && of == room, "{needed} of {of}");
            }
            read => assert_eq!((read.is_err(), is_refused), (false, false), "{room}: {read:?}"),
        }
        // A named file is refused before it is read.
        assert_eq!(reading.progress() == 0, is_refused && path == file);
    }
}

/// A file that is no text is left out, however large it is.
#[test]
fn a_large_file_that_is_no_text_is_not_read_whole() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.txt"), "some text\n".repeat(100)).unwrap();
    let mut film = vec![b'x'; 100];
    film.push(0xff);
    film.resize(20 << 20, b'x');
    std::fs::write(folder.path().join("film"), film).unwrap();
    let reading = Reading::default();
    reading.limit(4 << 20);
    let corpus = read_with(&[folder.path()], &Tokenizer::Bytes, &reading).unwrap();
    assert_eq!(left_out(&corpus.report(256).unwrap().notes, "not UTF-8 text"), "`film`");
}

/// Where tokens lie, what they are, and what is said.
fn cached(cache: &TokenCache, spec: &DataSpec, tokenizer: &Tokenizer) -> (Corpus, Vec<String>) {
    let (readable, reading) = (ReadableData::everything(), Reading::default());
    let corpus = Corpus::read_by(spec, tokenizer.into(), &readable, &reading, Some(cache)).unwrap();
    let (done, total) = reading.bytes();
    assert!(done == 0 || done == total, "{done} of {total}");
    let notes = corpus.report(256).unwrap().notes;
    (corpus, notes)
}

fn entries(cache: &Path) -> Vec<String> {
    let names = std::fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn tokens_on_the_disk_are_those_in_memory_and_are_found_again() {
    let folder = tempfile::tempdir().unwrap();
    let cache_folder = folder.path().join("cache/tokens");
    let cache = TokenCache::at(cache_folder.clone()).unwrap();
    let data = folder.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("a.txt"), "\u{feff}größer als gedacht\n".repeat(100_000)).unwrap();
    std::fs::write(data.join("b.txt"), "and more").unwrap();
    let job = spec(&[&data], 4);
    let in_memory = Corpus::read(&job, &Tokenizer::Bytes).unwrap();
    let (first, notes) = cached(&cache, &job, &Tokenizer::Bytes);
    assert_eq!((first.tokens(Split::Train).bytes(), first.tokens(Split::HeldOut).bytes()), (0, 0));
    assert!(first == in_memory);
    assert_eq!(notes, in_memory.report(256).unwrap().notes);
    let made = entries(&cache_folder);
    assert_eq!(made.len(), 1);
    // From the cache now, which nothing has written since.
    let train = cache_folder.join(&made[0]).join("train.bin");
    let written = std::fs::metadata(&train).unwrap().modified().unwrap();
    assert!(cached(&cache, &job, &Tokenizer::Bytes) == (first.clone(), notes.clone()));
    assert_eq!(std::fs::metadata(&train).unwrap().modified().unwrap(), written);
    // Whatever changes tokens has a place of its own; another name has not.
    std::fs::rename(data.join("b.txt"), data.join("c.txt")).unwrap();
    let (renamed, _) = cached(&cache, &job, &Tokenizer::Bytes);
    assert_eq!(renamed.report(256).unwrap().fingerprint.unwrap().files[1].name, "c.txt");
    assert_eq!(entries(&cache_folder), made);
    cached(&cache, &DataSpec { eval_fraction: 0.5, ..job.clone() }, &Tokenizer::Bytes);
    assert_eq!(entries(&cache_folder).len(), 2);
    std::fs::write(data.join("c.txt"), "and less").unwrap();
    let (changed, _) = cached(&cache, &job, &Tokenizer::Bytes);
    assert!(changed.tokens(Split::HeldOut) != first.tokens(Split::HeldOut));
    assert_eq!(entries(&cache_folder).len(), 3);
}

#[cfg(unix)]
#[test]
fn the_cache_is_for_its_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let cache_folder = folder.path().join("cache/tokens");
    let cache = TokenCache::at(cache_folder.clone()).unwrap();
    std::fs::write(folder.path().join("a.txt"), "some text").unwrap();
    cached(&cache, &spec(&[&folder.path().join("a.txt")], 1), &Tokenizer::Bytes);
    let entry = cache_folder.join(&entries(&cache_folder)[0]);
    for place in [cache_folder, entry] {
        let mode = std::fs::metadata(&place).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{}: {mode:o}", place.display());
    }
}

#[test]
fn a_damaged_or_foreign_cache_is_made_anew_and_that_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let cache_folder = folder.path().join("cache/tokens");
    let cache = TokenCache::at(cache_folder.clone()).unwrap();
    let file = folder.path().join("a.txt");
    std::fs::write(&file, "some text\n".repeat(50)).unwrap();
    let job = spec(&[&file], 4);
    let good = Corpus::read(&job, &Tokenizer::Bytes).unwrap();
    let (_, notes) = cached(&cache, &job, &Tokenizer::Bytes);
    let entry = cache_folder.join(&entries(&cache_folder)[0]);
    let meta = std::fs::read_to_string(entry.join("tokens.json")).unwrap();
    let damage: [(&str, &dyn Fn()); 7] = [
        ("train.bin is not what was written", &|| std::fs::write(entry.join("train.bin"), "other").unwrap()),
        ("eval.bin is not what was written", &|| {
            let mut bytes = std::fs::read(entry.join("eval.bin")).unwrap();
            bytes[3] ^= 1;
            std::fs::write(entry.join("eval.bin"), bytes).unwrap();
        }),
        ("train.bin ", &|| std::fs::remove_file(entry.join("train.bin")).unwrap()),
        ("tokens.json: ", &|| std::fs::remove_file(entry.join("tokens.json")).unwrap()),
        ("tokens.json is not readable", &|| std::fs::write(entry.join("tokens.json"), "{").unwrap()),
        ("tokens.json is of other tokens", &|| {
            let other = meta.replacen("\"version\":1", "\"version\":0", 1);
            assert_ne!(other, meta);
            std::fs::write(entry.join("tokens.json"), other).unwrap();
        }),
        ("train-rows.bin is not what was written", &|| std::fs::write(entry.join("train-rows.bin"), "1").unwrap()),
    ];
    for (said, damage) in damage {
        damage();
        let (again, all) = cached(&cache, &job, &Tokenizer::Bytes);
        assert!(again.kept == good.kept);
        let said = format!("the token cache was damaged and is made anew: {said}");
        assert!(all.iter().any(|note| note.starts_with(&said)), "`{said}` is not in {all:?}");
        assert_eq!(cached(&cache, &job, &Tokenizer::Bytes).1, notes, "it is whole again");
    }
}

#[test]
fn what_was_not_used_for_long_goes_when_another_entry_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let cache_folder = folder.path().join("cache/tokens");
    let cache = TokenCache::at(cache_folder.clone()).unwrap();
    let file = folder.path().join("a.txt");
    std::fs::write(&file, "some text\n".repeat(50)).unwrap();
    cached(&cache, &spec(&[&file], 4), &Tokenizer::Bytes);
    let old = entries(&cache_folder);
    let meta = std::fs::File::options().append(true).open(cache_folder.join(&old[0]).join("tokens.json")).unwrap();
    let days = |days: u64| std::time::SystemTime::now() - std::time::Duration::from_secs(days * 24 * 3600);
    meta.set_modified(days(29)).unwrap();
    cached(&cache, &DataSpec { eval_fraction: 0.3, ..spec(&[&file], 4) }, &Tokenizer::Bytes);
    assert_eq!(entries(&cache_folder).len(), 2, "29 days are not long");
    meta.set_modified(days(31)).unwrap();
    cached(&cache, &DataSpec { eval_fraction: 0.4, ..spec(&[&file], 4) }, &Tokenizer::Bytes);
    assert!(entries(&cache_folder).len() == 2 && !entries(&cache_folder).contains(&old[0]));
    assert!(!entries(&cache_folder).iter().any(|name| name.starts_with('.')), "nothing unfinished stays");
}

#[test]
fn nothing_is_removed_from_the_caches_folder_that_is_no_entry_or_still_at_work() {
    let folder = tempfile::tempdir().unwrap();
    let cache = TokenCache::at(folder.path().join("cache")).unwrap();
    let (cache_folder, file) = (folder.path().join("cache"), folder.path().join("a.txt"));
    std::fs::write(&file, "some text\n".repeat(50)).unwrap();
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(90 * 24 * 3600);
    let age = |path: &Path| std::fs::File::open(path).unwrap().set_modified(old).unwrap();
    for (name, file, text, is_at_work) in [
        ("thesis", "tokens.json", "{\"key\": \"other\"}", false),
        ("photos", "a.jpg", "x", false),
        (".new-letters", "a.txt", "x", false),
        (".new-abcdef", "train.bin", "x", true),
    ] {
        std::fs::create_dir(cache_folder.join(name)).unwrap();
        std::fs::write(cache_folder.join(name).join(file), text).unwrap();
        if !is_at_work {
            age(&cache_folder.join(name).join(file));
        }
        age(&cache_folder.join(name));
    }
    std::fs::create_dir(cache_folder.join(".new-killed")).unwrap();
    std::fs::write(cache_folder.join(".new-killed/eval.wide"), "x").unwrap();
    age(&cache_folder.join(".new-killed/eval.wide"));
    age(&cache_folder.join(".new-killed"));
    cached(&cache, &spec(&[&file], 4), &Tokenizer::Bytes);
    let left = entries(&cache_folder);
    for name in ["thesis", "photos", ".new-letters", ".new-abcdef"] {
        assert!(left.iter().any(|entry| entry == name), "{name} is gone: {left:?}");
    }
    assert_eq!(left.len(), 5, "what a killed process left behind stays: {left:?}");
}
