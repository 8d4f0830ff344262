//! Gradients of parameters that several CompNodes hold.

use std::collections::BTreeMap;
use std::sync::Arc;

use fusionllm_codec::{ElementType, HostTensor, Values};
use fusionllm_graph::ParamId;
use fusionllm_planner::TiedParam;
use fusionllm_protocol::Channel;

use super::update::step_slot;
use super::{TaskLoop, internal};
use crate::exchange::Message;
use crate::{CompNodeError, ExecutorError};

/// What the codecs of tied gradients held back here, to be added in the next step. Without it the errors of quantized
/// gradients would add up in the table.
#[derive(Debug, Default)]
pub(super) struct Feedback {
    residuals: BTreeMap<ParamId, Vec<f32>>,
    /// This step's own gradients as the others decode them, from when they were sent until they are added up.
    own: BTreeMap<ParamId, HostTensor>,
}

impl Feedback {
    /// The gradient with what was held back of the last one.
    fn add(&self, param: ParamId, gradient: HostTensor) -> HostTensor {
        let Some(residual) = self.residuals.get(&param) else { return gradient };
        let (shape, values) = gradient.clone().into_parts();
        let Values::F32(mut values) = values else { return gradient };
        values.iter_mut().zip(residual).for_each(|(value, residual)| *value += residual);
        HostTensor::new(shape, Values::F32(values)).unwrap_or(gradient)
    }

    /// What the other holders decode of `gradient`; all must add up the same numbers, so its sender does too.
    fn as_received(&mut self, tied: &TiedParam, gradient: HostTensor) -> Result<HostTensor, CompNodeError> {
        if tied.codec.is_lossless() {
            return Ok(gradient);
        }
        let mut bytes = Vec::new();
        tied.codec.encode(&gradient, &mut bytes).map_err(internal)?;
        let received = tied.codec.decode(gradient.shape(), ElementType::F32, &bytes).map_err(internal)?;
        if let (Some(sent), Some(received)) = (gradient.as_f32(), received.as_f32()) {
            let held_back = sent.iter().zip(received).map(|(sent, received)| sent - received);
            // An infinite gradient must not stay for ever.
            let finite = held_back.map(|r| if r.is_finite() { r } else { 0.0 });
            self.residuals.insert(tied.param, finite.collect());
        }
        Ok(received)
    }
}

impl TaskLoop {
    /// After the last BP: this CompNode's gradients of tied parameters go to their other holders.
    pub(super) fn send_tied_gradients(&mut self, step: u64) -> Result<(), CompNodeError> {
        let placement = Arc::clone(&self.plan.placement);
        let node = self.plan.node;
        for tied in placement.tied.iter().filter(|t| t.holders.contains(&node)) {
            let gradient = self.feedback.add(tied.param, self.executor.gradient(tied.param)?);
            let slot = step_slot(Channel::Tied { param: tied.param, from: node }, step);
            for &to in tied.holders.iter().filter(|&&h| h != node) {
                self.exchange.send(Message { to, slot, tensor: gradient.clone(), codec: tied.codec })?;
            }
            let own = self.feedback.as_received(tied, gradient)?;
            self.feedback.own.insert(tied.param, own);
        }
        Ok(())
    }

    /// Every holder of a tied parameter gets the sum of all holders' gradients, added in the same order, so the
    /// copies stay equal.
    pub(super) fn sum_tied_gradients(&mut self, step: u64) -> Result<(), CompNodeError> {
        let placement = Arc::clone(&self.plan.placement);
        let node = self.plan.node;
        for tied in placement.tied.iter().filter(|t| t.holders.contains(&node)) {
            let mut sum: Option<Vec<f32>> = None;
            let mut shape = Vec::new();
            for &from in &tied.holders {
                let part = if from == node {
                    self.feedback.own.remove(&tied.param).ok_or_else(|| ExecutorError::Internal {
                        what: format!("the gradient of tied parameter {} was not sent", tied.param.0),
                    })?
                } else {
                    self.receive(step_slot(Channel::Tied { param: tied.param, from }, step))?.tensor
                };
                shape = part.shape().to_vec();
                sum = Some(add(sum, part, tied.param)?);
            }
            let total = HostTensor::new(shape, Values::F32(sum.unwrap_or_default())).map_err(internal)?;
            self.executor.set_gradient(tied.param, total)?;
        }
        Ok(())
    }
}

fn add(sum: Option<Vec<f32>>, part: HostTensor, param: ParamId) -> Result<Vec<f32>, CompNodeError> {
    let misfit =
        || ExecutorError::Internal { what: format!("tied gradients of parameter {} differ in shape", param.0) };
    let (_, values) = part.into_parts();
    let Values::F32(values) = values else { return Err(misfit().into()) };
    match sum {
        None => Ok(values),
        Some(mut sum) if sum.len() == values.len() => {
            sum.iter_mut().zip(&values).for_each(|(a, b)| *a += b);
            Ok(sum)
        }
        Some(_) => Err(misfit().into()),
    }
}

#[cfg(test)]
mod tests {
    use fusionllm_codec::Codec;
    use fusionllm_planner::NodeIndex;

    use super::*;

    fn tensor(values: &[f32]) -> HostTensor {
        HostTensor::new(vec![values.len()], Values::F32(values.to_vec())).unwrap()
    }

    #[test]
    fn what_a_codec_drops_comes_with_the_next_gradient() {
        let holders = vec![NodeIndex(0), NodeIndex(1)];
        let tied = TiedParam { param: ParamId(0), holders, elements: 3, codec: Codec::Int4 };
        let mut feedback = Feedback::default();
        let gradient = [1.0, 0.03, -0.5];
        let mut sums = [0.0; 3];
        for _ in 0..100 {
            let sent = feedback.add(tied.param, tensor(&gradient));
            let received = feedback.as_received(&tied, sent).unwrap();
            sums.iter_mut().zip(received.as_f32().unwrap()).for_each(|(sum, r)| *sum += r);
        }
        for (sum, gradient) in sums.iter().zip(gradient) {
            assert!((sum / 100.0 - gradient).abs() < 0.002, "{sums:?}");
        }
    }

    #[test]
    fn without_loss_nothing_is_held_back() {
        let tied = TiedParam { param: ParamId(0), holders: Vec::new(), elements: 1, codec: Codec::Dense };
        let mut feedback = Feedback::default();
        assert_eq!(feedback.as_received(&tied, tensor(&[0.1])).unwrap(), tensor(&[0.1]));
        assert_eq!(feedback.add(tied.param, tensor(&[0.1])), tensor(&[0.1]));
    }
}
