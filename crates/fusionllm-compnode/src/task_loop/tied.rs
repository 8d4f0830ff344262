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
use fusionllm_planner::{NodeIndex, Pieces, TIED_WINDOW, TiedParam};
use fusionllm_protocol::{Channel, Pass};

use super::{TaskLoop, internal};
use crate::border::BorderTensor;
use crate::exchange::Message;
use crate::mailbox::Slot;
use crate::{CompNodeError, ExecutorError};

/// What the codecs of tied gradients held back here, to be added in the next step. Without it the errors of quantized
/// gradients would add up in the table.
#[derive(Debug, Default)]
pub(super) struct Feedback {
    residuals: BTreeMap<ParamId, Vec<f32>>,
}

impl Feedback {
    /// What is held back, for a checkpoint.
    fn residuals(&self) -> impl Iterator<Item = (ParamId, &[f32])> {
        self.residuals.iter().map(|(&param, residual)| (param, residual.as_slice()))
    }

    /// Puts back what was held back at a checkpoint; one that does not fit the parameter is as good as none.
    fn restore(&mut self, param: ParamId, elements: u64, residual: HostTensor) {
        if let (_, Values::F32(values)) = residual.into_parts()
            && values.len() as u64 == elements
            && values.iter().all(|x| x.is_finite())
        {
            self.residuals.insert(param, values);
        }
    }

    /// These elements go without loss, and with them what was held back of the last ones. Gives what goes, if that
    /// differs from this CompNode's own gradient. Pieces go in their order, so after the last one nothing is held back.
    fn settle(&mut self, param: ParamId, range: Range<usize>, sent: &HostTensor) -> Option<Vec<f32>> {
        let all = self.residuals.get_mut(&param)?;
        let is_last = range.end == all.len();
        let residual = all.get_mut(range)?;
        let is_settled = residual.iter().all(|&x| x == 0.0);
        residual.fill(0.0);
        if is_last {
            self.residuals.remove(&param);
        }
        sent.as_f32().filter(|_| !is_settled).map(<[f32]>::to_vec)
    }

    /// Adds what was held back of these elements of the last gradient.
    fn add(&self, param: ParamId, range: Range<usize>, gradient: &mut [f32]) {
        if let Some(residual) = self.residuals.get(&param).and_then(|all| all.get(range)) {
            gradient.iter_mut().zip(residual).for_each(|(value, residual)| *value += residual);
        }
    }

