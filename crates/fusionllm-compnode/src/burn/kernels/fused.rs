//! Ops whose FP and BP are loops of our own on the CPU backend, each a node of Burn's autodiff.
//!
//! Burn composes a layer norm, an attention or a loss of a dozen passes over memory, each with a new buffer; here one
//! op is one pass, or a few matrix products. On other backends, and for tensors of mixed tracking, [`apply`] declines
//! and the op's plain form in Burn runs.

mod accumulated;
mod attention;
mod batch_norm;
mod conv2d;
mod cross_entropy;
mod fan;
mod gated;
mod layer_norm;
mod linear;
mod matrix;
mod max_pool;
mod rms_norm;
mod rotary;
mod seeded;
mod vector;

use std::fmt;

use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::NoCheckpointing;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};
use burn_flex::{Flex, FlexTensor, Layout};
use burn_tensor::{BackendPrimitive, Bytes, DType, Device, Float, Shape, Tensor};

pub(crate) use accumulated::{AccumulatedLinear, SetAside, WeightSum};
pub(crate) use attention::{Attention, GroupedAttention, PackedAttention};
pub(crate) use batch_norm::{BatchNorm, moments_of};
pub(crate) use conv2d::{Conv2d, Window};
pub(crate) use cross_entropy::CrossEntropy;
pub(crate) use fan::Fan;
pub(crate) use gated::Gated;
pub(crate) use layer_norm::LayerNorm;
pub(crate) use linear::{DeferredLinear, FrozenLinear, Linear};
pub(crate) use max_pool::MaxPool;
pub(crate) use rms_norm::RmsNorm;
pub(crate) use rotary::Rotary;
pub(crate) use seeded::Seeded;

type Tracked = <Float as BackendPrimitive<Autodiff<Flex>>>::Primitive;

/// Elements that one task of a parallel loop works on: enough to be worth handing out, and a few fit the L2 cache.
pub(crate) const TASK: usize = 16 << 10;

/// An op of `N` real inputs with FP and BP over slices.
pub(crate) trait Fused<const N: usize>: Clone + fmt::Debug + Send + 'static {
    /// What BP needs of FP.
    type Saved: Clone + fmt::Debug + Send + 'static;

    /// FP. Inputs are contiguous.
    fn forward(&self, inputs: [FlexTensor; N]) -> (FlexTensor, Self::Saved);

    /// BP: the gradient of each input that is `wanted`, from that of the output, which is contiguous.
    fn backward(&self, saved: Self::Saved, gradient: FlexTensor, wanted: [bool; N]) -> [Option<FlexTensor>; N];
}

/// A tensor of the CPU backend.
#[derive(Clone, Debug)]
pub(crate) enum Operand {
    /// A tensor that no gradient is wanted of.
    Plain(FlexTensor),
    /// A tensor on the autodiff tape.
    Tracked(Tracked),
}

impl Operand {
    /// The tensor, if it lives on the CPU backend.
    pub(crate) fn of<const D: usize>(tensor: &Tensor<D>) -> Option<Self> {
        match tensor.clone().try_into_primitive::<Flex>() {
            Ok(plain) => Some(Self::Plain(plain)),
            Err(_) => tensor.clone().try_into_primitive::<Autodiff<Flex>>().ok().map(Self::Tracked),
        }
    }
}

/// Whether tensors of a device live on the CPU backend.
pub(crate) fn is_cpu(device: &Device) -> bool {
    into_cpu(Tensor::<1>::zeros([1], device)).is_ok()
}

/// The tensor behind a tensor outside autodiff, if it lives on the CPU backend; else the tensor again.
pub(crate) fn into_cpu<const D: usize>(tensor: Tensor<D>) -> Result<FlexTensor, Box<Tensor<D>>> {
    let again = tensor.clone();
    tensor.try_into_primitive::<Flex>().map_err(|_| Box::new(again))
}

/// A tensor of the CPU backend as Burn's.
pub(crate) fn from_cpu<const D: usize>(tensor: FlexTensor) -> Tensor<D> {
    Tensor::from_primitive::<Flex>(tensor)
}

