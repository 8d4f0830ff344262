//! Attention: flash kernels for the usual widths of heads, else matrix products over whole rows of scores. In tf32 the
//! flash kernels compute in f32: what they save in memory traffic is more than what tensor cores would.

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
    heads: usize,
    /// Of a head.
    width: usize,
    causal: bool,
}

impl Sizes {
    fn all_heads(self) -> usize {
        self.batch * self.heads
    }

    /// Elements of one head of all positions.
    fn head(self) -> usize {
        self.seq * self.width
    }

    fn scores(self) -> usize {
        self.seq * self.seq
    }

    fn scale(self) -> Argument {
        Argument::F32((1.0 / (self.width as f64).sqrt()) as f32)
    }

    /// Ranges of heads whose scores are made at a time, as their first and their number.
    fn groups(self) -> impl Iterator<Item = (usize, usize)> {
        let each = (SCORES / (self.scores() * 4).max(1)).clamp(1, self.all_heads().max(1));
        (0..self.all_heads()).step_by(each).map(move |first| (first, each.min(self.all_heads() - first)))
    }
}

impl Planner<'_> {
    fn sizes(&self, input: OpId, qkv: &Value, heads: usize, causal: bool) -> Sizes {
        let seq = self.sequence(input);
        Sizes { batch: qkv.rows / seq.max(1), seq, heads, width: qkv.columns / 3 / heads.max(1), causal }
    }

    /// qkv [B, S, 3·D] → softmax(q·kᵀ/√K + causal mask)·v, heads joined: [B, S, D] (Vaswani et al., section 3.2.1).
    pub(super) fn attention(&mut self, op: OpId, heads: usize, causal: bool) -> Result<Value, ExecutorError> {
        let (input, qkv) = self.input(op, 0)?;
        let sizes = self.sizes(input, &qkv, heads, causal);
        let shaped = self.shaped(op);
        let value = self.output(shaped, true);
        let sums = self.spec.training.then(|| self.keep(sizes.all_heads() * sizes.seq * 4));
        if let Some(sums) = sums {
            self.kept.insert(op, [sums, sums]);
        }
        match kernel::flash(self.element, sizes.width) {
            Some(flash) => {
                let at = [Argument::At(qkv.place), Argument::At(value.place), super::backward::or_null(sums)];
                let arguments = [at.as_slice(), &flash_numbers(sizes)?].concat();
                let grid = [blocks(sizes.seq, kernel::FLASH_ROWS)?, grid_heads(sizes)?];
                self.plan.forward.push(launch(flash.forward, grid, arguments));
            }
            None => self.forward_by_products(&qkv, &value, sums, sizes)?,
        }
        Ok(value)
    }

    fn forward_by_products(
        &mut self,
        qkv: &Value,
        value: &Value,
        sums: Option<Place>,
        sizes: Sizes,
    ) -> Result<(), ExecutorError> {
        let mut steps = Vec::new();
        let packed = self.split(&mut steps, qkv.place, 3, sizes)?;
        let mixed = self.temporary(sizes.all_heads() * sizes.head() * 4);
        let part = sizes.all_heads() * sizes.head() * 4;
        for (first, count) in sizes.groups() {
            let scores = self.temporary(count * sizes.scores() * 4);
            let [q, k, v] = [0, 1, 2].map(|index| packed.after(index * part + first * sizes.head() * 4));
            steps.push(self.batched(Kind::Scores, sizes, count, q, k, scores));
            let sums = sums.map(|sums| sums.after(first * sizes.seq * 4));
            steps.push(softmax(scores, sums, sizes, count)?);
            steps.push(self.batched(Kind::Mix, sizes, count, scores, v, mixed.after(first * sizes.head() * 4)));
        }
        self.join(&mut steps, mixed, value.place, 1, sizes)?;
        self.plan.forward.extend(steps);
        Ok(())
    }

    /// BP: the scores are made anew.
    pub(super) fn attention_gradient(
        &mut self,
        op: OpId,
        dy: Value,
        heads: usize,
        causal: bool,
        known: &mut Known,
    ) -> Result<(), ExecutorError> {
        let (input, qkv) = self.input(op, 0)?;
        if !self.spec.dag.carries_gradient(input) {
            return Ok(());
        }
        let sizes = self.sizes(input, &qkv, heads, causal);
        let (value, [sums, _]) =
            (self.value(op, op)?, self.kept.get(&op).copied().ok_or_else(|| self.without_gradient(op))?);
        let shaped = self.shaped(input);
        let dx = Value { place: self.temporary(self.bytes(&shaped)), ..shaped };
        match kernel::flash(self.element, sizes.width) {
            Some(flash) => self.backward_by_flash(flash, [qkv, value, dy, dx], sums, sizes)?,
            None => self.backward_by_products([qkv, value, dy, dx], sums, sizes)?,
        }
        self.pass(input, dx, known)
    }

    fn backward_by_flash(
        &mut self,
        flash: Flash,
        [qkv, value, dy, dx]: [Value; 4],
        sums: Place,
        sizes: Sizes,
    ) -> Result<(), ExecutorError> {
        let rows = sizes.all_heads() * sizes.seq;
        let dot = self.temporary(rows * 4);
        let at = [value.place, dy.place, dot].map(Argument::At);
        let numbers = [number(sizes.batch)?, number(sizes.seq)?, number(sizes.heads)?].map(Argument::U32);
        let arguments = [at.as_slice(), &numbers].concat();
        self.plan.backward.push(launch(flash.dot, [blocks(rows * sizes.width, kernel::DOT_ELEMENTS)?, 1], arguments));
        let at = [qkv.place, dy.place, sums, dot, dx.place].map(Argument::At);
        let arguments = [at.as_slice(), &flash_numbers(sizes)?].concat();
        for kernel in [flash.kv_grad, flash.q_grad] {
            let grid = [blocks(sizes.seq, kernel::FLASH_ROWS)?, grid_heads(sizes)?];
            self.plan.backward.push(launch(kernel, grid, arguments.clone()));
        }
        Ok(())
    }

    fn backward_by_products(
        &mut self,
        [qkv, value, dy, dx]: [Value; 4],
        sums: Place,
        sizes: Sizes,
    ) -> Result<(), ExecutorError> {
        let mut steps = Vec::new();
        let part = sizes.all_heads() * sizes.head() * 4;
        let packed = self.split(&mut steps, qkv.place, 3, sizes)?;
        let mixed = self.split(&mut steps, value.place, 1, sizes)?;
        let d_mixed = self.split(&mut steps, dy.place, 1, sizes)?;
        let rows = sizes.all_heads() * sizes.seq;
        let dot = self.temporary(rows * 4);
        let at = [mixed, d_mixed, dot].map(Argument::At);
        let numbers = [number(rows)?, number(sizes.width)?].map(Argument::U32);
        let grid = [blocks(rows, kernel::NORM_ROWS)?, 1];
        steps.push(launch(kernel::ROW_DOT.of(Element::F32), grid, [at.as_slice(), &numbers].concat()));
        let d_packed = self.temporary(3 * part);
        for (first, count) in sizes.groups() {
            let at_head = |place: Place, index: usize| place.after(index * part + first * sizes.head() * 4);
            let [q, k, v] = [0, 1, 2].map(|index| at_head(packed, index));
            let [dq, dk, dv] = [0, 1, 2].map(|index| at_head(d_packed, index));
            let d_out = at_head(d_mixed, 0);
            let [scores, d_scores] = [(), ()].map(|()| self.temporary(count * sizes.scores() * 4));
            steps.push(self.batched(Kind::Scores, sizes, count, q, k, scores));
            steps.push(self.batched(Kind::Scores, sizes, count, d_out, v, d_scores));
            let [sums, dot] = [sums, dot].map(|place| place.after(first * sizes.seq * 4));
            let at = [scores, d_scores, sums, dot].map(Argument::At);
            let numbers = [Argument::U32(number(sizes.seq)?), Argument::U32(u32::from(sizes.causal)), sizes.scale()];
            let grid = [number(count * sizes.seq)?, 1];
            steps.push(launch(kernel::SOFTMAX_GRAD, grid, [at.as_slice(), &numbers].concat()));
            steps.push(self.batched(Kind::MixTransposed, sizes, count, scores, d_out, dv));
            steps.push(self.batched(Kind::Mix, sizes, count, d_scores, k, dq));
            steps.push(self.batched(Kind::MixTransposed, sizes, count, d_scores, q, dk));
        }
        self.join(&mut steps, d_packed, dx.place, 3, sizes)?;
        self.plan.backward.extend(steps);
        Ok(())
    }

    /// [B, S, parts, H, K] → [parts, B·H, S, K] in f32.
    fn split(
        &mut self,
        steps: &mut Vec<Step>,
        from: Place,
        parts: usize,
        sizes: Sizes,
    ) -> Result<Place, ExecutorError> {
        let count = parts * sizes.all_heads() * sizes.head();
        let to = self.temporary(count * 4);
        let from = match self.element {
            Element::F32 => from,
            Element::Bf16 => {
                let wide = self.temporary(count * 4);
                steps.push(over(kernel::CAST_BF16_F32, from, wide, count)?);
                wide
            }
        };
        steps.push(reordered(kernel::TO_HEADS, from, to, parts, sizes)?);
        Ok(to)
    }

    /// The inverse of [`Self::split`].
    fn join(
        &mut self,
        steps: &mut Vec<Step>,
        from: Place,
        to: Place,
        parts: usize,
        sizes: Sizes,
    ) -> Result<(), ExecutorError> {
        let count = parts * sizes.all_heads() * sizes.head();
        match self.element {
            Element::F32 => steps.push(reordered(kernel::FROM_HEADS, from, to, parts, sizes)?),
            Element::Bf16 => {
                let wide = self.temporary(count * 4);
                steps.push(reordered(kernel::FROM_HEADS, from, wide, parts, sizes)?);
                steps.push(over(kernel::CAST_F32_BF16, wide, to, count)?);
            }
        }
        Ok(())
    }

    /// One product a head, of `count` heads.
    fn batched(&self, kind: Kind, sizes: Sizes, count: usize, a: Place, b: Place, d: Place) -> Step {
        let Sizes { seq, width, .. } = sizes;
        let scores = Matrix::new(Element::F32, seq).every(sizes.scores());
        let head = Matrix::new(Element::F32, width).every(sizes.head());
        let ([m, n, k], of_a, of_b, of_d) = match kind {
            Kind::Scores => ([seq, seq, width], head, head.transposed(), scores),
            Kind::Mix => ([seq, width, seq], scores, head, head),
            Kind::MixTransposed => ([seq, width, seq], scores.transposed(), head, head),
        };
        let tf32 = self.spec.precision != Precision::F32;
        let product = Product { m, n, k, a: of_a, b: of_b, d: of_d, batch: count, tf32, adds: false, bias: false };
        Step::Multiply { product, a, b, c: None, d, bias: None, alpha: Factor::Fixed(1.0) }
    }
}

