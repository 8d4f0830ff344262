//! x · W + b.

use burn_tensor::{Gradients, Tensor};
use fusionllm_graph::{OpKind, WeightLayout};

use super::fused::{
    self, AccumulatedLinear, DeferredLinear, FrozenLinear, Fused, Linear, Operand, SetAside, WeightSum,
};
use super::{Arguments, RealValue};
use crate::ExecutorError;

/// x [.., inputs] → [.., outputs].
pub(super) fn forward(
    arguments: &Arguments<'_>,
    inputs: usize,
    outputs: usize,
    bias: bool,
    layout: WeightLayout,
) -> Result<RealValue, ExecutorError> {
    let x = arguments.real(0)?;
    let weight = arguments.param(0)?;
    let bias = if bias { Some(arguments.param(1)?) } else { None };
    let op = Linear { inputs, outputs, layout };
    let fused = match &bias {
        Some(bias) => fused::apply(op, [Operand::of(&x.tensor), Operand::of(&weight), Operand::of(bias)]),
        None => fused::apply(op, [Operand::of(&x.tensor), Operand::of(&weight)]),
    };
    let tensor = fused.unwrap_or_else(|| plain(x.tensor.clone(), weight, bias, op));
    Ok(RealValue { tensor, shape: with_last(&x.shape, outputs) })
}

/// As [`forward`], with parameters that are constants.
pub(super) fn forward_frozen(arguments: &Arguments<'_>) -> Result<RealValue, ExecutorError> {
    forward_by(arguments, FrozenLinear)
}

/// As [`forward`], with the gradient of the weight added to `sum` in BP.
pub(super) fn forward_accumulated(
    arguments: &Arguments<'_>,
    sum: WeightSum,
    aside: Option<SetAside>,
) -> Result<RealValue, ExecutorError> {
    forward_by(arguments, |op| AccumulatedLinear { op, sum, aside })
}

/// As [`forward`], with another fused op where one may be run.
fn forward_by<F: Fused<2> + Fused<3>>(
    arguments: &Arguments<'_>,
    op: impl FnOnce(Linear) -> F,
) -> Result<RealValue, ExecutorError> {
    let OpKind::Linear { inputs, outputs, bias, layout } = arguments.op.kind else {
        return Err(ExecutorError::Internal { what: format!("op `{}` is not linear", arguments.op.name) });
    };
    let op = op(Linear { inputs, outputs, layout });
    let x = arguments.real(0)?;
    let (of_x, of_weight) = (Operand::of(&x.tensor), Operand::of(&arguments.param(0)?));
    let fused = if bias {
        fused::apply(op, [of_x, of_weight, Operand::of(&arguments.param(1)?)])
    } else {
        fused::apply(op, [of_x, of_weight])
    };
    match fused {
        Some(tensor) => Ok(RealValue { tensor, shape: with_last(&x.shape, outputs) }),
        None => forward(arguments, inputs, outputs, bias, layout),
    }
}

fn with_last(shape: &[usize], outputs: usize) -> Vec<usize> {
    let mut shape = shape.to_vec();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    shape
}

/// What FP keeps of an op whose BP leaves the gradient of the weight for later.
#[derive(Debug)]
pub(crate) struct Deferred {
    op: Linear,
    /// The op's input [rows, inputs], without autodiff.
    x: Tensor<2>,
    /// A leaf whose gradient is that of the output.
    probe: Tensor<2>,
}

/// A weight's gradient that is still to be made.
#[derive(Clone, Debug)]
pub(crate) struct WeightGradient {
    op: Linear,
    x: Tensor<2>,
    output_gradient: Tensor<2>,
}

/// As [`forward`], with the gradient of the weight left for later.
pub(super) fn forward_deferred(arguments: &Arguments<'_>) -> Result<(RealValue, Deferred), ExecutorError> {
    let OpKind::Linear { inputs, outputs, bias, layout } = arguments.op.kind else {
        let what = format!("op `{}` is not linear, so its BP is done at once", arguments.op.name);
        return Err(ExecutorError::Internal { what });
    };
    let x = arguments.real(0)?;
    let weight = arguments.param(0)?.inner().autodiff();
    let bias = if bias { Some(arguments.param(1)?) } else { None };
    let (tensor, kept) = deferred(x.tensor.clone(), weight, bias, Linear { inputs, outputs, layout });
    Ok((RealValue { tensor, shape: with_last(&x.shape, outputs) }, kept))
}

/// As [`plain`], by whatever is fastest; the weight is a constant.
pub(super) fn deferred(x: Tensor<2>, weight: Tensor<1>, bias: Option<Tensor<1>>, op: Linear) -> (Tensor<2>, Deferred) {
    let probe = Tensor::<2>::zeros([1, 1], &weight.device()).require_grad();
    let [of_x, of_probe] = [&x, &probe].map(Operand::of);
    let of_weight = Operand::of(&weight);
    let fused = match &bias {
        Some(bias) => fused::apply(DeferredLinear(op), [of_x, of_weight, of_probe, Operand::of(bias)]),
        None => fused::apply(DeferredLinear(op), [of_x, of_weight, of_probe]),
    };
    match fused {
        Some(output) => (output, Deferred { op, x: x.inner(), probe }),
        None => deferred_plain(x, weight, bias, op),
    }
}

/// The same in Burn's operations: adding zeros is what lets the gradient of the output be seen.
pub(super) fn deferred_plain(
    x: Tensor<2>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    op: Linear,
) -> (Tensor<2>, Deferred) {
    let output = plain(x.clone(), weight, bias, op);
    let probe = output.clone().inner().zeros_like().autodiff().require_grad();
    (output + probe.clone(), Deferred { op, x: x.inner(), probe })
}

impl Deferred {
    /// What is left to be done after BP.
    pub(crate) fn after(self, tape: &mut Gradients) -> Option<WeightGradient> {
        let output_gradient = self.probe.grad_remove(tape)?;
        Some(WeightGradient { op: self.op, x: self.x, output_gradient })
    }
}

impl WeightGradient {
    /// Adds it to the sum over micro-batches, [inputs · outputs].
    pub(crate) fn add_to(self, sum: Option<Tensor<1>>) -> Tensor<1> {
        let Self { op, x, output_gradient } = self;
        let on_cpu = |t: &Tensor<2>| fused::into_cpu(t.clone()).ok();
        match (on_cpu(&x), on_cpu(&output_gradient)) {
            (Some(x), Some(gradient)) => {
                let sum = sum.and_then(|sum| fused::into_cpu(sum).ok());
                fused::from_cpu(op.add_weight_gradient(sum, &x, &gradient))
            }
            _ => {
                let term = match op.layout {
                    WeightLayout::InOut => x.transpose().matmul(output_gradient),
                    WeightLayout::OutIn => output_gradient.transpose().matmul(x),
                };
                let term = term.reshape([op.inputs * op.outputs]);
                match sum {
                    Some(sum) => sum + term,
                    None => term,
                }
            }
        }
    }
}

/// The same in Burn's operations.
pub(super) fn plain(x: Tensor<2>, weight: Tensor<1>, bias: Option<Tensor<1>>, op: Linear) -> Tensor<2> {
    let weight = match op.layout {
        WeightLayout::InOut => weight.reshape([op.inputs, op.outputs]),
        WeightLayout::OutIn => weight.reshape([op.outputs, op.inputs]).transpose(),
    };
    burn_tensor::module::linear(x, weight, bias)
}
