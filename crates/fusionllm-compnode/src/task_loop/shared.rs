//! Gradients of parameters that several CompNodes hold.
//!
//! They travel in pieces: a holder adds the others' pieces to its own gradient where that lies, and sends a piece more
//! for each that it has added. A holder that only looks rows up first says which rows, and then sends those of each
//! piece that has any.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use fusionllm_codec::{Codec, ElementType, HostTensor, Values};
use fusionllm_graph::ParamId;
use fusionllm_planner::{NodeIndex, Pieces, SHARED_WINDOW, Shared, SharedId};
use fusionllm_protocol::{Channel, Pass};

use super::{TaskLoop, internal};
use crate::border::BorderTensor;
use crate::exchange::Message;
use crate::mailbox::Slot;
use crate::{CompNodeError, ExecutorError};

/// What the codecs of shared gradients held back here, to be added in the next step. Without it the errors of quantized
/// gradients would add up in the parameters.
#[derive(Debug, Default)]
pub(super) struct Feedback {
    residuals: BTreeMap<SharedId, Vec<f32>>,
}

impl Feedback {
    /// What is held back, for a checkpoint.
    fn residuals(&self) -> impl Iterator<Item = (SharedId, &[f32])> {
        self.residuals.iter().map(|(&id, residual)| (id, residual.as_slice()))
    }

    /// Puts back what was held back at a checkpoint; one that does not fit the parameters is as good as none.
    fn restore(&mut self, id: SharedId, elements: u64, residual: HostTensor) {
        if let (_, Values::F32(values)) = residual.into_parts()
            && values.len() as u64 == elements
            && values.iter().all(|x| x.is_finite())
        {
            self.residuals.insert(id, values);
        }
    }

    /// These elements go without loss, and with them what was held back of the last ones. Gives what goes, if that
    /// differs from this CompNode's own gradient. Pieces go in their order, so after the last one nothing is held back.
    fn settle(&mut self, id: SharedId, range: Range<usize>, sent: &HostTensor) -> Option<Vec<f32>> {
        let all = self.residuals.get_mut(&id)?;
        let is_last = range.end == all.len();
        let residual = all.get_mut(range)?;
        let is_settled = residual.iter().all(|&x| x == 0.0);
        residual.fill(0.0);
        if is_last {
            self.residuals.remove(&id);
        }
        sent.as_f32().filter(|_| !is_settled).map(<[f32]>::to_vec)
    }

    /// Adds what was held back of these elements of the last gradient.
    fn add(&self, id: SharedId, range: Range<usize>, gradient: &mut [f32]) {
        if let Some(residual) = self.residuals.get(&id).and_then(|all| all.get(range)) {
            gradient.iter_mut().zip(residual).for_each(|(value, residual)| *value += residual);
        }
    }

    /// What the other holders decode of these elements of `gradient`; all must add up the same numbers, so its sender
    /// does too.
    fn as_received(
        &mut self,
        shared: &Shared,
        range: Range<usize>,
        gradient: &HostTensor,
    ) -> Result<Vec<f32>, CompNodeError> {
        let mut bytes = Vec::new();
        shared.codec.encode(gradient, &mut bytes).map_err(internal)?;
        let received = shared.codec.decode(gradient.shape(), ElementType::F32, &bytes).map_err(internal)?;
        let (_, Values::F32(received)) = received.into_parts() else { return Ok(Vec::new()) };
        let elements = usize::try_from(shared.elements).unwrap_or(usize::MAX);
        let residual = self.residuals.entry(shared.id).or_insert_with(|| vec![0.0; elements]);
        if let (Some(sent), Some(residual)) = (gradient.as_f32(), residual.get_mut(range)) {
            for ((residual, sent), received) in residual.iter_mut().zip(sent).zip(&received) {
                let held_back = sent - received;
                // An infinite gradient must not stay for ever.
                *residual = if held_back.is_finite() { held_back } else { 0.0 };
            }
        }
        Ok(received)
    }
}

