//! Attention: flash kernels for the usual widths of heads, else matrix products over whole rows of scores. In tf32 the
//! flash kernels compute in f32: what they save in memory traffic is more than what tensor cores would.
//!
//! Shapes: B sequences, S positions, H heads of queries, G heads of keys and values, K columns of a head. The heads of
//! queries that a head of keys and values serves follow each other, so that of all their positions together they are one
//! matrix, [H / G · S, K].

use fusionllm_graph::OpId;
use fusionllm_protocol::Precision;

use super::super::gpu::{Element, Matrix, Product};
use super::super::kernel::{self, Flash};
use super::backward::Known;
use super::forward::launch;
use super::{Argument, Factor, Place, Planner, Step, Value, blocks, number};
use crate::ExecutorError;

/// Scores are made for so many heads at a time that they take about this many bytes.
const SCORES: usize = 256 << 20;

/// The sizes of an attention.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    seq: usize,
    /// Heads of queries; there may be fewer of keys.
    heads: usize,
    /// Of keys and values.
    kv_heads: usize,
    /// Of a head.
    width: usize,
    causal: bool,
}

impl Sizes {
    fn all_heads(self) -> usize {
        self.batch * self.heads
    }

    fn all_kv_heads(self) -> usize {
        self.batch * self.kv_heads
    }

    /// Heads of queries that a head of keys and values serves.
    fn served(self) -> usize {
        self.heads / self.kv_heads.max(1)
    }

    /// Elements of one head of all positions.
    fn head(self) -> usize {
        self.seq * self.width
    }

    /// Queries with the same keys: rows of scores.
    fn queries(self) -> usize {
        self.served() * self.seq
    }

    fn scores(self) -> usize {
        self.queries() * self.seq
    }

    fn scale(self) -> Argument {
        Argument::F32((1.0 / (self.width as f64).sqrt()) as f32)
    }

    /// Ranges of heads of keys whose scores are made at a time, as their first and their number.
    fn groups(self) -> impl Iterator<Item = (usize, usize)> {
        let each = (SCORES / (self.scores() * 4).max(1)).clamp(1, self.all_kv_heads().max(1));
        (0..self.all_kv_heads()).step_by(each).map(move |first| (first, each.min(self.all_kv_heads() - first)))
    }
}

/// Queries, keys and values, or their gradients.
#[derive(Clone, Copy, Debug)]
enum Parts {
    /// [B, S, 3, H, K].
    Packed(Place),
    /// Queries [B, S, H, K], keys and values [B, S, G, K].
    Apart([Place; 3]),
}

impl Parts {
    fn is_packed(self) -> bool {
        matches!(self, Self::Packed(_))
    }

    fn arguments(self) -> Vec<Argument> {
        let places: &[Place] = match &self {
            Self::Packed(place) => std::slice::from_ref(place),
            Self::Apart(places) => places,
        };
        places.iter().copied().map(Argument::At).collect()
    }
}

/// What BP of an attention reads.
#[derive(Clone, Copy, Debug)]
struct Made {
    inputs: Parts,
    output: Place,
    /// Log-sums of the scores, [B, H, S].
    sums: Place,
    /// The gradient of the output.
    dy: Place,
}

