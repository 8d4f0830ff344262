//! The two ends of one direction of one boundary edge, and what they remember from tensor to tensor.
//!
//! The encoder sends `x + residual − prediction`, where the residual is what it failed to send before (error
//! feedback) and the prediction is what the decoder expects. The decoder adds the prediction to what it decodes.
//! Tensors must be decoded in the order in which they were encoded, each once.

mod prediction;

use serde::{Deserialize, Serialize};

use crate::codecs::basis::Basis;
use crate::codecs::transform::{self, Layout, Policy, Sender};
use crate::codecs::{Scratch, subspace::square_sum, topk::finite};
use crate::tensor::element_count;
use crate::{Codec, CodecError};
use prediction::MeanPrediction;

/// How an edge is encoded beyond its codec. Both ends must agree on `predict`; the rest is the encoder's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EdgeOptions {
    /// Add what was dropped of a tensor to the next of the same shape. Costs one f32 an element at the encoder.
    pub error_feedback: bool,
    /// Send the difference to the running column mean (over all but the last dimension) of what was decoded, so
    /// that channels with a constant offset need not be sent again and again.
    pub predict: bool,
    /// Round so that sums are right on average, rather than each number to the nearest, where the codec can
    /// (`transform`). For gradients.
    pub unbiased: bool,
    /// Messages after which a basis is replaced; 0: so many that bases add a tenth to the bytes.
    pub refresh_every: u32,
    /// Factor by which the relative error of a basis may grow before it is replaced early.
    pub refresh_growth: f64,
}

/// Neither feedback nor prediction, a new basis so often that it adds a tenth to the bytes, or when its error grows by
/// half.
impl Default for EdgeOptions {
    fn default() -> Self {
        let Policy { refresh_every, growth, .. } = Policy::default();
        Self { error_feedback: false, predict: false, unbiased: false, refresh_every, refresh_growth: growth }
    }
}

/// What became of one tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Encoded {
    /// Bytes that were appended.
    pub bytes: u64,
    /// Norm of what was dropped over the norm of what was to be sent (tensor and residual), without elements where
    /// either is not finite; where it was asked for.
    pub relative_error: Option<f64>,
}

/// What an end of an edge must not forget, for a checkpoint. Of a decoder, only basis and prediction are set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EdgeState {
    shape: Vec<usize>,
    residual: Vec<f32>,
    sender: Sender,
    prediction: MeanPrediction,
}

impl EdgeState {
    fn check(&self) -> Result<(), CodecError> {
        let wrong = |what| Err(CodecError::State { what });
        if !self.residual.is_empty() && element_count(&self.shape)? != self.residual.len() as u64 {
            return wrong("the residual does not fill its shape");
        }
        if !self.residual.iter().chain(self.prediction.values()).all(|x| x.is_finite()) {
            return wrong("a number is not finite");
        }
        if self.sender.basis.as_ref().is_some_and(|basis| !basis.is_sound()) {
            return wrong("the basis is none");
        }
        Ok(())
    }
}

/// The sending end of one direction of one boundary edge.
#[derive(Debug, Default)]
pub struct EdgeEncoder {
    options: EdgeOptions,
    state: EdgeState,
    scratch: Scratch,
    /// What is to be sent, where it is not the tensor itself.
    input: Vec<f32>,
    /// What the decoder makes of it, before it adds its prediction.
    decoded: Vec<f32>,
    sums: prediction::Sums,
}

impl EdgeEncoder {
    /// An encoder that has sent nothing yet.
    pub fn new(options: EdgeOptions) -> Self {
        Self { options, ..Self::default() }
    }

    /// Appends the encoding of row-major `values` to `out`.
    ///
    /// # Errors
    /// [`CodecError::ValueCount`] if the values do not fill the shape, [`CodecError::ShapeOverflow`]. Then nothing is
    /// appended or remembered.
    pub fn encode(
        &mut self,
        codec: Codec,
        shape: &[usize],
        values: &[f32],
        out: &mut Vec<u8>,
    ) -> Result<Encoded, CodecError> {
        self.encode_and_measure(codec, shape, values, out, false)
    }

