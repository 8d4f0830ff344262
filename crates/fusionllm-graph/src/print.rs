//! An OP-DAG for people: a table, and Graphviz.

use std::fmt::Write as _;

use crate::dag::{OpDag, OpId};

const HEADS: [&str; COLUMNS] =
    ["name", "op", "class", "output", "params", "FP FLOP", "BP FLOP", "output bytes", "kept bytes"];
const COLUMNS: usize = 9;
/// The columns before this one are words and stand left, the others are counts and stand right.
const FIRST_COUNT: usize = 4;

impl OpDag {
    /// A table with a line per op and a line of totals, for micro-batches of `batch` rows. Counts are rounded to
    /// three digits with the decimal suffixes k, M, G, T, P, E. The total of the parameters counts a tied one once.
    pub fn table(&self, batch: usize) -> String {
        let mut rows = vec![HEADS.map(str::to_owned)];
        rows.extend(self.op_ids().map(|op| self.row(op, batch)));
        rows.push(self.total_row(batch));
        let mut widths = [0; COLUMNS];
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for row in &rows {
            let cells = row.iter().zip(widths).enumerate().map(|(column, (cell, width))| {
                if column < FIRST_COUNT { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
        }
        text
    }

    /// The OP-DAG in Graphviz's language: a node per op, an edge per tensor labelled with its type.
    pub fn to_dot(&self) -> String {
        let mut text = format!("digraph {} {{\n  node [shape=box];\n", quoted(self.name()));
        for (op, id) in self.ops().iter().zip(self.op_ids()) {
            let label = quoted(&format!("{}\n{}", op.name, op.kind.family()));
            let _ = writeln!(text, "  n{id} [label={label}];");
        }
        for id in self.op_ids() {
            let label = quoted(&self.op(id).output.to_string());
            for consumer in self.consumers(id) {
                let _ = writeln!(text, "  n{id} -> n{consumer} [label={label}];");
            }
        }
        text.push_str("}\n");
        text
    }

    fn row(&self, id: OpId, batch: usize) -> [String; COLUMNS] {
        let op = self.op(id);
        let cost = self.cost(id, batch);
        let params = op.params.iter().map(|&param| self.param(param).elements()).fold(0, u64::saturating_add);
        [
            op.name.clone(),
            op.kind.family().to_owned(),
            op.kind.class().name().to_owned(),
            op.output.to_string(),
            rounded(params),
            rounded(cost.fp_flops),
            rounded(cost.bp_flops),
            rounded(op.output.bytes(batch)),
            rounded(cost.kept_bytes),
        ]
    }

    fn total_row(&self, batch: usize) -> [String; COLUMNS] {
        let cost = self.total_cost(batch);
        let output_bytes = self.ops().iter().map(|op| op.output.bytes(batch)).fold(0, u64::saturating_add);
        let words = ["total", "", "", ""].map(str::to_owned);
        let counts = [self.param_elements(), cost.fp_flops, cost.bp_flops, output_bytes, cost.kept_bytes].map(rounded);
        let [name, op, class, output] = words;
        let [params, fp, bp, out, kept] = counts;
        [name, op, class, output, params, fp, bp, out, kept]
    }
}

/// Three digits and a decimal suffix.
fn rounded(count: u64) -> String {
    let mut value = count as f64;
    let mut suffixes = ["", "k", "M", "G", "T", "P", "E"].into_iter().peekable();
    while value >= 999.5 && suffixes.len() > 1 {
        value /= 1000.0;
        suffixes.next();
    }
    let suffix = suffixes.next().unwrap_or_default();
    match value {
        _ if suffix.is_empty() => count.to_string(),
        ..9.995 => format!("{value:.2}{suffix}"),
        ..99.95 => format!("{value:.1}{suffix}"),
        _ => format!("{value:.0}{suffix}"),
    }
}

fn quoted(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("\"{escaped}\"")
}

#[cfg(test)]
mod tests {
    use crate::{DType, DagBuilder, Init, OpKind, Param, Shape};

    use super::*;

    fn small() -> OpDag {
        let mut builder = DagBuilder::new("a \"small\" one");
        let input = OpKind::Input { dtype: DType::I32, shape: Shape::batched(&[4]) };
        let ids = builder.op("ids", input, &[], &[]).unwrap();
        let weight = Param { name: "w".to_owned(), shape: vec![500, 3], init: Init::Zeros, decay: true, frozen: false };
        let weight = builder.param(weight).unwrap();
        let rows = builder.op("rows", OpKind::Embedding { vocab: 500, dim: 3 }, &[ids], &[weight]).unwrap();
        builder.op("sum", OpKind::Add, &[rows, rows], &[]).unwrap();
        builder.build().unwrap()
    }

    #[test]
    fn the_table_lines_up() {
        let expected = "\
name   op         class           output         params  FP FLOP  BP FLOP  output bytes  kept bytes
ids    input      placeholder     i32 [B, 4]          0        0        0            32           0
rows   embedding  parameter       f32 [B, 4, 3]   1.50k        0       24            96          32
sum    add        parameter-free  f32 [B, 4, 3]       0       24        0            96           0
total                                             1.50k       24       24           224          32
";
        assert_eq!(small().table(2), expected);
    }

    #[test]
    fn dot_has_a_node_per_op_and_an_edge_per_reader() {
        let expected = r#"digraph "a \"small\" one" {
  node [shape=box];
  n0 [label="ids\ninput"];
  n1 [label="rows\nembedding"];
  n2 [label="sum\nadd"];
  n0 -> n1 [label="i32 [B, 4]"];
  n1 -> n2 [label="f32 [B, 4, 3]"];
}
"#;
        assert_eq!(small().to_dot(), expected);
    }

    #[test]
    fn counts_are_rounded_to_three_digits() {
        let cases = [
            (0, "0"),
            (999, "999"),
            (1000, "1.00k"),
            (9_996, "10.0k"),
            (99_960, "100k"),
            (999_600, "1.00M"),
            (124_439_808, "124M"),
            (u64::MAX, "18.4E"),
        ];
        for (count, expected) in cases {
            assert_eq!(rounded(count), expected);
        }
    }
}
