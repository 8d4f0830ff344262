//! Tests of the JSON form: what it looks like, and how damaged texts are refused.

use crate::{Gpt2Config, gpt2};

use super::*;

const SMALL: &str = r#"{
  "format": "fusionllm-op-dag",
  "version": 1,
  "name": "small",
  "params": [
    {
      "name": "w",
      "shape": [
        5,
        3
      ],
      "init": {
        "normal": {
          "std": 0.02
        }
      },
      "decay": true
    }
  ],
  "ops": [
    {
      "name": "ids",
      "kind": {
        "op": "input",
        "dtype": "i32",
        "shape": [
          "B",
          4
        ]
      },
      "inputs": [],
      "params": []
    },
    {
      "name": "rows",
      "kind": {
        "op": "embedding",
        "vocab": 5,
        "dim": 3
      },
      "inputs": [
        "ids"
      ],
      "params": [
        "w"
      ]
    },
    {
      "name": "out",
      "kind": {
        "op": "add"
      },
      "inputs": [
        "rows",
        "rows"
      ],
      "params": []
    }
  ]
}"#;

/// The message with which `SMALL` is refused after `from` became `to`.
fn refusal(from: &str, to: &str) -> String {
    assert!(SMALL.contains(from), "{from}");
    OpDag::from_json(&SMALL.replace(from, to)).unwrap_err().to_string()
}

#[test]
fn the_text_is_as_documented_and_round_trips() {
    assert_eq!(OpDag::from_json(SMALL).unwrap().to_json(), SMALL);
}

#[test]
fn gpt2_round_trips_with_every_kind_it_uses() {
    for dropout in [0.0, 0.1] {
        let config = Gpt2Config { dropout, layer_norm_epsilon: 1.0 / 3.0, ..Gpt2Config::named("gpt2").unwrap() };
        let dag = gpt2(&config, 16).unwrap();
        assert_eq!(OpDag::from_json(&dag.to_json()).unwrap(), dag);
    }
}

#[test]
fn ops_may_stand_in_any_order() {
    let mut form: DagForm = serde_json::from_str(SMALL).unwrap();
    form.ops.reverse();
    let dag = OpDag::from_json(&serde_json::to_string(&form).unwrap()).unwrap();
    assert_eq!(dag, OpDag::from_json(SMALL).unwrap());
}

#[test]
fn a_cycle_lists_its_ops() {
    let message = refusal(
        r#""ids"
      ]"#,
        r#""out"
      ]"#,
    );
    assert_eq!(message, "the ops `out` -> `rows` form a cycle, expected each op to read only ops before it");
}

#[test]
fn names_that_do_not_fit_together_are_named() {
    let cases = [
        (r#"        "ids""#, r#""idle""#, "op `rows` reads `idle`, but there is no such op"),
        (r#"        "w""#, r#""v""#, "op `rows` uses parameter `v`, but there is no such parameter"),
        (r#""name": "rows""#, r#""name": "ids""#, "op `ids` is there twice, expected one op of each name"),
        ("        5,", "6,", "op `rows` (embedding): weight `w` has shape [6, 3], expected [5, 3]"),
        (r#""i32""#, r#""f32""#, "op `rows` (embedding): input is f32 [B, 4], expected i32 [B, S]"),
    ];
    for (from, to, message) in cases {
        assert_eq!(refusal(from, to), message);
    }
}

#[test]
fn a_parameter_that_is_there_twice_is_named() {
    let mut form: DagForm = serde_json::from_str(SMALL).unwrap();
    let again = ParamForm { name: "w".to_owned(), shape: vec![5, 3], init: Init::Zeros, decay: true, frozen: false };
    form.params.push(again);
    let error = OpDag::from_json(&serde_json::to_string(&form).unwrap()).unwrap_err();
    assert_eq!(error, GraphError::DuplicateParam { param: "w".to_owned() });
}

#[test]
fn a_kind_that_cannot_be_read_names_its_op() {
    let unknown = refusal(r#""op": "add""#, r#""op": "subtract""#);
    assert!(unknown.starts_with("op `out`: kind is not readable: unknown variant `subtract`, expected one of"));
    let extra = refusal(r#""op": "add""#, r#""op": "add", "p": 1"#);
    assert!(extra.starts_with("op `out`: kind is not readable: unknown field `p`"), "{extra}");
    let extra = refusal(r#""dim": 3"#, r#""dim": 3, "bias": true"#);
    assert!(extra.starts_with("op `rows`: kind is not readable: unknown field `bias`"), "{extra}");
    let missing = refusal(r#""vocab": 5,"#, "");
    assert!(missing.starts_with("op `rows`: kind is not readable: missing field `vocab`"), "{missing}");
}

#[test]
fn another_format_or_version_is_named_before_its_fields() {
    let future = r#"{"format": "fusionllm-op-dag", "version": 2, "graph": []}"#;
    let error = OpDag::from_json(future).unwrap_err();
    assert_eq!(error.to_string(), "OP-DAG version is 2, expected 1");
    let other = refusal("fusionllm-op-dag", "onnx");
    assert_eq!(other, "format is `onnx`, expected `fusionllm-op-dag`");
}

#[test]
fn texts_that_are_no_op_dag_are_refused_with_a_place() {
    for text in ["", "[]", "{", r#"{"format": 3}"#, "null"] {
        let message = OpDag::from_json(text).unwrap_err().to_string();
        assert!(message.starts_with("not an OP-DAG in JSON: ") && message.contains("line 1"), "{message}");
    }
    let message = refusal(r#""decay": true"#, r#""decay": true, "tied": true"#);
    assert!(message.contains("unknown field `tied`"), "{message}");
    for end in 0..SMALL.len() {
        assert!(OpDag::from_json(&SMALL[..end]).is_err());
    }
}
