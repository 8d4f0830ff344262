//! Tests of files of documents and of tokens, through a corpus.

use std::path::Path;
use std::sync::Arc;

use ::parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::parser::parse_message_type;

use super::*;
use crate::data::{Corpus, Tokenizer, Tokens};

fn spec(path: &Path, format: DataFormat) -> DataSpec {
    DataSpec {
        path: vec![path.to_owned()],
        format,
        column: "text".to_owned(),
        rows: fusionllm_protocol::RowKind::Documents,
        chat_template: None,
        order: None,
        cache: false,
        tokenizer: "bytes".to_owned(),
        seq_len: 1,
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

fn text(tokens: &Tokens) -> String {
    Tokenizer::Bytes.decode(&tokens.slice(0..tokens.len()).unwrap()).unwrap()
}

/// The two splits of a file with this content.
fn splits(name: &str, content: &[u8], format: DataFormat) -> Result<(String, String), String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    let corpus = Corpus::read(&spec(&path, format), &Tokenizer::Bytes)
        .map_err(|e| e.to_string().replace(&format!("{}: ", path.display()), "").replace("data.path ", ""))?;
    Ok((text(corpus.train()), text(corpus.eval())))
}

#[test]
fn each_line_is_a_document_and_those_at_the_end_are_held_out() {
    let lines =
        "\u{feff}{\"text\": \"one\"}\r\n\n{\"id\": 7, \"text\": \"tw\\no\"}\n{\"text\": \"three\"}\n{\"text\": \"4\"}";
    let (train, eval) = splits("a.jsonl", lines.as_bytes(), DataFormat::Jsonl).unwrap();
    assert_eq!((train.as_str(), eval.as_str()), ("one\n\ntw\no\n\n", "three\n\n4\n\n"));
}

#[test]
fn a_line_that_has_no_text_is_named() {
    let of = |lines: &str| splits("a.jsonl", lines.as_bytes(), DataFormat::Jsonl).unwrap_err();
    let fine = "{\"text\": \"one\"}\n";
    let missing = of(&format!("{fine}{{\"content\": \"two\"}}"));
    assert_eq!(missing, "line 2: `text` is missing: data.column says which key has the text");
    assert_eq!(of(&format!("{fine}{{\"text\": 5}}")), "line 2: `text` is no string, expected the text of a document");
    assert_eq!(of(&format!("{fine}{{\"text\": \"tw")), "line 2: it is no JSON (byte 12)");
    let no_object = "line 2: it is no object, expected one for each document";
    for line in ["[1]", "\"secret\"", "7"] {
        assert_eq!(of(&format!("{fine}{line}")), no_object, "{line}");
    }
    assert!(of("\u{0}\u{1}").starts_with("line 1: it is no JSON"));
    let utf16 = splits("a.jsonl", b"\xff\xfe{\0", DataFormat::Jsonl).unwrap_err();
    assert_eq!(utf16, "line 1: it is not UTF-8 text");
    assert!(of("").contains("the training split has 0 tokens"), "{}", of(""));
}

#[test]
fn documents_without_a_text_are_counted_and_other_files_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let lines = "{\"text\": \"one\"}\n{\"text\": null}\n{\"text\": \"\"}\n{\"text\": \"two\"}\n";
    std::fs::write(folder.path().join("a.NDJSON"), lines).unwrap();
    std::fs::write(folder.path().join("b.txt"), "text").unwrap();
    let corpus = Corpus::read(&spec(folder.path(), DataFormat::Jsonl), &Tokenizer::Bytes).unwrap();
    let report = corpus.report(256).unwrap();
    let notes = report.notes.join("\n");
    assert!(notes.contains("2 documents without a text are left out"), "{notes}");
    assert!(notes.contains("1 file or folder, of another form than data.format: `b.txt`"), "{notes}");
    // The two empty lines are none of the text.
    assert!((report.bytes_per_token - 0.6).abs() < 1e-9, "{}", report.bytes_per_token);
    let fingerprint = report.fingerprint.unwrap();
    assert_eq!((fingerprint.bytes, fingerprint.files[0].train_bytes), (6, 3));
}

#[test]
fn nothing_of_private_documents_is_in_an_error() {
    let folder = tempfile::tempdir().unwrap();
    for line in ["\"secret\"", "{\"text\": 5, \"secret\": \"secret\"}", "{\"secret", "{\"text\": \"\\ud800secret\"}"] {
        std::fs::write(folder.path().join("secret.jsonl"), line).unwrap();
        let private = DataSpec { private: true, ..spec(folder.path(), DataFormat::Jsonl) };
        let error = Corpus::read(&private, &Tokenizer::Bytes).unwrap_err().to_string();
        assert!(error.contains("line 1: ") && !error.contains("secret"), "{error}");
    }
}