/// The products of attention.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// a [S, K] · bᵀ [K, S].
    Scores,
    /// a [S, S] · b [S, K].
    Mix,
    /// aᵀ [S, S] · b [S, K].
    MixTransposed,
}

/// The second dimension of a grid, which NVIDIA bounds.
fn grid_heads(sizes: Sizes) -> Result<u32, ExecutorError> {
    u16::try_from(sizes.all_heads()).map(u32::from).map_err(|_| ExecutorError::Device {
        reason: format!("{} sequences of {} heads are more than the GPU's attention takes at once (65,535 in all): take smaller micro-batches", sizes.batch, sizes.heads),
    })
}

fn flash_numbers(sizes: Sizes) -> Result<Vec<Argument>, ExecutorError> {
    let numbers = [number(sizes.batch)?, number(sizes.seq)?, number(sizes.heads)?, u32::from(sizes.causal)];
    Ok(numbers.map(Argument::U32).into_iter().chain([sizes.scale()]).collect())
}

fn softmax(scores: Place, sums: Option<Place>, sizes: Sizes, count: usize) -> Result<Step, ExecutorError> {
    let at = [Argument::At(scores), super::backward::or_null(sums)];
    let numbers = [Argument::U32(number(sizes.seq)?), Argument::U32(u32::from(sizes.causal)), sizes.scale()];
    Ok(launch(kernel::SOFTMAX, [number(count * sizes.seq)?, 1], [at.as_slice(), &numbers].concat()))
}

fn over(kernel: super::Kernel, from: Place, to: Place, count: usize) -> Result<Step, ExecutorError> {
    let arguments = vec![Argument::At(from), Argument::At(to), Argument::U32(number(count)?)];
    Ok(launch(kernel, [blocks(count, kernel::CAST_ELEMENTS)?, 1], arguments))
}

fn reordered(
    kernel: kernel::OfElement,
    from: Place,
    to: Place,
    parts: usize,
    sizes: Sizes,
) -> Result<Step, ExecutorError> {
    let numbers = [sizes.batch, sizes.seq, parts, sizes.heads, sizes.width];
    let mut arguments = vec![Argument::At(from), Argument::At(to)];
    for count in numbers {
        arguments.push(Argument::U32(number(count)?));
    }
    let count = parts * sizes.all_heads() * sizes.head();
    Ok(launch(kernel.of(Element::F32), [blocks(count, kernel::HEAD_ELEMENTS)?, 1], arguments))
}
