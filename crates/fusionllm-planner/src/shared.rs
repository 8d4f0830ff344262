//! How gradients of shared parameters travel before UPDATE: in pieces of some rows, so that adding up, encoding, sending
//! and receiving go on side by side and nobody holds a second table; and from a CompNode that only looks rows of the
//! table up, only those rows.

use std::ops::Range;

use fusionllm_graph::{DType, OpDag, OpKind, ParamId};

use crate::{NodeIndex, Placement, Shared, SharedId, Stage};

/// Elements of a piece, nearly: 2 MiB of f32.
const PIECE_ELEMENTS: usize = 1 << 19;
/// Pieces hold a multiple of so many elements, so that codecs that work on blocks give what they give of the whole.
const ALIGNMENT: usize = 64;
/// Pieces that a holder may send to another before that one takes the first.
pub const SHARED_WINDOW: u32 = 8;

/// Shared parameters cut into pieces of whole rows, where a row is all but the first dimension of one parameter, or one
/// element of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pieces {
    rows: usize,
    columns: usize,
    rows_per_piece: usize,
}

impl Pieces {
    /// Bytes of the largest piece, in f32; most have nearly so many.
    pub const MOST_BYTES: usize = 4 * PIECE_ELEMENTS;

    /// Of a tensor of this shape: [`Shared::shape`].
    pub fn of(shape: &[usize]) -> Self {
        let (rows, columns) = match shape.split_first() {
            Some((&rows, rest)) => (rows, rest.iter().product::<usize>().max(1)),
            None => (1, 1),
        };
        let rows_per_piece = (PIECE_ELEMENTS / columns / ALIGNMENT).max(1) * ALIGNMENT;
        Self { rows, columns, rows_per_piece }
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        u32::try_from(self.rows.div_ceil(self.rows_per_piece)).unwrap_or(u32::MAX)
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Rows of all pieces.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The rows of a piece.
    pub fn rows_of(&self, piece: u32) -> Range<usize> {
        let start = (piece as usize).saturating_mul(self.rows_per_piece).min(self.rows);
        start..start.saturating_add(self.rows_per_piece).min(self.rows)
    }

    /// The elements of a piece, in the vector of all.
    pub fn elements_of(&self, piece: u32) -> Range<usize> {
        let rows = self.rows_of(piece);
        rows.start * self.columns..rows.end * self.columns
    }

    /// Bytes that one holder's messages to another occupy at either end at the most: those that wait, the one that is
    /// worked on, and the one that is encoded or decoded.
    pub(crate) fn window_bytes(&self) -> f64 {
        let pieces = self.count().min(SHARED_WINDOW + 2) as usize;
        (4 * pieces * self.rows_per_piece.min(self.rows) * self.columns) as f64
    }
}

impl Shared {
    /// The shape of what is exchanged: that of the parameter, or of a vector where there are several.
    pub fn shape(&self, dag: &OpDag) -> Vec<usize> {
        match self.params[..] {
            [param] => dag.param(param).shape.clone(),
            _ => vec![usize::try_from(self.elements).unwrap_or(usize::MAX)],
        }
    }

    /// Bytes of all elements, as f32.
    pub fn bytes(&self) -> u64 {
        self.elements.saturating_mul(DType::F32.bytes() as u64)
    }

    /// Where elements `range` of the vector lie: parts of parameters, one after the other.
    pub fn parts(&self, dag: &OpDag, range: Range<usize>) -> Vec<(ParamId, Range<usize>)> {
        let mut start = 0;
        let part = |&param: &ParamId| {
            let end = start + dag.param(param).shape.iter().product::<usize>();
            let (from, to) = (range.start.max(start), range.end.min(end));
            let within = (from < to).then(|| (param, from - start..to - start));
            start = end;
            within
        };
        self.params.iter().filter_map(part).collect()
    }

    /// Its name, for people.
    pub fn name(&self, dag: &OpDag) -> String {
        let first = self.params.first().and_then(|param| dag.params().get(param.index()));
        let first = first.map_or("-", |param| param.name.as_str());
        match self.params.len() {
            0 | 1 => first.to_owned(),
            count => format!("{first} and {} more", count - 1),
        }
    }
}

impl Placement {
    /// The parameters that are shared under this number.
    pub fn shared(&self, id: SharedId) -> Option<&Shared> {
        self.shared.get(id.index())
    }

    /// The table of which a holder sends only the rows that the step's tokens name: it is the one parameter that is
    /// shared, the holder does nothing with it but look rows up, and nothing is lost on the way that would have to be made
    /// up for in other rows.
    pub fn sends_rows(&self, dag: &OpDag, shared: &Shared, holder: NodeIndex) -> Option<ParamId> {
        let [table] = shared.params[..] else { return None };
        (shared.codec.is_lossless() && self.lookups(dag, table, holder).is_some()).then_some(table)
    }

    /// By stage of a CompNode, how many tokens of a sequence it looks up in a parameter, all its ops together; nothing if
    /// the CompNode uses the parameter in another way too.
    fn lookups(&self, dag: &OpDag, param: ParamId, node: NodeIndex) -> Option<Vec<(&Stage, u64)>> {
        let of_stage = |stage: &Stage| {
            let ops = stage.ops.iter().filter_map(|op| dag.ops().get(op.index()));
            let mut tokens = 0;
            for op in ops.filter(|op| op.params.contains(&param)) {
                let OpKind::Embedding { .. } = op.kind else { return None };
                tokens += op.inputs.iter().map(|&ids| dag.op(ids).output.shape.elements(1)).sum::<u64>();
            }
            Some(tokens)
        };
        self.stages_of(node).map(|stage| Some((stage, of_stage(stage)?))).collect()
    }

