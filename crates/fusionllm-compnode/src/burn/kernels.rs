//! FP of each op on Burn tensors; Burn's autodiff derives BP.
//!
//! The only exhaustive dispatch into `kernels/`, which mirrors `graph/ops/`. Real tensors are kept as matrices
//! `[rows, columns]`: all leading dimensions together, and the last. Legend: B batch, S sequence, D model,
//! H heads, K head dimension, V vocabulary, N = B·S; of images
//! [B, C, H, W] batch, channels, height and width.

mod activation;
mod attention;
mod batch_norm2d;
mod conv2d;
mod dropout;
mod elementwise;
mod embedding;
pub(crate) mod fused;
mod linear;
mod loss;
mod norm;
mod pool;
mod position;
mod rotary;

use burn_tensor::{Device, Int, Tensor};
use fusionllm_graph::{Op, OpKind};

use crate::ExecutorError;

pub(crate) use batch_norm2d::Moments;
use fused::{SetAside, WeightSum, Window};
pub(crate) use linear::{Deferred, WeightGradient};
pub(crate) use rotary::AngleTables;

/// A real tensor of logical shape `shape`, held as `[rows, columns]`.
#[derive(Clone, Debug)]
pub(crate) struct RealValue {
    pub(crate) tensor: Tensor<2>,
    pub(crate) shape: Vec<usize>,
}

/// An integer tensor of logical shape `shape`, held flat.
#[derive(Clone, Debug)]
pub(crate) struct IntegerValue {
    pub(crate) tensor: Tensor<1, Int>,
    pub(crate) shape: Vec<usize>,
}

/// The output of an op.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    Real(RealValue),
    Integer(IntegerValue),
}

/// What a kernel may look at besides its inputs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KernelContext<'a> {
    pub(crate) device: &'a Device,
    /// Training, not evaluation.
    pub(crate) training: bool,
    /// Seed of what is random in this op and micro-batch.
    pub(crate) seed: [u8; 32],
    /// What rotary ops have been computed with.
    pub(crate) angles: &'a AngleTables,
}

/// Inputs and parameters of an op, in its documented order. Parameters are flat.
#[derive(Debug)]
pub(crate) struct Arguments<'a> {
    pub(crate) op: &'a Op,
    pub(crate) inputs: Vec<Value>,
    pub(crate) params: Vec<Tensor<1>>,
}

impl Arguments<'_> {
    pub(crate) fn real(&self, index: usize) -> Result<&RealValue, ExecutorError> {
        match self.inputs.get(index) {
            Some(Value::Real(value)) => Ok(value),
            Some(Value::Integer(_)) | None => Err(self.misfit("real input", index)),
        }
    }

    pub(crate) fn integer(&self, index: usize) -> Result<&IntegerValue, ExecutorError> {
        match self.inputs.get(index) {
            Some(Value::Integer(value)) => Ok(value),
            Some(Value::Real(_)) | None => Err(self.misfit("integer input", index)),
        }
    }

    pub(crate) fn param(&self, index: usize) -> Result<Tensor<1>, ExecutorError> {
        self.params.get(index).cloned().ok_or_else(|| self.misfit("parameter", index))
    }

    fn misfit(&self, what: &str, index: usize) -> ExecutorError {
        ExecutorError::Internal { what: format!("op `{}` lacks {what} {index}", self.op.name) }
    }
}