/// Shared parameters in one step.
#[derive(Clone, Debug)]
struct Exchanged {
    shared: Shared,
    pieces: Pieces,
    step: u64,
    /// The table of which this CompNode sends only rows, and which ones.
    rows: Option<(ParamId, Vec<u32>)>,
    /// The next piece that it sends.
    next: u32,
}

/// Shared gradients of this CompNode between the last BP and UPDATE.
#[derive(Debug, Default)]
pub(super) struct SharedGradients {
    feedback: Feedback,
    under_way: Vec<Exchanged>,
}

/// A part of a piece that came: all of it, or some rows of a table.
struct Part {
    rows: Option<(ParamId, Vec<u32>)>,
    values: Vec<f32>,
}

impl TaskLoop {
    /// After the last BP: the first pieces of this CompNode's gradients of shared parameters go to their other holders.
    pub(super) fn send_shared_gradients(&mut self, step: u64) -> Result<(), CompNodeError> {
        let placement = Arc::clone(&self.plan.placement);
        let node = self.plan.node;
        for shared in placement.shared.iter().filter(|s| s.holders.contains(&node)) {
            let pieces = Pieces::of(&shared.shape(&self.plan.dag));
            let table = placement.sends_rows(&self.plan.dag, shared, node);
            let rows = table.map(|table| (table, self.executor.looked_up(table)));
            let mut exchanged = Exchanged { shared: shared.clone(), pieces, step, rows, next: 0 };
            if let Some((_, rows)) = &exchanged.rows {
                let ids = rows.iter().map(|&row| row.cast_signed()).collect();
                let ids = HostTensor::new(vec![rows.len()], Values::I32(ids)).map_err(internal)?;
                self.send_part(&exchanged, 0, ids, Codec::Dense)?;
            }
            for _ in 0..SHARED_WINDOW {
                self.send_piece(&mut exchanged)?;
            }
            self.shared.under_way.push(exchanged);
        }
        Ok(())
    }

    /// What error feedback holds back of shared gradients here, for a checkpoint.
    pub(super) fn shared_residuals(&self) -> Result<Vec<(Channel, HostTensor)>, CompNodeError> {
        let named = |(id, values): (SharedId, &[f32])| {
            let residual = HostTensor::new(vec![values.len()], Values::F32(values.to_vec())).map_err(internal)?;
            Ok((Channel::Shared { id, from: self.plan.node }, residual))
        };
        self.shared.feedback.residuals().map(named).collect()
    }

    /// Puts back what [`Self::shared_residuals`] gave. Who sends only rows that were looked up has no use for it.
    pub(super) fn restore_shared_residual(&mut self, id: SharedId, residual: HostTensor) {
        let (placement, node) = (&self.plan.placement, self.plan.node);
        let sends_all = |shared: &&Shared| placement.sends_rows(&self.plan.dag, shared, node).is_none();
        if let Some(shared) = placement.shared(id).filter(sends_all) {
            self.shared.feedback.restore(id, shared.elements, residual);
        }
    }

    /// Every holder of shared parameters gets the sum of all holders' gradients, added in the same order, so the copies stay
    /// equal.
    pub(super) fn sum_shared_gradients(&mut self) -> Result<(), CompNodeError> {
        for mut exchanged in std::mem::take(&mut self.shared.under_way) {
            let (mut rows_of, node) = (BTreeMap::new(), self.plan.node);
            for &from in exchanged.shared.holders.iter().filter(|&&h| h != node) {
                if let Some(table) = self.plan.placement.sends_rows(&self.plan.dag, &exchanged.shared, from) {
                    rows_of.insert(from, (table, self.receive_rows(&exchanged, from)?));
                }
            }
            for piece in 0..exchanged.pieces.count() {
                self.sum_piece(&exchanged, piece, &rows_of)?;
                self.send_piece(&mut exchanged)?;
            }
        }
        Ok(())
    }