    /// The rows that a holder sends in a step at the most, if it sends only rows.
    pub(crate) fn most_rows(&self, dag: &OpDag, shared: &Shared, holder: NodeIndex, batch: usize) -> Option<u64> {
        let lookups = self.lookups(dag, self.sends_rows(dag, shared, holder)?, holder)?;
        let in_step = |&(stage, tokens): &(&Stage, u64)| match tokens {
            0 => 0,
            tokens => tokens * batch as u64 * self.train.micro_batches_of(stage).len() as u64,
        };
        let rows = Pieces::of(&shared.shape(dag)).rows() as u64;
        Some(lookups.iter().map(in_step).sum::<u64>().min(rows))
    }
}

#[cfg(test)]
mod tests {
    use fusionllm_codec::Codec;

    use super::*;
    use crate::testing::small_gpt2;
    use crate::{Cluster, Pipeline, PlacementSpec, Strategy, place};

    fn spec() -> PlacementSpec {
        PlacementSpec {
            strategy: Strategy::EqualNumber,
            stages: Vec::new(),
            pipeline: Pipeline::OneFOneB,
            run_ahead: Some(0),
            deferred: Some(0),
            micro_batches: 3,
            micro_batch_size: 2,
            eval_micro_batches: 1,
            private: false,
            keep_blocks: [0; 2],
            codec: Codec::Dense,
        }
    }

    #[test]
    fn pieces_cover_a_parameter_once_and_begin_at_blocks() {
        for shape in [&[50_257, 768][..], &[3, 5], &[1 << 20], &[130, 1 << 14], &[7, 3, 1001], &[0, 8], &[]] {
            let pieces = Pieces::of(shape);
            let mut end = 0;
            for piece in 0..pieces.count() {
                let range = pieces.elements_of(piece);
                assert_eq!((range.start, range.start % ALIGNMENT), (end, 0), "{shape:?}");
                assert!(!range.is_empty());
                end = range.end;
            }
            assert_eq!(end, shape.iter().product::<usize>(), "{shape:?}");
        }
        assert_eq!(Pieces::of(&[50_257, 768]).count(), 79);
    }

    #[test]
    fn a_vector_of_several_parameters_knows_where_its_elements_lie() {
        let dag = small_gpt2(1);
        let [a, b] = ["transformer.wpe.weight", "transformer.h.0.ln_1.bias"].map(|name| dag.find_param(name).unwrap());
        let [in_a, in_b] = [a, b].map(|param| dag.param(param).elements() as usize);
        let (params, elements) = (vec![a, b], (in_a + in_b) as u64);
        let holders = vec![NodeIndex(0), NodeIndex(1)];
        let both = Shared { id: SharedId(0), params, holders, elements, codec: Codec::Dense };
        assert_eq!((both.shape(&dag), both.bytes()), (vec![in_a + in_b], 4 * elements));
        assert_eq!(both.name(&dag), "transformer.wpe.weight and 1 more");
        assert_eq!(both.parts(&dag, 0..in_a + in_b), [(a, 0..in_a), (b, 0..in_b)]);
        assert_eq!(both.parts(&dag, in_a - 3..in_a + 2), [(a, in_a - 3..in_a), (b, 0..2)]);
        assert_eq!(both.parts(&dag, in_a..in_a + 1), [(b, 0..1)]);
        assert_eq!(both.parts(&dag, 5..5), []);
        let one = Shared { params: vec![a], elements: in_a as u64, ..both };
        assert_eq!((one.shape(&dag), one.name(&dag)), (vec![16, 16], "transformer.wpe.weight".to_owned()));
    }

    /// As earlier versions have stored them: one parameter each, and no number.
    #[test]
    fn placements_of_before_are_read() {
        let dag = small_gpt2(2);
        let placement = place(&dag, &Cluster::uniform(2), &spec()).unwrap();
        let mut text = serde_json::to_value(&placement).unwrap();
        assert_eq!(serde_json::from_value::<Placement>(text.clone()).unwrap(), placement);
        let placement_of_before = text.as_object_mut().unwrap();
        let mut shared = placement_of_before.remove("shared").unwrap();
        for entry in shared.as_array_mut().unwrap() {
            let entry = entry.as_object_mut().unwrap();
            entry.remove("id");
            let params = entry.remove("params").unwrap();
            entry.insert("param".to_owned(), params[0].clone());
        }
        let second = shared[0].clone();
        shared.as_array_mut().unwrap().push(second);
        placement_of_before.insert("tied".to_owned(), shared);
        let read: Placement = serde_json::from_value(text).unwrap();
        assert_eq!(read.shared[0], placement.shared[0]);
        assert_eq!(read.shared[1], Shared { id: SharedId(1), ..placement.shared[0].clone() });
    }

    #[test]
    fn only_a_holder_that_looks_rows_up_sends_rows() {
        let dag = small_gpt2(2);
        let placement = place(&dag, &Cluster::uniform(2), &spec()).unwrap();
        let mut shared = placement.shared[0].clone();
        let sends = |shared: &Shared| [0, 1].map(|n| placement.sends_rows(&dag, shared, NodeIndex(n)).is_some());
        assert_eq!(sends(&shared), [true, false]);
        let rows = |batch| placement.most_rows(&dag, &shared, NodeIndex(0), batch);
        assert_eq!((rows(1), rows(2), rows(3)), (Some(3 * 8), Some(3 * 2 * 8), Some(64)), "no more than the table has");
        shared.codec = Codec::Int4;
        assert_eq!(sends(&shared), [false, false]);
    }
}
