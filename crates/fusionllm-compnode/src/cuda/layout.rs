//! Where the parameters lie: one after the other in one piece of memory, and so their gradients and optimizer state. Those
//! that are trained come first, since the others have neither.

use std::collections::BTreeMap;

use fusionllm_graph::{OpDag, ParamId};

/// Parameters start at multiples of so many elements: what a block of the optimizer's kernels covers.
pub(super) const CHUNK: usize = 1024;
/// Weight decay is told for so many elements at once.
pub(super) const DECAY_ELEMENTS: usize = 256;
/// Rows of a matrix are filled up to a multiple of this with zeros that stay zero: matrix products want it so.
const ROWS: usize = 64;

/// The parameters of one executor: those that are trained, then those that are not, each in the order of their numbers.
#[derive(Debug, Default)]
pub(super) struct Layout {
    params: BTreeMap<ParamId, Extent>,
    order: Vec<ParamId>,
    elements: usize,
    trained: usize,
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
        let (frozen, trained): (Vec<ParamId>, Vec<ParamId>) = held.into_iter().partition(|&id| dag.param(id).frozen);
        for id in trained.into_iter().chain(frozen) {
            let shape = &dag.param(id).shape;
            let elements: usize = shape.iter().product();
            let filled = match shape.as_slice() {
                [rows, rest @ ..] if !rest.is_empty() => rows.next_multiple_of(ROWS) * rest.iter().product::<usize>(),
                _ => elements,
            };
            let extent = Extent { start: layout.elements, elements, taken: filled.next_multiple_of(CHUNK) };
            layout.elements += extent.taken;
            layout.trained += if dag.param(id).frozen { 0 } else { extent.taken };
            layout.params.insert(id, extent);
            layout.order.push(id);
        }
        layout
    }

    /// Elements of all, a multiple of [`CHUNK`].
    pub(super) fn elements(&self) -> usize {
        self.elements
    }

    /// Elements of those that are trained, a multiple of [`CHUNK`]: the first ones.
    pub(super) fn trained_elements(&self) -> usize {
        self.trained
    }

    pub(super) fn get(&self, param: ParamId) -> Option<Extent> {
        self.params.get(&param).copied()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (ParamId, Extent)> {
        self.order.iter().filter_map(|&id| Some((id, self.get(id)?)))
    }

    /// Those that are trained.
    pub(super) fn trained(&self) -> impl Iterator<Item = (ParamId, Extent)> {
        self.iter().filter(|(_, extent)| extent.start < self.trained)
    }

    /// A byte for each [`DECAY_ELEMENTS`] of those that are trained: whether weight decay applies to them.
    pub(super) fn decay(&self, dag: &OpDag) -> Vec<u8> {
        let of = |(id, extent): (ParamId, Extent)| {
            std::iter::repeat_n(u8::from(dag.param(id).decay), extent.taken / DECAY_ELEMENTS)
        };
        self.trained().flat_map(of).collect()
    }
}

/// Rows of a matrix with what fills it up.
pub(super) fn filled_rows(rows: usize) -> usize {
    rows.next_multiple_of(ROWS)
}

#[cfg(test)]
mod tests {
    use fusionllm_graph::{Gpt2Config, Lora, gpt2};

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
        assert_eq!((layout.trained_elements(), layout.trained().count()), (end, dag.params().len()));

        let lora = Lora { rank: 2, scaling: 1.0, dropout: 0.0, targets: vec!["c_attn".to_owned()] };
        let dag = dag.with_lora(&lora).unwrap();
        let layout = Layout::new(&dag, dag.param_ids());
        let (a, b) = (2 * 64 * 24 / 2, 128 * 2);
        let taken = |elements: usize| elements.next_multiple_of(CHUNK);
        assert_eq!(layout.trained_elements(), taken(a) + taken(b));
        assert_eq!(layout.elements(), layout.trained_elements() + end);
        assert!(layout.trained().all(|(id, _)| !dag.param(id).frozen) && layout.trained().count() == 2);
        assert_eq!(layout.decay(&dag).len(), layout.trained_elements() / DECAY_ELEMENTS);
    }
}
