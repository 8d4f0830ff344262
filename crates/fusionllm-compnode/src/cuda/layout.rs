//! Where the parameters lie: one after the other in one piece of memory, and so their gradients and optimizer state.

use std::collections::BTreeMap;

use fusionllm_graph::{OpDag, ParamId};

/// Parameters start at multiples of so many elements: what a block of the optimizer's kernels covers.
pub(super) const CHUNK: usize = 1024;
/// Weight decay is told for so many elements at once.
pub(super) const DECAY_ELEMENTS: usize = 256;
/// Rows of a matrix are filled up to a multiple of this with zeros that stay zero: matrix products want it so.
const ROWS: usize = 64;

/// The parameters of one executor, in the order of their numbers.
#[derive(Debug, Default)]
pub(super) struct Layout {
    params: BTreeMap<ParamId, Extent>,
    elements: usize,
}

/// The elements of a parameter, and those that it takes with what fills it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) start: usize,
    pub(super) elements: usize,
    pub(super) taken: usize,
}

impl Extent {
    /// Its chunks, as numbers from the start of all parameters.
    pub(super) fn chunks(self) -> std::ops::Range<usize> {
        self.start / CHUNK..(self.start + self.taken) / CHUNK
    }
}

impl Layout {
    pub(super) fn new(dag: &OpDag, held: impl IntoIterator<Item = ParamId>) -> Self {
        let mut layout = Self::default();
        for id in held {
            let shape = &dag.param(id).shape;
            let elements: usize = shape.iter().product();
            let filled = match shape.as_slice() {
                [rows, rest @ ..] if !rest.is_empty() => rows.next_multiple_of(ROWS) * rest.iter().product::<usize>(),
                _ => elements,
            };
            let extent = Extent { start: layout.elements, elements, taken: filled.next_multiple_of(CHUNK) };
            layout.elements += extent.taken;
            layout.params.insert(id, extent);
        }
        layout
    }

    /// Elements of all, a multiple of [`CHUNK`].
    pub(super) fn elements(&self) -> usize {
        self.elements
    }

    pub(super) fn get(&self, param: ParamId) -> Option<Extent> {
        self.params.get(&param).copied()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (ParamId, Extent)> {
        self.params.iter().map(|(&id, &extent)| (id, extent))
    }

    /// A byte for each [`DECAY_ELEMENTS`]: whether weight decay applies to them.
    pub(super) fn decay(&self, dag: &OpDag) -> Vec<u8> {
        let of = |(id, extent): (ParamId, Extent)| {
            std::iter::repeat_n(u8::from(dag.param(id).decay), extent.taken / DECAY_ELEMENTS)
        };
        self.iter().flat_map(of).collect()
    }
}

/// Rows of a matrix with what fills it up.
pub(super) fn filled_rows(rows: usize) -> usize {
    rows.next_multiple_of(ROWS)
}

#[cfg(test)]
mod tests {
    use fusionllm_graph::{Gpt2Config, gpt2};

    use super::*;

    #[test]
    fn parameters_do_not_overlap_and_start_at_chunks() {
        let mut config = Gpt2Config::named("gpt2").unwrap();
        (config.n_layer, config.n_embd, config.n_head, config.vocab_size) = (1, 24, 2, 97);
        let dag = gpt2(&config, 16).unwrap();
        let layout = Layout::new(&dag, dag.param_ids());
        let mut end = 0;
        for (id, extent) in layout.iter() {
            assert_eq!((extent.start, extent.start % CHUNK), (end, 0));
            assert!(extent.elements <= extent.taken);
            assert_eq!(extent.elements, dag.param(id).shape.iter().product::<usize>());
            end += extent.taken;
        }
        assert_eq!(end, layout.elements());
        let table = layout.get(dag.find_param("transformer.wte.weight").unwrap()).unwrap();
        assert!(table.taken >= 128 * 24, "97 rows are filled up to 128");
        assert_eq!(layout.decay(&dag).len(), end / DECAY_ELEMENTS);
    }
}