#[test]
fn other_values_of_a_line_may_be_anything_that_is_json() {
    let lines = "{\"a\": [1, {\"text\": 2}], \"text\": \"one\", \"z\": null}\n{\"text\": \"t\\u0077o\"}\n";
    let (train, eval) = splits("a.jsonl", lines.as_bytes(), DataFormat::Jsonl).unwrap();
    assert_eq!((train.as_str(), eval.as_str()), ("one\n\n", "two\n\n"));
}

fn parquet(rows: &[Option<&str>]) -> Vec<u8> {
    let schema = "message rows { required int32 id; optional binary text (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder().set_compression(::parquet::basic::Compression::SNAPPY).build();
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties)).unwrap();
    // A group of rows for every two.
    for group in rows.chunks(2) {
        let mut columns = writer.next_row_group().unwrap();
        let mut column = columns.next_column().unwrap().unwrap();
        let ids: Vec<i32> = (0..group.len() as i32).collect();
        column.typed::<Int32Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let mut column = columns.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> = group.iter().flatten().map(|&text| ByteArray::from(text)).collect();
        let defined: Vec<i16> = group.iter().map(|text| i16::from(text.is_some())).collect();
        column.typed::<ByteArrayType>().write_batch(&values, Some(&defined), None).unwrap();
        column.close().unwrap();
        columns.close().unwrap();
    }
    writer.close().unwrap();
    bytes
}

#[test]
fn each_row_is_a_document() {
    let rows = parquet(&[Some("one"), None, Some("zwei"), Some("three"), Some("4")]);
    let (train, eval) = splits("a.parquet", &rows, DataFormat::Parquet).unwrap();
    assert_eq!((train.as_str(), eval.as_str()), ("one\n\nzwei\n\n", "three\n\n4\n\n"));
}

#[test]
fn a_parquet_file_that_does_not_fit_is_refused_with_what_there_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let rows = parquet(&[Some("one"), Some("two")]);
    std::fs::write(&path, &rows).unwrap();
    let with = |column: &str, private| {
        let spec = DataSpec { column: column.to_owned(), private, ..spec(&path, DataFormat::Parquet) };
        Corpus::read(&spec, &Tokenizer::Bytes).unwrap_err().to_string()
    };
    assert!(with("content", false).ends_with("which has the text; columns of strings are `text`"));
    assert!(with("content", true).ends_with("data.column says which has the text"));
    assert!(with("id", false).ends_with("column `id` has no texts, expected one of strings"));
    for damaged in [&rows[..rows.len() / 2], b"text", b""] {
        let error = splits("a.parquet", damaged, DataFormat::Parquet).unwrap_err();
        assert!(error.starts_with("not readable as Parquet: "), "{error}");
    }
}

/// Any byte may be another; that this returns is the test.
#[test]
fn a_damaged_parquet_file_ends_nothing_but_its_reading() {
    let rows = parquet(&[Some("one"), Some("two"), None, Some("four")]);
    for at in 0..rows.len() {
        let mut damaged = rows.clone();
        damaged[at] ^= 0x55;
        let _ = splits("a.parquet", &damaged, DataFormat::Parquet);
    }
}

#[test]
fn token_files_are_read_with_and_without_a_header() {
    let ids: Vec<u16> = (0..600_000).map(|i| (i % 200) as u16).collect();
    let plain: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let header = |sign: u32, count: u32| {
        let mut header = vec![0; 1024];
        for (index, number) in [sign, 1, count].into_iter().enumerate() {
            header[4 * index..4 * index + 4].copy_from_slice(&number.to_le_bytes());
        }
        header
    };
    let wide: Vec<u8> = ids.iter().flat_map(|&id| u32::from(id).to_le_bytes()).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.bin");
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        Corpus::read(&spec(&path, DataFormat::Tokens), &Tokenizer::Bytes)
    };
    let count = ids.len() as u32;
    for bytes in
        [plain.clone(), [header(20_240_520, count), plain.clone()].concat(), [header(20_240_801, count), wide].concat()]
    {
        let corpus = read(&bytes).unwrap();
        let all = [corpus.train(), corpus.eval()].map(|tokens| tokens.slice(0..tokens.len()).unwrap()).concat();
        assert!(all.iter().zip(&ids).all(|(&a, &b)| a == i32::from(b)) && all.len() == ids.len());
        assert_eq!(corpus.eval().len(), ids.len() / 4);
        let report = corpus.report(256).unwrap();
        assert_eq!(report.bits_per_byte(1.0), None);
    }
    let error = read(&[header(20_240_520, count + 1), plain.clone()].concat()).unwrap_err().to_string();
    assert!(error.contains("its header says 600001 tokens, so 1201026 bytes, but it has 1201024"), "{error}");
    assert!(read(&plain[1..]).unwrap_err().to_string().contains("expected tokens of two bytes each"));
}