    /// As [`Self::encode`], and says how much was dropped if `measure`; about the cost of decoding.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_and_measure(
        &mut self,
        codec: Codec,
        shape: &[usize],
        values: &[f32],
        out: &mut Vec<u8>,
        measure: bool,
    ) -> Result<Encoded, CodecError> {
        codec.encoded_bytes(shape)?;
        let (expected, got) = (element_count(shape)?, values.len() as u64);
        if expected != got {
            return Err(CodecError::ValueCount { shape: shape.to_vec(), expected, got });
        }
        let Self { options, state, scratch, input, decoded, sums } = self;
        if options.error_feedback && state.shape != shape {
            state.shape = shape.to_vec();
            state.residual.clear();
        }
        let predict = options.predict && !codec.is_lossless();
        if predict {
            state.prediction.fit(shape);
        }
        // With feedback, the tensor is added to the residual, and what was decoded taken from it, in place.
        let input = if options.error_feedback { &mut state.residual } else { input };
        if options.error_feedback || predict {
            add_to(input, values);
            if predict {
                state.prediction.subtract_from(input);
            }
        }
        let sent: &[f32] = if options.error_feedback || predict { input } else { values };
        let start = out.len();
        match transform_layout(codec, shape) {
            Some(layout) => {
                let default = Policy::default();
                let (refresh_every, growth) = (options.refresh_every, options.refresh_growth);
                let policy = Policy { refresh_every, growth, unbiased: options.unbiased, ..default };
                state.sender.encode(layout, policy, sent, &mut scratch.transform, out)?;
            }
            None => codec.encode_f32(shape, sent, scratch, out)?,
        }
        let mut relative_error = None;
        if codec.is_lossless() {
            // The residual has gone with the tensor, so nothing is held back any more.
            input.clear();
            relative_error = measure.then_some(0.0);
        } else if let (Codec::TopK { values: form, .. }, false, false) = (codec, measure, predict) {
            if options.error_feedback {
                scratch.topk.take_kept_out_of(form, &out[start..], input)?;
            }
        } else if measure || options.error_feedback || predict {
            reconstruct(codec, shape, &out[start..], &mut state.sender.basis, scratch, decoded)?;
            if measure {
                let mean = if predict { state.prediction.values() } else { &[] };
                relative_error = Some(relative(sent, decoded, mean));
            }
            if options.error_feedback {
                input.iter_mut().zip(&*decoded).for_each(|(x, y)| *x = finite(*x - y));
            } else {
                input.clear();
            }
            if predict {
                state.prediction.learn(decoded, sums);
            }
        }
        Ok(Encoded { bytes: (out.len() - start) as u64, relative_error })
    }

    /// Whether a tensor's encoding depends on those before it, or changes what those after it become.
    pub fn remembers(&self, codec: Codec) -> bool {
        let EdgeOptions { error_feedback, predict, .. } = self.options;
        let learns = error_feedback || predict || matches!(codec, Codec::Transform { .. });
        self.residual().is_some() || (learns && !codec.is_lossless())
    }

    /// What error feedback adds to the next tensor, and the shape which that must have; none if nothing is kept.
    pub fn residual(&self) -> Option<(&[usize], &[f32])> {
        let EdgeState { shape, residual, .. } = &self.state;
        (!residual.is_empty()).then_some((shape, residual))
    }

    /// Puts a saved [`Self::residual`] back.
    ///
    /// # Errors
    /// [`CodecError::State`] if it does not fill its shape or has a number that is not finite.
    pub fn restore_residual(&mut self, shape: Vec<usize>, residual: Vec<f32>) -> Result<(), CodecError> {
        EdgeState { shape: shape.clone(), residual: residual.clone(), ..EdgeState::default() }.check()?;
        (self.state.shape, self.state.residual) = (shape, residual);
        Ok(())
    }

    /// All that the next tensor's encoding depends on.
    pub fn state(&self) -> &EdgeState {
        &self.state
    }

    /// Goes on from a saved [`Self::state`]; the decoder must go on from its own of the same moment.
    ///
    /// # Errors
    /// [`CodecError::State`] if no encoder can have had this state.
    pub fn restore(&mut self, state: EdgeState) -> Result<(), CodecError> {
        state.check()?;
        self.state = state;
        Ok(())
    }

    /// Bytes of memory that are kept from tensor to tensor: residual, basis and prediction. Work space, which is up
    /// to four f32 an element with feedback and measuring, is not counted.
    pub fn state_bytes(&self) -> u64 {
        state_bytes(&self.state)
    }
}

/// The receiving end of one direction of one boundary edge.
#[derive(Debug, Default)]
pub struct EdgeDecoder {
    predict: bool,
    state: EdgeState,
    scratch: Scratch,
    sums: prediction::Sums,
}