impl Planner<'_> {
    fn sizes(&self, op: OpId, [heads, kv_heads]: [usize; 2], causal: bool) -> Sizes {
        let (seq, Value { rows, columns, .. }) = (self.sequence(op), self.shaped(op));
        Sizes { batch: rows / seq.max(1), seq, heads, kv_heads, width: columns / heads.max(1), causal }
    }

    fn parts(&self, op: OpId) -> Result<Parts, ExecutorError> {
        let place = |index| self.input(op, index).map(|(_, value)| value.place);
        Ok(match self.spec.dag.op(op).inputs.len() {
            1 => Parts::Packed(place(0)?),
            _ => Parts::Apart([place(0)?, place(1)?, place(2)?]),
        })
    }

    /// softmax(q·kᵀ/√K + causal mask)·v, heads joined: [B, S, H·K] (Vaswani et al., section 3.2.1; Ainslie et al., arXiv
    /// 2305.13245), for `heads` of queries, and of keys and values.
    pub(super) fn attention(&mut self, op: OpId, heads: [usize; 2], causal: bool) -> Result<Value, ExecutorError> {
        let (sizes, parts) = (self.sizes(op, heads, causal), self.parts(op)?);
        let shaped = self.shaped(op);
        let value = self.output(shaped, true);
        let sums = self.spec.training.then(|| self.keep(sizes.all_heads() * sizes.seq * 4));
        if let Some(sums) = sums {
            self.kept.insert(op, [sums, sums]);
        }
        match kernel::flash(self.element, sizes.width, parts.is_packed()) {
            Some(flash) => {
                let to = [Argument::At(value.place), super::backward::or_null(sums)];
                let arguments = [parts.arguments(), to.to_vec(), flash_numbers(sizes, parts)?].concat();
                let grid = [blocks(sizes.seq, kernel::FLASH_ROWS)?, grid_heads(sizes.all_heads())?];
                self.plan.forward.push(launch(flash.forward, grid, arguments));
            }
            None => self.forward_by_products(parts, value.place, sums, sizes)?,
        }
        Ok(value)
    }

    fn forward_by_products(
        &mut self,
        parts: Parts,
        value: Place,
        sums: Option<Place>,
        sizes: Sizes,
    ) -> Result<(), ExecutorError> {
        let mut steps = Vec::new();
        let [q, k, v] = self.split_parts(&mut steps, parts, sizes)?;
        let mixed = self.temporary(sizes.all_heads() * sizes.head() * 4);
        for (first, count) in sizes.groups() {
            let scores = self.temporary(count * sizes.scores() * 4);
            let [q, mixed] = [q, mixed].map(|place| place.after(first * sizes.queries() * sizes.width * 4));
            let [k, v] = [k, v].map(|place| place.after(first * sizes.head() * 4));
            steps.push(self.batched(Kind::Scores, sizes, count, q, k, scores));
            let sums = sums.map(|sums| sums.after(first * sizes.queries() * 4));
            steps.push(softmax(scores, sums, sizes, count)?);
            steps.push(self.batched(Kind::Mix, sizes, count, scores, v, mixed));
        }
        self.join(&mut steps, mixed, value, [1, sizes.heads], sizes)?;
        self.plan.forward.extend(steps);
        Ok(())
    }

    /// BP: the scores are made anew.
    pub(super) fn attention_gradient(
        &mut self,
        op: OpId,
        dy: Value,
        heads: [usize; 2],
        causal: bool,
        known: &mut Known,
    ) -> Result<(), ExecutorError> {
        let inputs = self.spec.dag.op(op).inputs.clone();
        if !inputs.iter().any(|&input| self.spec.dag.carries_gradient(input)) {
            return Ok(());
        }
        let (sizes, value) = (self.sizes(op, heads, causal), self.value(op, op)?);
        let [sums, _] = self.kept.get(&op).copied().ok_or_else(|| self.without_gradient(op))?;
        let made = Made { inputs: self.parts(op)?, output: value.place, sums, dy: dy.place };
        let mut gradients = Vec::new();
        for &input in &inputs {
            let shaped = self.shaped(input);
            gradients.push(Value { place: self.temporary(self.bytes(&shaped)), ..shaped });
        }
        let to = match gradients[..] {
            [q, k, v] => Parts::Apart([q, k, v].map(|gradient| gradient.place)),
            _ => Parts::Packed(gradients[0].place),
        };
        match kernel::flash(self.element, sizes.width, to.is_packed()) {
            Some(flash) => self.backward_by_flash(flash, made, to, sizes)?,
            None => self.backward_by_products(made, to, sizes)?,
        }
        inputs.into_iter().zip(gradients).try_for_each(|(input, gradient)| self.pass(input, gradient, known))
    }

    fn backward_by_flash(&mut self, flash: Flash, made: Made, to: Parts, sizes: Sizes) -> Result<(), ExecutorError> {
        let rows = sizes.all_heads() * sizes.seq;
        let dot = self.temporary(rows * 4);
        let at = [made.output, made.dy, dot].map(Argument::At);
        let numbers = [number(sizes.batch)?, number(sizes.seq)?, number(sizes.heads)?].map(Argument::U32);
        let arguments = [at.as_slice(), &numbers].concat();
        self.plan.backward.push(launch(flash.dot, [blocks(rows * sizes.width, kernel::DOT_ELEMENTS)?, 1], arguments));
        let at = [made.dy, made.sums, dot].map(Argument::At).to_vec();
        let numbers = flash_numbers(sizes, to)?;
        let arguments = [made.inputs.arguments(), at, to.arguments(), numbers].concat();
        for (kernel, heads) in [(flash.kv_grad, sizes.all_kv_heads()), (flash.q_grad, sizes.all_heads())] {
            let grid = [blocks(sizes.seq, kernel::FLASH_ROWS)?, grid_heads(heads)?];
            self.plan.backward.push(launch(kernel, grid, arguments.clone()));
        }
        Ok(())
    }

    fn backward_by_products(&mut self, made: Made, to: Parts, sizes: Sizes) -> Result<(), ExecutorError> {
        let mut steps = Vec::new();
        let [q, k, v] = self.split_parts(&mut steps, made.inputs, sizes)?;
        let mixed = self.split(&mut steps, made.output, [1, sizes.heads], sizes)?;
        let d_mixed = self.split(&mut steps, made.dy, [1, sizes.heads], sizes)?;
        let rows = sizes.all_heads() * sizes.seq;
        let dot = self.temporary(rows * 4);
        let at = [mixed, d_mixed, dot].map(Argument::At);
        let numbers = [number(rows)?, number(sizes.width)?].map(Argument::U32);
        let grid = [blocks(rows, kernel::NORM_ROWS)?, 1];
        steps.push(launch(kernel::ROW_DOT, grid, [at.as_slice(), &numbers].concat()));
        let [dq, dk, dv] = self.room_for_parts(to, sizes);
        for (first, count) in sizes.groups() {
            let of_queries = |place: Place| place.after(first * sizes.queries() * sizes.width * 4);
            let of_keys = |place: Place| place.after(first * sizes.head() * 4);
            let ([q, d_out, dq], [k, v, dk, dv]) = ([q, d_mixed, dq].map(of_queries), [k, v, dk, dv].map(of_keys));
            let [scores, d_scores] = [(), ()].map(|()| self.temporary(count * sizes.scores() * 4));
            steps.push(self.batched(Kind::Scores, sizes, count, q, k, scores));
            steps.push(self.batched(Kind::Scores, sizes, count, d_out, v, d_scores));
            let [sums, dot] = [made.sums, dot].map(|place| place.after(first * sizes.queries() * 4));
            let at = [scores, d_scores, sums, dot].map(Argument::At);
            let numbers = [Argument::U32(number(sizes.seq)?), Argument::U32(u32::from(sizes.causal)), sizes.scale()];
            let grid = [number(count * sizes.queries())?, 1];
            steps.push(launch(kernel::SOFTMAX_GRAD, grid, [at.as_slice(), &numbers].concat()));
            steps.push(self.batched(Kind::MixTransposed, sizes, count, scores, d_out, dv));
            steps.push(self.batched(Kind::Mix, sizes, count, d_scores, k, dq));
            steps.push(self.batched(Kind::MixTransposed, sizes, count, d_scores, q, dk));
        }
        match to {
            Parts::Packed(to) => self.join(&mut steps, dq, to, [3, sizes.heads], sizes)?,
            Parts::Apart([to_q, to_k, to_v]) => {
                self.join(&mut steps, dq, to_q, [1, sizes.heads], sizes)?;
                self.join(&mut steps, dk, to_k, [1, sizes.kv_heads], sizes)?;
                self.join(&mut steps, dv, to_v, [1, sizes.kv_heads], sizes)?;
            }
        }
        self.plan.backward.extend(steps);
        Ok(())
    }

    /// Queries [B·H, S, K], keys and values [B·G, S, K] in f32.
    fn split_parts(&mut self, steps: &mut Vec<Step>, parts: Parts, sizes: Sizes) -> Result<[Place; 3], ExecutorError> {
        let (heads, kv_heads) = ([1, sizes.heads], [1, sizes.kv_heads]);
        match parts {
            Parts::Packed(from) => {
                let all = self.split(steps, from, [3, sizes.heads], sizes)?;
                Ok([0, 1, 2].map(|index| all.after(index * sizes.all_heads() * sizes.head() * 4)))
            }
            Parts::Apart([q, k, v]) => Ok([
                self.split(steps, q, heads, sizes)?,
                self.split(steps, k, kv_heads, sizes)?,
                self.split(steps, v, kv_heads, sizes)?,
            ]),
        }
    }

    /// Room for gradients that lie as [`Self::split_parts`] gives tensors.
    fn room_for_parts(&mut self, parts: Parts, sizes: Sizes) -> [Place; 3] {
        let bytes = |heads: usize| heads * sizes.head() * 4;
        if parts.is_packed() {
            let all = self.temporary(3 * bytes(sizes.all_heads()));
            return [0, 1, 2].map(|index| all.after(index * bytes(sizes.all_heads())));
        }
        [sizes.all_heads(), sizes.all_kv_heads(), sizes.all_kv_heads()].map(|heads| self.temporary(bytes(heads)))
    }

    /// [B, S, parts, heads, K] → [parts, B·heads, S, K] in f32.
    fn split(
        &mut self,
        steps: &mut Vec<Step>,
        from: Place,
        [parts, heads]: [usize; 2],
        sizes: Sizes,
    ) -> Result<Place, ExecutorError> {
        let count = parts * sizes.batch * heads * sizes.head();
        let to = self.temporary(count * 4);
        let from = match self.element {
            Element::F32 => from,
            Element::Bf16 => {
                let wide = self.temporary(count * 4);
                steps.push(over(kernel::CAST_BF16_F32, from, wide, count)?);
                wide
            }
        };
        steps.push(reordered(kernel::TO_HEADS, from, to, [parts, heads], sizes)?);
        Ok(to)
    }

    /// The inverse of [`Self::split`].
    fn join(
        &mut self,
        steps: &mut Vec<Step>,
        from: Place,
        to: Place,
        [parts, heads]: [usize; 2],
        sizes: Sizes,
    ) -> Result<(), ExecutorError> {
        let count = parts * sizes.batch * heads * sizes.head();
        match self.element {
            Element::F32 => steps.push(reordered(kernel::FROM_HEADS, from, to, [parts, heads], sizes)?),
            Element::Bf16 => {
                let wide = self.temporary(count * 4);
                steps.push(reordered(kernel::FROM_HEADS, from, wide, [parts, heads], sizes)?);
                steps.push(over(kernel::CAST_F32_BF16, wide, to, count)?);
            }
        }
        Ok(())
    }

    /// One product a head of keys, of `count` heads.
    fn batched(&self, kind: Kind, sizes: Sizes, count: usize, a: Place, b: Place, d: Place) -> Step {
        let (Sizes { seq, width, .. }, rows) = (sizes, sizes.queries());
        let scores = Matrix::new(Element::F32, seq).every(sizes.scores());
        let [queries, keys] = [rows, seq].map(|rows| Matrix::new(Element::F32, width).every(rows * width));
        let ([m, n, k], of_a, of_b, of_d) = match kind {
            Kind::Scores => ([rows, seq, width], queries, keys.transposed(), scores),
            Kind::Mix => ([rows, width, seq], scores, keys, queries),
            Kind::MixTransposed => ([seq, width, rows], scores.transposed(), queries, keys),
        };
        let tf32 = self.spec.precision != Precision::F32;
        let product = Product { m, n, k, a: of_a, b: of_b, d: of_d, batch: count, tf32, adds: false, bias: false };
        Step::Multiply { product, a, b, c: None, d, bias: None, alpha: Factor::Fixed(1.0) }
    }
}

