//! How gradients of tied parameters travel before UPDATE: in pieces of some rows, so that adding up, encoding, sending
//! and receiving go on side by side and nobody holds a second table; and from a CompNode that only looks rows of the
//! table up, only those rows.

use std::ops::Range;

use fusionllm_graph::{OpDag, OpKind, ParamId};

use crate::{NodeIndex, Placement, TiedParam};

/// Elements of a piece, nearly: 2 MiB of f32.
const PIECE_ELEMENTS: usize = 1 << 19;
/// Pieces hold a multiple of so many elements, so that codecs that work on blocks give what they give of the whole.
const ALIGNMENT: usize = 64;
/// Pieces that a holder may send to another before that one takes the first.
pub const TIED_WINDOW: u32 = 8;

/// A parameter cut into pieces of whole rows, where a row is all but the first dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pieces {
    rows: usize,
    columns: usize,
    rows_per_piece: usize,
}

impl Pieces {
    /// Bytes of the largest piece, in f32; most have nearly so many.
    pub const MOST_BYTES: usize = 4 * PIECE_ELEMENTS;

    /// Of a parameter of this shape.
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

    /// Rows of the parameter.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The rows of a piece.
    pub fn rows_of(&self, piece: u32) -> Range<usize> {
        let start = (piece as usize).saturating_mul(self.rows_per_piece).min(self.rows);
        start..start.saturating_add(self.rows_per_piece).min(self.rows)
    }

    /// The elements of a piece, in the flat parameter.
    pub fn elements_of(&self, piece: u32) -> Range<usize> {
        let rows = self.rows_of(piece);
        rows.start * self.columns..rows.end * self.columns
    }

    /// Bytes that one holder's messages to another occupy at either end at the most: those that wait, the one that is
    /// worked on, and the one that is encoded or decoded.
    pub(crate) fn window_bytes(&self) -> f64 {
        let pieces = self.count().min(TIED_WINDOW + 2) as usize;
        (4 * pieces * self.rows_per_piece.min(self.rows) * self.columns) as f64
    }
}

impl Placement {
    /// Whether a holder of a tied parameter sends only the rows that the step's tokens name: it does nothing with the
    /// parameter but look rows up, and nothing is lost on the way that would have to be made up for in other rows.
    pub fn sends_rows(&self, dag: &OpDag, tied: &TiedParam, holder: NodeIndex) -> bool {
        tied.codec.is_lossless() && self.lookups(dag, tied.param, holder).is_some()
    }

    /// How many tokens of a sequence a CompNode looks up in a parameter, all its ops together; nothing if it uses the
    /// parameter in another way too.
    fn lookups(&self, dag: &OpDag, param: ParamId, node: NodeIndex) -> Option<u64> {
        let ops = self.stages_of(node).flat_map(|s| &s.ops).filter_map(|op| dag.ops().get(op.index()));
        let mut tokens = 0;
        for op in ops.filter(|op| op.params.contains(&param)) {
            let OpKind::Embedding { .. } = op.kind else { return None };
            tokens += op.inputs.iter().map(|&ids| dag.op(ids).output.shape.elements(1)).sum::<u64>();
        }
        Some(tokens)
    }

    /// The rows that a holder sends in a step at the most, if it sends only rows.
    pub(crate) fn most_rows(&self, dag: &OpDag, tied: &TiedParam, holder: NodeIndex, batch: usize) -> Option<u64> {
        let tokens = self.lookups(dag, tied.param, holder).filter(|_| tied.codec.is_lossless())?;
        let rows = Pieces::of(&dag.param(tied.param).shape).rows() as u64;
        Some((tokens * batch as u64 * u64::from(self.train.micro_batches)).min(rows))
    }
}

#[cfg(test)]
mod tests {
    use fusionllm_codec::Codec;

    use super::*;
    use crate::testing::small_gpt2;
    use crate::{Cluster, Pipeline, PlacementSpec, Strategy, place};

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
    fn only_a_holder_that_looks_rows_up_sends_rows() {
        let dag = small_gpt2(2);
        let spec = PlacementSpec {
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
        };
        let placement = place(&dag, &Cluster::uniform(2), &spec).unwrap();
        let mut tied = placement.tied[0].clone();
        let sends = |tied: &TiedParam| [0, 1].map(|n| placement.sends_rows(&dag, tied, NodeIndex(n)));
        assert_eq!(sends(&tied), [true, false]);
        let rows = |batch| placement.most_rows(&dag, &tied, NodeIndex(0), batch);
        assert_eq!((rows(1), rows(2), rows(3)), (Some(3 * 8), Some(3 * 2 * 8), Some(64)), "no more than the table has");
        tied.codec = Codec::Int4;
        assert_eq!(sends(&tied), [false, false]);
    }
}