impl EdgeDecoder {
    /// A decoder that has received nothing yet.
    pub fn new(options: EdgeOptions) -> Self {
        Self { predict: options.predict, ..Self::default() }
    }

    /// Replaces `into` by the tensor that `bytes` encode.
    ///
    /// # Errors
    /// A typed error for every byte string that is not an encoding of such a tensor, and
    /// [`CodecError::MissingBasis`] for one that this end cannot follow. Nothing is remembered then, and `into`
    /// holds nothing of worth. Nothing is allocated before the length of `bytes` was held against the shape.
    pub fn decode(
        &mut self,
        codec: Codec,
        shape: &[usize],
        bytes: &[u8],
        into: &mut Vec<f32>,
    ) -> Result<(), CodecError> {
        reconstruct(codec, shape, bytes, &mut self.state.sender.basis, &mut self.scratch, into)?;
        if self.predict && !codec.is_lossless() {
            self.state.prediction.fit(shape);
            self.state.prediction.add_and_learn(into, &mut self.sums);
        }
        Ok(())
    }

    /// All that the next tensor's decoding depends on.
    pub fn state(&self) -> &EdgeState {
        &self.state
    }

    /// Goes on from a saved [`Self::state`]; the encoder must go on from its own of the same moment.
    ///
    /// # Errors
    /// [`CodecError::State`] if no decoder can have had this state.
    pub fn restore(&mut self, state: EdgeState) -> Result<(), CodecError> {
        state.check()?;
        self.state = state;
        Ok(())
    }

    /// Bytes of memory that are kept from tensor to tensor: basis and prediction.
    pub fn state_bytes(&self) -> u64 {
        state_bytes(&self.state)
    }
}

fn state_bytes(state: &EdgeState) -> u64 {
    let numbers = state.residual.capacity() + state.prediction.values().len();
    (numbers * size_of::<f32>() + state.sender.basis.as_ref().map_or(0, Basis::memory_bytes)) as u64
}

/// Outer: whether the codec is `transform`; inner: whether the tensor has elements.
fn transform_layout(codec: Codec, shape: &[usize]) -> Option<Option<Layout>> {
    match codec {
        Codec::Transform { bits } => Some(Layout::of(shape, bits)),
        _ => None,
    }
}

fn reconstruct(
    codec: Codec,
    shape: &[usize],
    bytes: &[u8],
    basis: &mut Option<Basis>,
    scratch: &mut Scratch,
    into: &mut Vec<f32>,
) -> Result<(), CodecError> {
    codec.encoded_bytes(shape)?;
    match transform_layout(codec, shape) {
        Some(layout) => transform::decode(shape, layout, bytes, basis, &mut scratch.transform, into),
        None => codec.decode_f32(shape, bytes, scratch, into),
    }
}

/// Adds the tensor to a residual that fits it, or makes it one.
fn add_to(residual: &mut Vec<f32>, values: &[f32]) {
    if residual.len() == values.len() {
        residual.iter_mut().zip(values).for_each(|(r, x)| *r += x);
    } else {
        residual.clear();
        residual.extend_from_slice(values);
    }
}

/// Relative error of `decoded`, both plus the prediction `mean` of each row.
fn relative(sent: &[f32], decoded: &[f32], mean: &[f32]) -> f64 {
    const BLOCK: usize = 1024;
    let (mut lost, mut whole) = (0.0, 0.0);
    let (mut differences, mut totals) = ([0.0; BLOCK], [0.0; BLOCK]);
    let mut means = mean.iter().cycle();
    for (sent, decoded) in sent.chunks(BLOCK).zip(decoded.chunks(BLOCK)) {
        let count = sent.len();
        for (((difference, total), &x), &y) in differences.iter_mut().zip(&mut totals).zip(sent).zip(decoded) {
            let counts = (x - y).is_finite();
            *difference = if counts { x - y } else { 0.0 };
            *total = if counts { x } else { 0.0 };
        }
        if !mean.is_empty() {
            totals[..count].iter_mut().zip(&mut means).for_each(|(total, mean)| *total += mean);
        }
        lost += square_sum(&differences[..count]);
        whole += square_sum(&totals[..count]);
    }
    if whole > 0.0 { (lost / whole).sqrt() } else { 0.0 }
}

#[cfg(test)]
mod tests;
