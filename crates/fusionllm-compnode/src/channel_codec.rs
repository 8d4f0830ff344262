//! The two ends of a channel's encoding: what they remember from message to message.
//!
//! Training messages go through the stateful ends of an edge; evaluation messages are encoded each by itself, so that
//! an evaluation changes nothing.

use fusionllm_codec::{Codec, CodecError, EdgeDecoder, EdgeEncoder, EdgeOptions, ElementType, HostTensor, Values};
use fusionllm_protocol::{Channel, CompressionSpec, Pass};

use crate::mailbox::Slot;

/// Steps between two samples of the error that codecs introduce.
const SAMPLED_STEPS: u64 = 10;

/// What a job says of all its channels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChannelOptions {
    error_feedback: bool,
    predict: bool,
}

impl ChannelOptions {
    pub(crate) fn of(spec: &CompressionSpec) -> Self {
        Self { error_feedback: spec.error_feedback, predict: spec.predict }
    }

    /// Feedback and unbiased rounding are for gradients, whose sums matter; prediction for activations, which have constant channels.
    fn edge(self, channel: Channel) -> EdgeOptions {
        let (is_activation, is_gradient) =
            (matches!(channel, Channel::Activation(_)), matches!(channel, Channel::Gradient(_)));
        EdgeOptions {
            error_feedback: self.error_feedback && is_gradient,
            predict: self.predict && is_activation,
            unbiased: is_gradient,
            ..EdgeOptions::default()
        }
    }
}

/// What is known of a message only once it is encoded.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Found {
    /// Bytes beyond the codec's steady size: a basis, less what a message does not use.
    pub(crate) beyond_steady: i64,
    /// Relative error, if it was measured.
    pub(crate) error: Option<f64>,
}

/// Whether the error of a message's codec is measured: of one micro-batch every few steps, since it costs a decoding.
fn is_sampled(slot: &Slot) -> bool {
    slot.micro_batch == 0 && slot.step.is_multiple_of(SAMPLED_STEPS)
}

/// The sending end.
#[derive(Debug)]
pub(crate) struct ChannelEncoder {
    edge: EdgeEncoder,
}

impl ChannelEncoder {
    pub(crate) fn new(options: ChannelOptions, channel: Channel) -> Self {
        Self { edge: EdgeEncoder::new(options.edge(channel)) }
    }

    /// Appends the encoded tensor to `out`.
    pub(crate) fn encode(
        &mut self,
        slot: &Slot,
        codec: Codec,
        tensor: &HostTensor,
        out: &mut Vec<u8>,
    ) -> Result<Found, CodecError> {
        let is_lossy = !codec.is_lossless();
        match (slot.pass, tensor.values()) {
            // Without loss, too, what was held back of the last message goes with this one.
            (Pass::Train, Values::F32(values)) if is_lossy || self.edge.residual().is_some() => {
                let measured = is_lossy && is_sampled(slot);
                let encoded = self.edge.encode_and_measure(codec, tensor.shape(), values, out, measured)?;
                let beyond_steady = encoded.bytes.cast_signed() - codec.steady_bytes(tensor.shape())?.cast_signed();
                Ok(Found { beyond_steady, error: encoded.relative_error })
            }
            (Pass::Train | Pass::Eval, _) => {
                codec.encode(tensor, out)?;
                Ok(Found::default())
            }
        }
    }

    /// What is held back for the next message.
    pub(crate) fn residual(&self) -> Option<HostTensor> {
        let (shape, values) = self.edge.residual()?;
        HostTensor::new(shape.to_vec(), Values::F32(values.to_vec())).ok()
    }

    /// Puts a residual back; one that cannot be is as good as none.
    pub(crate) fn restore(&mut self, residual: HostTensor) {
        if let (shape, Values::F32(values)) = residual.into_parts()
            && let Err(error) = self.edge.restore_residual(shape, values)
        {
            tracing::warn!(%error, "a residual of the checkpoint is dropped");
        }
    }
}

/// The receiving end.
#[derive(Debug)]
pub(crate) struct ChannelDecoder {
    edge: EdgeDecoder,
}

impl ChannelDecoder {
    pub(crate) fn new(options: ChannelOptions, channel: Channel) -> Self {
        Self { edge: EdgeDecoder::new(options.edge(channel)) }
    }

    /// The tensor that `bytes` encode.
    pub(crate) fn decode(
        &mut self,
        pass: Pass,
        codec: Codec,
        shape: Vec<usize>,
        element: ElementType,
        bytes: &[u8],
    ) -> Result<HostTensor, CodecError> {
        match (pass, element) {
            (Pass::Train, ElementType::F32) if !codec.is_lossless() => {
                let mut values = Vec::new();
                self.edge.decode(codec, &shape, bytes, &mut values)?;
                HostTensor::new(shape, Values::F32(values))
            }
            (Pass::Train | Pass::Eval, _) => codec.decode(&shape, element, bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use fusionllm_planner::EdgeId;

    use super::*;

    fn sent(
        encoder: &mut ChannelEncoder,
        decoder: &mut ChannelDecoder,
        step: u64,
        codec: Codec,
        x: &[f32],
    ) -> Vec<f32> {
        let slot = Slot { channel: Channel::Gradient(EdgeId(0)), pass: Pass::Train, step, micro_batch: 0 };
        let tensor = HostTensor::new(vec![1, x.len()], Values::F32(x.to_vec())).unwrap();
        let mut bytes = Vec::new();
        encoder.encode(&slot, codec, &tensor, &mut bytes).unwrap();
        let shape = tensor.shape().to_vec();
        let decoded = decoder.decode(Pass::Train, codec, shape, ElementType::F32, &bytes).unwrap();
        decoded.as_f32().unwrap().to_vec()
    }

    #[test]
    fn what_a_codec_held_back_goes_with_the_next_message_whatever_its_codec() {
        let channel = Channel::Gradient(EdgeId(0));
        let options = ChannelOptions { error_feedback: true, predict: false };
        let lossy = [Codec::Int4, Codec::Bf16, "topk:0.25:f32".parse().unwrap()];
        for lossy in lossy {
            let (mut encoder, mut decoder) =
                (ChannelEncoder::new(options, channel), ChannelDecoder::new(options, channel));
            let x = [1.0, 0.031, -0.507, 0.25];
            let mut sums = [0.0; 4];
            for (step, codec) in (0..).zip([lossy, Codec::Dense, Codec::Dense, lossy, Codec::Dense]) {
                let decoded = sent(&mut encoder, &mut decoder, step, codec, &x);
                sums.iter_mut().zip(decoded).for_each(|(sum, y)| *sum += y);
            }
            for (sum, x) in sums.iter().zip(x) {
                assert!((sum / 5.0 - x).abs() < 1e-6, "{lossy}: {sums:?}");
            }
            assert_eq!(encoder.residual(), None, "nothing is held back that a checkpoint would bring again");
        }
    }
}