    /// Adds the other holders' gradients of a piece to this CompNode's: ((h0 + h1) + h2) and so on.
    fn sum_piece(
        &mut self,
        exchanged: &Exchanged,
        piece: u32,
        rows_of: &BTreeMap<NodeIndex, (ParamId, Vec<u32>)>,
    ) -> Result<(), CompNodeError> {
        let (shared, range) = (&exchanged.shared, exchanged.pieces.elements_of(piece));
        let own = shared.holders.iter().position(|&h| h == self.plan.node).unwrap_or(0);
        let mut before: Option<Vec<f32>> = None;
        for (place, &from) in shared.holders.iter().enumerate() {
            if place == own {
                if let Some(sum) = before.take() {
                    self.add_to_shared(shared, range.clone(), sum)?;
                }
                continue;
            }
            let part = self.receive_part(exchanged, from, piece, rows_of.get(&from))?;
            // A single one before is added like those after: a + b is b + a.
            if place < own && own > 1 {
                let sum = before.get_or_insert_with(|| vec![0.0; range.len()]);
                part.add_to(sum, range.start, exchanged.pieces.columns());
                continue;
            }
            match part.rows {
                None => self.add_to_shared(shared, range.clone(), part.values)?,
                Some((_, rows)) if rows.is_empty() => {}
                Some((table, rows)) => self.executor.add_gradient_rows(table, &rows, part.values)?,
            }
        }
        Ok(())
    }

    /// Sends the next piece, if one is left. What the others will decode takes the place of this CompNode's own.
    fn send_piece(&mut self, exchanged: &mut Exchanged) -> Result<(), CompNodeError> {
        let (piece, pieces) = (exchanged.next, exchanged.pieces);
        if piece == pieces.count() {
            return Ok(());
        }
        exchanged.next += 1;
        if let Some((table, rows)) = &exchanged.rows {
            let rows = within(rows, &pieces.rows_of(piece));
            if !rows.is_empty() {
                let values = self.executor.gradient_of_rows(*table, rows)?;
                let tensor = HostTensor::new(vec![rows.len(), pieces.columns()], Values::F32(values));
                self.send_part(exchanged, piece + 1, tensor.map_err(internal)?, exchanged.shared.codec)?;
            }
            return Ok(());
        }
        let (shared, range) = (&exchanged.shared, pieces.elements_of(piece));
        let mut values = self.shared_gradient(shared, range.clone())?;
        self.shared.feedback.add(shared.id, range.clone(), &mut values);
        let shape = vec![pieces.rows_of(piece).len(), pieces.columns()];
        let tensor = HostTensor::new(shape, Values::F32(values)).map_err(internal)?;
        if !shared.codec.is_lossless() {
            let received = self.shared.feedback.as_received(shared, range.clone(), &tensor)?;
            self.set_shared(shared, range, received)?;
        } else if let Some(own) = self.shared.feedback.settle(shared.id, range.clone(), &tensor) {
            // The others add what was held back, so this CompNode does.
            self.set_shared(shared, range, own)?;
        }
        self.send_part(exchanged, piece + 1, tensor, shared.codec)
    }

    /// Elements `range` of this CompNode's gradient of shared parameters.
    fn shared_gradient(&mut self, shared: &Shared, range: Range<usize>) -> Result<Vec<f32>, ExecutorError> {
        let mut all = Vec::new();
        for (param, range) in shared.parts(&self.plan.dag, range) {
            let part = self.executor.gradient(param, range)?;
            if all.is_empty() {
                all = part;
            } else {
                all.extend(part);
            }
        }
        Ok(all)
    }

    /// Adds `values` to elements `range` of the gradient.
    fn add_to_shared(&mut self, shared: &Shared, range: Range<usize>, values: Vec<f32>) -> Result<(), ExecutorError> {
        for (param, start, values) in cut(shared.parts(&self.plan.dag, range), values) {
            self.executor.add_gradient(param, start, values)?;
        }
        Ok(())
    }