/// The products of attention, of Q queries with S keys: Q = H / G · S.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// a [Q, K] · bᵀ [K, S].
    Scores,
    /// a [Q, S] · b [S, K].
    Mix,
    /// aᵀ [S, Q] · b [Q, K].
    MixTransposed,
}

/// The second dimension of a grid, which NVIDIA bounds.
fn grid_heads(heads: usize) -> Result<u32, ExecutorError> {
    u16::try_from(heads).map(u32::from).map_err(|_| ExecutorError::Device {
        reason: format!("{heads} heads of all sequences are more than the GPU's attention takes at once (65,535): take smaller micro-batches"),
    })
}

fn flash_numbers(sizes: Sizes, parts: Parts) -> Result<Vec<Argument>, ExecutorError> {
    let mut counts = vec![sizes.batch, sizes.seq, sizes.heads];
    if !parts.is_packed() {
        counts.push(sizes.kv_heads);
    }
    let mut numbers: Vec<Argument> =
        counts.into_iter().map(|count| number(count).map(Argument::U32)).collect::<Result<_, _>>()?;
    numbers.extend([Argument::U32(u32::from(sizes.causal)), sizes.scale()]);
    Ok(numbers)
}

fn softmax(scores: Place, sums: Option<Place>, sizes: Sizes, count: usize) -> Result<Step, ExecutorError> {
    let at = [Argument::At(scores), super::backward::or_null(sums)];
    let numbers = [Argument::U32(number(sizes.seq)?), Argument::U32(u32::from(sizes.causal)), sizes.scale()];
    Ok(launch(kernel::SOFTMAX, [number(count * sizes.queries())?, 1], [at.as_slice(), &numbers].concat()))
}

fn over(kernel: super::Kernel, from: Place, to: Place, count: usize) -> Result<Step, ExecutorError> {
    let arguments = vec![Argument::At(from), Argument::At(to), Argument::U32(number(count)?)];
    Ok(launch(kernel, [blocks(count, kernel::CAST_ELEMENTS)?, 1], arguments))
}

fn reordered(
    kernel: super::Kernel,
    from: Place,
    to: Place,
    [parts, heads]: [usize; 2],
    sizes: Sizes,
) -> Result<Step, ExecutorError> {
    let numbers = [sizes.batch, sizes.seq, parts, heads, sizes.width];
    let mut arguments = vec![Argument::At(from), Argument::At(to)];
    for count in numbers {
        arguments.push(Argument::U32(number(count)?));
    }
    let count = parts * sizes.batch * heads * sizes.head();
    Ok(launch(kernel, [blocks(count, kernel::HEAD_ELEMENTS)?, 1], arguments))
}
