//! The two ends of a channel's encoding: what they remember from message to message.
//!
//! Training messages go through the stateful ends of an edge; evaluation messages are encoded each by itself, so that
//! an evaluation changes nothing.

use fusionllm_codec::{Codec, CodecError, EdgeDecoder, EdgeEncoder, EdgeOptions, ElementType, HostTensor, Values};
use fusionllm_protocol::{Channel, CompressionView, Pass};

use crate::ExchangeError;
use crate::border::BorderTensor;
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
    pub(crate) fn of(spec: &CompressionView) -> Self {
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

    /// Appends the encoded tensor to `out`. Its device is asked first, where nothing is remembered from message to
    /// message and no error is measured.
    pub(crate) fn encode(
        &mut self,
        slot: &Slot,
        codec: Codec,
        tensor: &BorderTensor,
        out: &mut Vec<u8>,
    ) -> Result<Found, ExchangeError> {
        let is_lossy = !codec.is_lossless();
        let (trains, measured) = (slot.pass == Pass::Train, is_lossy && is_sampled(slot));
        if let BorderTensor::Device(tensor) = tensor
            && tensor.encodes(codec)
            && !(trains && (measured || self.edge.remembers(codec)))
        {
            tensor.encode(codec, out)?;
            return Ok(Found::default());
        }
        let tensor = tensor.on_host()?;
        match (slot.pass, tensor.values()) {
            // Without loss, too, what was held back of the last message goes with this one.
            (Pass::Train, Values::F32(values)) if is_lossy || self.edge.residual().is_some() => {
                let encoded = self.edge.encode_and_measure(codec, tensor.shape(), values, out, measured)?;
                let beyond_steady = encoded.bytes.cast_signed() - codec.steady_bytes(tensor.shape())?.cast_signed();
                Ok(Found { beyond_steady, error: encoded.relative_error })
            }
            (Pass::Train | Pass::Eval, _) => {
                codec.encode(&tensor, out)?;
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
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use fusionllm_planner::EdgeId;

    use super::*;
    use crate::ExecutorError;
    use crate::border::DeviceTensor;

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
        encoder.encode(&slot, codec, &tensor.into(), &mut bytes).unwrap();
        let shape = vec![1, x.len()];
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
    /// A tensor on a device that knows one codec. It counts how often it was brought to the host.
    #[derive(Debug)]
    struct OnDevice {
        tensor: HostTensor,
        knows: Codec,
        brought: AtomicUsize,
    }

    impl DeviceTensor for OnDevice {
        fn shape(&self) -> &[usize] {
            self.tensor.shape()
        }

        fn to_host(&self) -> Result<HostTensor, ExecutorError> {
            self.brought.fetch_add(1, Ordering::Relaxed);
            Ok(self.tensor.clone())
        }

        fn encodes(&self, codec: Codec) -> bool {
            codec == self.knows
        }

        fn encode(&self, codec: Codec, out: &mut Vec<u8>) -> Result<(), ExecutorError> {
            assert!(self.encodes(codec));
            codec.encode(&self.tensor, out).map_err(|e| ExecutorError::Internal { what: e.to_string() })
        }
    }

    #[test]
    fn a_device_is_asked_first_and_gives_the_bytes_of_the_host() {
        let (activation, gradient) = (Channel::Activation(EdgeId(0)), Channel::Gradient(EdgeId(0)));
        let int4 = Codec::Int4;
        let cases = [
            // The device's codec, the message's, its channel, pass and step, and how often it comes to the host.
            (int4, int4, activation, Pass::Train, 1, 0),
            (int4, int4, activation, Pass::Train, SAMPLED_STEPS, 1),
            (int4, Codec::Bf16, activation, Pass::Train, 1, 1),
            (int4, int4, gradient, Pass::Train, 1, 1),
            (Codec::Bf16, Codec::Bf16, gradient, Pass::Eval, 0, 0),
            (Codec::Dense, Codec::Dense, gradient, Pass::Train, SAMPLED_STEPS, 0),
        ];
        for (case, (knows, codec, channel, pass, step, expected)) in cases.into_iter().enumerate() {
            let options = ChannelOptions { error_feedback: true, predict: false };
            let slot = Slot { channel, pass, step, micro_batch: 0 };
            let tensor = HostTensor::new(vec![2, 3], Values::F32(vec![0.5, -1.25, 3.0, 0.1, 7.0, -0.3])).unwrap();
            let bytes_of = |tensor: &BorderTensor| {
                let mut bytes = Vec::new();
                ChannelEncoder::new(options, channel).encode(&slot, codec, tensor, &mut bytes).unwrap();
                bytes
            };
            let device = Arc::new(OnDevice { tensor: tensor.clone(), knows, brought: AtomicUsize::new(0) });
            let bytes = bytes_of(&BorderTensor::Device(Arc::clone(&device) as Arc<dyn DeviceTensor>));
            assert_eq!(bytes, bytes_of(&tensor.into()), "case {case}");
            assert_eq!(device.brought.load(Ordering::Relaxed), expected, "case {case}");
        }
    }

    #[test]
    fn what_is_held_back_goes_with_a_message_that_its_device_could_encode() {
        let channel = Channel::Gradient(EdgeId(0));
        let mut encoder = ChannelEncoder::new(ChannelOptions { error_feedback: true, predict: false }, channel);
        let x = [1.0, 0.031, -0.507, 0.25];
        let tensor = HostTensor::new(vec![1, 4], Values::F32(x.to_vec())).unwrap();
        let on_device = OnDevice { tensor, knows: Codec::Dense, brought: AtomicUsize::new(0) };
        let tensor = BorderTensor::Device(Arc::new(on_device));
        for codec in [Codec::Int4, Codec::Dense] {
            let slot = Slot { channel, pass: Pass::Train, step: 1, micro_batch: 0 };
            encoder.encode(&slot, codec, &tensor, &mut Vec::new()).unwrap();
            assert_eq!(encoder.residual().is_some(), codec == Codec::Int4);
        }
    }
}