    /// Has `values` take the place of elements `range` of the gradient.
    fn set_shared(&mut self, shared: &Shared, range: Range<usize>, values: Vec<f32>) -> Result<(), ExecutorError> {
        for (param, start, values) in cut(shared.parts(&self.plan.dag, range), values) {
            self.executor.set_gradient(param, start, values)?;
        }
        Ok(())
    }

    fn send_part(
        &mut self,
        of: &Exchanged,
        number: u32,
        tensor: HostTensor,
        codec: Codec,
    ) -> Result<(), CompNodeError> {
        let (slot, tensor) = (of.slot(self.plan.node, number), BorderTensor::from(tensor));
        for &to in of.shared.holders.iter().filter(|&&h| h != self.plan.node) {
            self.exchange.send(Message { to, slot, tensor: tensor.clone(), codec })?;
        }
        Ok(())
    }

    /// Which rows another holder sends.
    fn receive_rows(&mut self, of: &Exchanged, from: NodeIndex) -> Result<Vec<u32>, CompNodeError> {
        let tensor = self.receive(of.slot(from, 0))?.tensor;
        let (_, Values::I32(ids)) = tensor.into_parts() else {
            return Err(of.misfit(from, "its rows are no integers"));
        };
        let most = u32::try_from(of.pieces.rows()).unwrap_or(u32::MAX);
        let rows: Vec<u32> = ids.into_iter().map(i32::cast_unsigned).collect();
        if rows.last().is_some_and(|&last| last >= most) || !rows.is_sorted_by(|a, b| a < b) {
            return Err(of.misfit(from, "its rows do not ascend within the table"));
        }
        Ok(rows)
    }

    fn receive_part(
        &mut self,
        of: &Exchanged,
        from: NodeIndex,
        piece: u32,
        rows: Option<&(ParamId, Vec<u32>)>,
    ) -> Result<Part, CompNodeError> {
        let within = of.pieces.rows_of(piece);
        let rows = rows.map(|(table, rows)| (*table, self::within(rows, &within).to_vec()));
        if rows.as_ref().is_some_and(|(_, rows)| rows.is_empty()) {
            return Ok(Part { rows, values: Vec::new() });
        }
        let tensor = self.receive(of.slot(from, piece + 1))?.tensor;
        let expected = [rows.as_ref().map_or(within.len(), |(_, rows)| rows.len()), of.pieces.columns()];
        let fits = tensor.shape() == expected;
        match tensor.into_parts() {
            (_, Values::F32(values)) if fits => Ok(Part { rows, values }),
            _ => Err(of.misfit(from, "a piece has another shape")),
        }
    }
}

impl Exchanged {
    fn slot(&self, from: NodeIndex, number: u32) -> Slot {
        let channel = Channel::Shared { id: self.shared.id, from };
        Slot { channel, pass: Pass::Train, step: self.step, micro_batch: number }
    }

    fn misfit(&self, from: NodeIndex, reason: &str) -> CompNodeError {
        let what = format!("gradient of {} from {from}: {reason}", self.shared.id);
        ExecutorError::Internal { what }.into()
    }
}

impl Part {
    /// Adds it to the elements of a piece, which begins at `start` in the vector of all.
    fn add_to(&self, piece: &mut [f32], start: usize, columns: usize) {
        let add = |sums: &mut [f32], terms: &[f32]| sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
        let Some((_, rows)) = &self.rows else { return add(piece, &self.values) };
        for (&row, values) in rows.iter().zip(self.values.chunks_exact(columns)) {
            let at = row as usize * columns - start;
            add(&mut piece[at..at + columns], values);
        }
    }
}

/// The values that belong to parts which follow each other: the parameter of each, the first element there, and its values.
fn cut(parts: Vec<(ParamId, Range<usize>)>, mut values: Vec<f32>) -> Vec<(ParamId, usize, Vec<f32>)> {
    let part = |(param, range): (ParamId, Range<usize>)| {
        let later = values.split_off(range.len().min(values.len()));
        (param, range.start, std::mem::replace(&mut values, later))
    };
    parts.into_iter().map(part).collect()
}