/// sum + term, in place and on all threads on the CPU.
pub(crate) fn accumulate(sum: Tensor<1>, term: Tensor<1>) -> Tensor<1> {
    match (into_cpu(sum), into_cpu(term)) {
        (Ok(mut sum), Ok(term)) => {
            vector::add_into(sum.storage_mut(), term.to_contiguous().storage());
            from_cpu(sum)
        }
        (sum, term) => sum.map_or_else(|t| *t, from_cpu) + term.map_or_else(|t| *t, from_cpu),
    }
}

/// sumᵢ ← sumᵢ + termᵢ, on all threads. The slices are equally long.
pub(crate) fn add_into(sum: &mut [f32], term: &[f32]) {
    vector::add_into(sum, term);
}

/// The sum of squares of a tensor on the CPU, in one pass.
pub(crate) fn sum_of_squares(tensor: &Tensor<1>) -> Option<f64> {
    let tensor = into_cpu(tensor.clone()).ok()?;
    tensor.as_slice::<f32>().map(vector::sum_of_squares)
}

/// Runs a fused op, or gives nothing if not all operands are of the CPU backend and of one tracking.
pub(crate) fn apply<F: Fused<N>, const N: usize, const D: usize>(
    op: F,
    operands: [Option<Operand>; N],
) -> Option<Tensor<D>> {
    let mut plain = Vec::with_capacity(N);
    let mut tracked = Vec::with_capacity(N);
    for operand in operands {
        match operand? {
            Operand::Plain(tensor) => plain.push(tensor.to_contiguous()),
            Operand::Tracked(tensor) => tracked.push(tensor),
        }
    }
    if let Ok(inputs) = <[FlexTensor; N]>::try_from(plain) {
        return Some(from_cpu(op.forward(inputs).0));
    }
    let tracked = <[Tracked; N]>::try_from(tracked).ok()?;
    let guards = tracked.each_ref().map(Tracked::node);
    let inputs = tracked.map(|tensor| tensor.into_primitive().to_contiguous());
    let (output, saved) = op.forward(inputs);
    let output = match Node(op).prepare::<NoCheckpointing>(guards).compute_bound().stateful() {
        OpsKind::Tracked(prepared) => prepared.finish(saved, output),
        OpsKind::UnTracked(prepared) => prepared.finish(output),
    };
    Some(Tensor::from_primitive::<Autodiff<Flex>>(output))
}

/// A fused op on the autodiff tape.
#[derive(Clone, Debug)]
struct Node<F>(F);

impl<F: Fused<N>, const N: usize> Backward<Flex, N> for Node<F> {
    type State = F::Saved;

    fn backward(self, ops: Ops<F::Saved, N>, gradients: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let gradient = gradients.consume::<Flex>(&ops.node);
        // Not `to_contiguous`, whose second handle would keep the loops from working in place.
        let gradient = if is_whole(&gradient) { gradient } else { gradient.to_contiguous() };
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let inputs = self.0.backward(ops.state, gradient, wanted);
        for (parent, input) in ops.parents.into_iter().zip(inputs) {
            if let (Some(parent), Some(input)) = (parent, input) {
                gradients.register::<Flex>(parent.id, input);
            }
        }
    }
}

/// Whether a tensor is all of its buffer, row by row.
fn is_whole(tensor: &FlexTensor) -> bool {
    let elements = tensor.layout().num_elements();
    tensor.is_contiguous() && tensor.layout().start_offset() == 0 && tensor.bytes().len() == elements * 4
}

/// A new tensor of real values, row by row.
fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape.into()), DType::F32)
}

/// Zeros of a tensor's shape.
pub(crate) fn zeros(like: &FlexTensor) -> FlexTensor {
    FlexTensor::zeros(like.layout().shape().clone(), DType::F32)
}

/// Rows of `columns` elements that one task takes.
fn rows_per_task(columns: usize) -> usize {
    (TASK / columns.max(1)).max(1)
}

/// The rows and columns of a matrix.
fn dims(tensor: &FlexTensor) -> (usize, usize) {
    match *tensor.layout().shape().as_slice() {
        [rows, columns] => (rows, columns),
        _ => (1, tensor.layout().num_elements()),
    }
}

#[cfg(test)]
mod tests;