    /// What the other holders decode of these elements of `gradient`; all must add up the same numbers, so its sender
    /// does too.
    fn as_received(
        &mut self,
        tied: &TiedParam,
        range: Range<usize>,
        gradient: &HostTensor,
    ) -> Result<Vec<f32>, CompNodeError> {
        let mut bytes = Vec::new();
        tied.codec.encode(gradient, &mut bytes).map_err(internal)?;
        let received = tied.codec.decode(gradient.shape(), ElementType::F32, &bytes).map_err(internal)?;
        let (_, Values::F32(received)) = received.into_parts() else { return Ok(Vec::new()) };
        let elements = usize::try_from(tied.elements).unwrap_or(usize::MAX);
        let residual = self.residuals.entry(tied.param).or_insert_with(|| vec![0.0; elements]);
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

/// One tied parameter in one step.
#[derive(Clone, Debug)]
struct Exchanged {
    tied: TiedParam,
    pieces: Pieces,
    step: u64,
    /// The rows that this CompNode sends, if not all.
    rows: Option<Vec<u32>>,
    /// The next piece that it sends.
    next: u32,
}

/// Tied gradients of this CompNode between the last BP and UPDATE.
#[derive(Debug, Default)]
pub(super) struct TiedGradients {
    feedback: Feedback,
    under_way: Vec<Exchanged>,
}

/// A part of a piece that came: all rows, or some.
struct Part {
    rows: Option<Vec<u32>>,
    values: Vec<f32>,
}

impl TaskLoop {
    /// After the last BP: the first pieces of this CompNode's gradients of tied parameters go to their other holders.
    pub(super) fn send_tied_gradients(&mut self, step: u64) -> Result<(), CompNodeError> {
        let placement = Arc::clone(&self.plan.placement);
        let node = self.plan.node;
        for tied in placement.tied.iter().filter(|t| t.holders.contains(&node)) {
            let pieces = Pieces::of(&self.plan.dag.param(tied.param).shape);
            let rows = placement.sends_rows(&self.plan.dag, tied, node).then(|| self.executor.looked_up(tied.param));
            let mut exchanged = Exchanged { tied: tied.clone(), pieces, step, rows, next: 0 };
            if let Some(rows) = &exchanged.rows {
                let ids = rows.iter().map(|&row| row.cast_signed()).collect();
                let ids = HostTensor::new(vec![rows.len()], Values::I32(ids)).map_err(internal)?;
                self.send_part(&exchanged, 0, ids, Codec::Dense)?;
            }
            for _ in 0..TIED_WINDOW {
                self.send_piece(&mut exchanged)?;
            }
            self.tied.under_way.push(exchanged);
        }
        Ok(())
    }

    /// What error feedback holds back of tied gradients here, for a checkpoint.
    pub(super) fn tied_residuals(&self) -> Result<Vec<(Channel, HostTensor)>, CompNodeError> {
        let named = |(param, values): (ParamId, &[f32])| {
            let shape = self.plan.dag.param(param).shape.clone();
            let residual = HostTensor::new(shape, Values::F32(values.to_vec())).map_err(internal)?;
            Ok((Channel::Tied { param, from: self.plan.node }, residual))
        };
        self.tied.feedback.residuals().map(named).collect()
    }

    /// Puts back what [`Self::tied_residuals`] gave. Who sends only rows that were looked up has no use for it.
    pub(super) fn restore_tied_residual(&mut self, param: ParamId, residual: HostTensor) {
        let (placement, node) = (&self.plan.placement, self.plan.node);
        let tied = placement.tied.iter().find(|tied| tied.param == param);
        if let Some(tied) = tied.filter(|tied| !placement.sends_rows(&self.plan.dag, tied, node)) {
            self.tied.feedback.restore(param, tied.elements, residual);
        }
    }

    /// Every holder of a tied parameter gets the sum of all holders' gradients, added in the same order, so the
    /// copies stay equal.
    pub(super) fn sum_tied_gradients(&mut self) -> Result<(), CompNodeError> {
        for mut exchanged in std::mem::take(&mut self.tied.under_way) {
            let (mut rows_of, node) = (BTreeMap::new(), self.plan.node);
            for &from in exchanged.tied.holders.iter().filter(|&&h| h != node) {
                if self.plan.placement.sends_rows(&self.plan.dag, &exchanged.tied, from) {
                    rows_of.insert(from, self.receive_rows(&exchanged, from)?);
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
        rows_of: &BTreeMap<NodeIndex, Vec<u32>>,
    ) -> Result<(), CompNodeError> {
        let (param, range) = (exchanged.tied.param, exchanged.pieces.elements_of(piece));
        let own = exchanged.tied.holders.iter().position(|&h| h == self.plan.node).unwrap_or(0);
        let mut before: Option<Vec<f32>> = None;
        for (place, &from) in exchanged.tied.holders.iter().enumerate() {
            if place == own {
                if let Some(sum) = before.take() {
                    self.executor.add_gradient(param, range.start, sum)?;
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
                None => self.executor.add_gradient(param, range.start, part.values)?,
                Some(rows) if rows.is_empty() => {}
                Some(rows) => self.executor.add_gradient_rows(param, &rows, part.values)?,
            }
        }
        Ok(())
    }

    /// Sends the next piece, if one is left. What the others will decode takes the place of this CompNode's own.
    fn send_piece(&mut self, exchanged: &mut Exchanged) -> Result<(), CompNodeError> {
        let (piece, param, pieces) = (exchanged.next, exchanged.tied.param, exchanged.pieces);
        if piece == pieces.count() {
            return Ok(());
        }
        exchanged.next += 1;
        if let Some(rows) = &exchanged.rows {
            let rows = within(rows, &pieces.rows_of(piece));
            if !rows.is_empty() {
                let values = self.executor.gradient_of_rows(param, rows)?;
                let tensor = HostTensor::new(vec![rows.len(), pieces.columns()], Values::F32(values));
                self.send_part(exchanged, piece + 1, tensor.map_err(internal)?, exchanged.tied.codec)?;
            }
            return Ok(());
        }
        let range = pieces.elements_of(piece);
        let mut values = self.executor.gradient(param, range.clone())?;
        self.tied.feedback.add(param, range.clone(), &mut values);
        let shape = vec![pieces.rows_of(piece).len(), pieces.columns()];
        let tensor = HostTensor::new(shape, Values::F32(values)).map_err(internal)?;
        if !exchanged.tied.codec.is_lossless() {
            let received = self.tied.feedback.as_received(&exchanged.tied, range.clone(), &tensor)?;
            self.executor.set_gradient(param, range.start, received)?;
        } else if let Some(own) = self.tied.feedback.settle(param, range.clone(), &tensor) {
            // The others add what was held back, so this CompNode does.
            self.executor.set_gradient(param, range.start, own)?;
        }
        self.send_part(exchanged, piece + 1, tensor, exchanged.tied.codec)
    }

    fn send_part(
        &mut self,
        of: &Exchanged,
        number: u32,
        tensor: HostTensor,
        codec: Codec,
    ) -> Result<(), CompNodeError> {
        let (slot, tensor) = (of.slot(self.plan.node, number), BorderTensor::from(tensor));
        for &to in of.tied.holders.iter().filter(|&&h| h != self.plan.node) {
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
        rows: Option<&Vec<u32>>,
    ) -> Result<Part, CompNodeError> {
        let within = of.pieces.rows_of(piece);
        let rows = rows.map(|rows| self::within(rows, &within).to_vec());
        if rows.as_ref().is_some_and(Vec::is_empty) {
            return Ok(Part { rows, values: Vec::new() });
        }
        let tensor = self.receive(of.slot(from, piece + 1))?.tensor;
        let expected = [rows.as_ref().map_or(within.len(), Vec::len), of.pieces.columns()];
        let fits = tensor.shape() == expected;
        match tensor.into_parts() {
            (_, Values::F32(values)) if fits => Ok(Part { rows, values }),
            _ => Err(of.misfit(from, "a piece has another shape")),
        }
    }
}

impl Exchanged {
    fn slot(&self, from: NodeIndex, number: u32) -> Slot {
        let channel = Channel::Tied { param: self.tied.param, from };
        Slot { channel, pass: Pass::Train, step: self.step, micro_batch: number }
    }

    fn misfit(&self, from: NodeIndex, reason: &str) -> CompNodeError {
        let what = format!("gradient of tied parameter {} from {from}: {reason}", self.tied.param.0);
        ExecutorError::Internal { what }.into()
    }
}

impl Part {
    /// Adds it to the elements of a piece, which begins at `start` in the parameter.
    fn add_to(&self, piece: &mut [f32], start: usize, columns: usize) {
        let add = |sums: &mut [f32], terms: &[f32]| sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
        let Some(rows) = &self.rows else { return add(piece, &self.values) };
        for (&row, values) in rows.iter().zip(self.values.chunks_exact(columns)) {
            let at = row as usize * columns - start;
            add(&mut piece[at..at + columns], values);
        }
    }
}

/// Those of ascending rows that lie in a range.
fn within<'a>(rows: &'a [u32], range: &Range<usize>) -> &'a [u32] {
    let below = |end: usize| rows.partition_point(|&row| (row as usize) < end);
    &rows[below(range.start)..below(range.end)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tied(codec: Codec) -> TiedParam {
        TiedParam { param: ParamId(0), holders: vec![NodeIndex(0), NodeIndex(1)], elements: 5, codec }
    }

    #[test]
    fn what_a_codec_drops_comes_with_the_next_gradient() {
        let tied = tied(Codec::Int4);
        let mut feedback = Feedback::default();
        let gradient = [1.0, 0.03, -0.5];
        let mut sums = [0.0; 3];
        for _ in 0..100 {
            let mut sent = gradient.to_vec();
            feedback.add(tied.param, 2..5, &mut sent);
            let sent = HostTensor::new(vec![3], Values::F32(sent)).unwrap();
            let received = feedback.as_received(&tied, 2..5, &sent).unwrap();
            sums.iter_mut().zip(&received).for_each(|(sum, r)| *sum += r);
        }
        for (sum, gradient) in sums.iter().zip(gradient) {
            assert!((sum / 100.0 - gradient).abs() < 0.002, "{sums:?}");
        }
        assert_eq!(feedback.residuals[&tied.param][..2], [0.0; 2], "other pieces have their own");
    }

    #[test]
    fn what_was_held_back_at_a_checkpoint_comes_with_the_next_gradient_once() {
        let param = ParamId(0);
        let tensor = |values: &[f32]| HostTensor::new(vec![values.len()], Values::F32(values.to_vec())).unwrap();
        let mut feedback = Feedback::default();
        feedback.restore(param, 3, tensor(&[9.0, 9.0]));
        assert_eq!(feedback.residuals().count(), 0, "of another shape");
        feedback.restore(param, 2, tensor(&[0.25, -0.5]));
        assert_eq!(feedback.residuals().collect::<Vec<_>>(), [(param, [0.25, -0.5].as_slice())]);
        for (expected, differs) in [([1.25, 0.5], true), ([1.0, 1.0], false)] {
            for piece in [0..1, 1..2] {
                let mut sent = vec![1.0];
                feedback.add(param, piece.clone(), &mut sent);
                assert_eq!(sent, expected[piece.clone()]);
                // Without loss, all of it goes.
                assert_eq!(feedback.settle(param, piece, &tensor(&sent)), differs.then_some(sent));
            }
            assert_eq!(feedback.residuals().count(), 0, "later checkpoints have nothing of it");
        }
    }

    #[test]
    fn rows_are_added_where_they_lie_in_a_piece() {
        let rows = [1, 3, 4, 7];
        assert_eq!(within(&rows, &(3..7)), [3, 4]);
        assert!(within(&rows, &(5..7)).is_empty());
        let part = Part { rows: Some(vec![3, 4]), values: vec![1.0, 2.0, 3.0, 4.0] };
        let mut piece = [10.0; 6];
        part.add_to(&mut piece, 4, 2);
        assert_eq!(piece, [10.0, 10.0, 11.0, 12.0, 13.0, 14.0]);
        Part { rows: None, values: vec![1.0; 6] }.add_to(&mut piece, 4, 2);
        assert_eq!(piece, [11.0, 11.0, 12.0, 13.0, 14.0, 15.0]);
    }
}