/// Those of ascending rows that lie in a range.
fn within<'a>(rows: &'a [u32], range: &Range<usize>) -> &'a [u32] {
    let below = |end: usize| rows.partition_point(|&row| (row as usize) < end);
    &rows[below(range.start)..below(range.end)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(codec: Codec) -> Shared {
        let (id, params, holders) = (SharedId(0), vec![ParamId(0)], vec![NodeIndex(0), NodeIndex(1)]);
        Shared { id, params, holders, elements: 5, codec }
    }

    #[test]
    fn what_a_codec_drops_comes_with_the_next_gradient() {
        let shared = shared(Codec::Int4);
        let mut feedback = Feedback::default();
        let gradient = [1.0, 0.03, -0.5];
        let mut sums = [0.0; 3];
        for _ in 0..100 {
            let mut sent = gradient.to_vec();
            feedback.add(shared.id, 2..5, &mut sent);
            let sent = HostTensor::new(vec![3], Values::F32(sent)).unwrap();
            let received = feedback.as_received(&shared, 2..5, &sent).unwrap();
            sums.iter_mut().zip(&received).for_each(|(sum, r)| *sum += r);
        }
        for (sum, gradient) in sums.iter().zip(gradient) {
            assert!((sum / 100.0 - gradient).abs() < 0.002, "{sums:?}");
        }
        assert_eq!(feedback.residuals[&shared.id][..2], [0.0; 2], "other pieces have their own");
    }

    #[test]
    fn what_was_held_back_at_a_checkpoint_comes_with_the_next_gradient_once() {
        let id = SharedId(0);
        let tensor = |values: &[f32]| HostTensor::new(vec![values.len()], Values::F32(values.to_vec())).unwrap();
        let mut feedback = Feedback::default();
        feedback.restore(id, 3, tensor(&[9.0, 9.0]));
        assert_eq!(feedback.residuals().count(), 0, "of another shape");
        feedback.restore(id, 2, tensor(&[0.25, -0.5]));
        assert_eq!(feedback.residuals().collect::<Vec<_>>(), [(id, [0.25, -0.5].as_slice())]);
        for (expected, differs) in [([1.25, 0.5], true), ([1.0, 1.0], false)] {
            for piece in [0..1, 1..2] {
                let mut sent = vec![1.0];
                feedback.add(id, piece.clone(), &mut sent);
                assert_eq!(sent, expected[piece.clone()]);
                // Without loss, all of it goes.
                assert_eq!(feedback.settle(id, piece, &tensor(&sent)), differs.then_some(sent));
            }
            assert_eq!(feedback.residuals().count(), 0, "later checkpoints have nothing of it");
        }
    }

    #[test]
    fn values_of_several_parameters_go_to_each_its_own() {
        let (a, b) = (ParamId(3), ParamId(7));
        let parts = cut(vec![(a, 4..6), (b, 0..3)], vec![1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(parts, [(a, 4, vec![1.0, 2.0]), (b, 0, vec![3.0, 4.0, 5.0])]);
    }

    #[test]
    fn rows_are_added_where_they_lie_in_a_piece() {
        let rows = [1, 3, 4, 7];
        assert_eq!(within(&rows, &(3..7)), [3, 4]);
        assert!(within(&rows, &(5..7)).is_empty());
        let part = Part { rows: Some((ParamId(0), vec![3, 4])), values: vec![1.0, 2.0, 3.0, 4.0] };
        let mut piece = [10.0; 6];
        part.add_to(&mut piece, 4, 2);
        assert_eq!(piece, [10.0, 10.0, 11.0, 12.0, 13.0, 14.0]);
        Part { rows: None, values: vec![1.0; 6] }.add_to(&mut piece, 4, 2);
        assert_eq!(piece, [11.0, 11.0, 12.0, 13.0, 14.0, 15.0]);
    }
}