/// FP of one op. The graph has checked all shapes.
pub(crate) fn forward(arguments: &Arguments<'_>, context: KernelContext<'_>) -> Result<Value, ExecutorError> {
    let real = |value: Result<RealValue, ExecutorError>| value.map(Value::Real);
    match &arguments.op.kind {
        OpKind::Input { .. } | OpKind::Label { .. } => Err(ExecutorError::MissingInput {
            op: arguments.op.name.clone(),
            input: "a batch of the data owner".to_owned(),
        }),
        OpKind::Embedding { vocab, dim } => real(embedding::forward(arguments, *vocab, *dim)),
        OpKind::Position { positions, dim } => real(position::forward(arguments, *positions, *dim)),
        OpKind::LayerNorm { eps, .. } => real(norm::forward(arguments, *eps)),
        OpKind::RmsNorm { eps, .. } => real(norm::rms(arguments, *eps)),
        OpKind::Rotary { head_dim, base, scaling } => {
            real(rotary::forward(arguments, *head_dim, *base, scaling, context.angles))
        }
        OpKind::Linear { inputs, outputs, bias, layout } => {
            real(linear::forward(arguments, *inputs, *outputs, *bias, *layout))
        }
        OpKind::Attention { heads, causal } => real(attention::forward(arguments, *heads, *causal)),
        OpKind::GroupedAttention { heads, kv_heads, causal } => {
            real(attention::grouped(arguments, *heads, *kv_heads, *causal))
        }
        OpKind::Activation { function } => real(activation::forward(arguments, *function)),
        OpKind::Add => real(elementwise::add(arguments)),
        OpKind::Mul => real(elementwise::mul(arguments)),
        OpKind::Scale { factor } => real(elementwise::scale(arguments, *factor)),
        OpKind::Dropout { p } => real(dropout::forward(arguments, *p, context)),
        OpKind::Conv2d { inputs, outputs, kernel, stride, padding, bias } => {
            let window = Window { kernel: *kernel, stride: *stride, padding: *padding };
            real(conv2d::forward(arguments, [*inputs, *outputs], window, *bias))
        }
        OpKind::BatchNorm2d { eps, .. } if context.training => {
            real(batch_norm2d::train(arguments, *eps).map(|(value, _)| value))
        }
        OpKind::BatchNorm2d { eps, .. } => real(batch_norm2d::evaluate(arguments, *eps)),
        OpKind::MaxPool2d { kernel, stride, padding } => {
            real(pool::max(arguments, Window { kernel: *kernel, stride: *stride, padding: *padding }))
        }
        OpKind::GlobalAvgPool => real(pool::global_average(arguments)),
        OpKind::CrossEntropy => real(loss::forward(arguments)),
    }
}

/// FP of a linear op whose BP leaves the gradient of the weight for later.
pub(crate) fn forward_deferred(arguments: &Arguments<'_>) -> Result<(Value, Deferred), ExecutorError> {
    let (value, deferred) = linear::forward_deferred(arguments)?;
    Ok((Value::Real(value), deferred))
}

/// FP of a linear op whose BP adds the gradient of its weight to a sum, but for rows that are set aside.
pub(crate) fn forward_accumulated(
    arguments: &Arguments<'_>,
    sum: WeightSum,
    aside: Option<SetAside>,
) -> Result<Value, ExecutorError> {
    Ok(Value::Real(linear::forward_accumulated(arguments, sum, aside)?))
}

/// FP of a linear op whose parameters are not trained, so that BP needs nothing of its input.
pub(crate) fn forward_frozen(arguments: &Arguments<'_>) -> Result<Value, ExecutorError> {
    Ok(Value::Real(linear::forward_frozen(arguments)?))
}

/// FP of a batch norm in training, and what the micro-batch adds to its running values.
pub(crate) fn forward_norm(arguments: &Arguments<'_>, eps: f64) -> Result<(Value, Moments), ExecutorError> {
    let (value, moments) = batch_norm2d::train(arguments, eps)?;
    Ok((Value::Real(value), moments))
}

/// Share of the labels of a cross-entropy that are the likeliest class.
pub(crate) fn accuracy(arguments: &Arguments<'_>) -> Result<f64, ExecutorError> {
    loss::accuracy(arguments)
}

/// The values of a real tensor.
pub(crate) fn to_vec<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, ExecutorError> {
    let device_error = |reason: String| ExecutorError::Device { reason };
    let data = tensor.try_into_data().map_err(|e| device_error(format!("{e:?}")))?;
    data.try_into_vec::<f32>().map_err(|e| device_error(format!("{e:?}")))
}

/// Batch, channels, height and width of images that the op of this name reads.
fn image_dims(images: &RealValue, op: &str) -> Result<[usize; 4], ExecutorError> {
    let dims = <[usize; 4]>::try_from(images.shape.as_slice());
    dims.map_err(|_| ExecutorError::Internal { what: format!("op `{op}` reads no images") })
}

/// FP of an embedding whose BP stays outside the tape: the output is a leaf, whose gradient is that of the rows.
pub(crate) fn lookup(arguments: &Arguments<'_>) -> Result<RealValue, ExecutorError> {
    let OpKind::Embedding { vocab, dim } = arguments.op.kind else {
        return Err(ExecutorError::Internal { what: format!("op `{}` is no embedding", arguments.op.name) });
    };
    embedding::lookup(arguments, vocab, dim)
}

#[cfg(test)]
mod tests;
