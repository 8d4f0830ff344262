//! The kinds of op, and the only exhaustive dispatch into their families.

use serde::{Deserialize, Serialize};

use crate::cost::{Cost, Kernels};
use crate::dtype::DType;
use crate::error::Misfit;
use crate::kind::{ActivationFunction, OpClass, ParamRole, WeightLayout};
use crate::ops::activation::Activation;
use crate::ops::attention::Attention;
use crate::ops::batch_norm2d::BatchNorm2d;
use crate::ops::conv2d::Conv2d;
use crate::ops::dropout::Dropout;
use crate::ops::elementwise::Elementwise;
use crate::ops::embedding::Embedding;
use crate::ops::global_avg_pool::GlobalAvgPool;
use crate::ops::grouped_attention::GroupedAttention;
use crate::ops::image::Window;
use crate::ops::linear::Linear;
use crate::ops::loss::CrossEntropy;
use crate::ops::max_pool2d::MaxPool2d;
use crate::ops::norm::LayerNorm;
use crate::ops::placeholder::Placeholder;
use crate::ops::position::Position;
use crate::ops::rms_norm::RmsNorm;
use crate::ops::rotary::Rotary;
use crate::ops::scale::Scale;
use crate::rotary::RotaryScaling;
use crate::rule::{Io, Rule};
use crate::shape::{Shape, TensorType};

/// What an op does, with its attributes. In JSON `{"op": "linear", ...}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum OpKind {
    /// Placeholder for what the model reads: token ids `[B, S]` i32, or features.
    Input {
        /// Type of its elements.
        dtype: DType,
        /// `[B, ...]`, all but the first dimension fixed.
        shape: Shape,
    },
    /// Placeholder for the labels, i32.
    Label {
        /// `[B, ...]`, all but the first dimension fixed.
        shape: Shape,
    },
    /// Table look-up. Parameters: weight `[vocab, dim]`. `[B, S]` i32 to `[B, S, dim]`.
    Embedding {
        /// Rows of the table.
        vocab: usize,
        /// Width of a row.
        dim: usize,
    },
    /// Adds a learnt vector per position. Parameters: weight `[positions, dim]`.
    /// `[B, S, dim]` to input + weight`[0..S]`.
    Position {
        /// Rows of the table: the longest sequence.
        positions: usize,
        /// Width of a row.
        dim: usize,
    },
    /// Layer norm over the last dimension. Parameters: weight `[dim]`, bias `[dim]`.
    LayerNorm {
        /// Size of the last dimension.
        dim: usize,
        /// Added to the variance.
        eps: f64,
    },
    /// Root-mean-square norm of each group of `dim` elements of the last dimension, which is a multiple of `dim`: a head
    /// for example. Parameters: weight `[dim]`.
    RmsNorm {
        /// Size of a group.
        dim: usize,
        /// Added to the mean square.
        eps: f64,
    },
    /// Turns each head of `[B, S, H * head_dim]` by its position: element i of a head's first half goes with element i of
    /// its second half, as in Hugging Face's models.
    Rotary {
        /// Size of a head, even.
        head_dim: usize,
        /// The longest wavelength is 2π times about this many positions. Hugging Face's `rope_theta`.
        base: f64,
        /// How frequencies change for sequences longer than the model was made for.
        #[serde(default, skip_serializing_if = "RotaryScaling::is_none")]
        scaling: RotaryScaling,
    },
    /// Affine map of the last dimension. Parameters: weight (see [`WeightLayout`]), bias `[outputs]` if `bias`.
    Linear {
        /// Size of the input's last dimension.
        inputs: usize,
        /// Size of the output's last dimension.
        outputs: usize,
        /// Whether there is a bias.
        bias: bool,
        /// How the weight lies.
        layout: WeightLayout,
    },
    /// Scaled dot-product attention core: packed query, key, value `[B, S, 3D]` to `[B, S, D]`.
    Attention {
        /// Heads; divides D.
        heads: usize,
        /// Whether a position sees only itself and those before it.
        causal: bool,
    },
    /// Scaled dot-product attention core of three inputs: query `[B, S, heads * K]`, key and value
    /// `[B, S, kv_heads * K]`, each head of which serves heads / kv_heads heads of queries, to `[B, S, heads * K]`.
    GroupedAttention {
        /// Heads of queries.
        heads: usize,
        /// Heads of keys and values; divides `heads`.
        kv_heads: usize,
        /// Whether a position sees only itself and those before it.
        causal: bool,
    },
    /// Elementwise non-linearity.
    Activation {
        /// Which function is applied to each element.
        function: ActivationFunction,
    },
    /// Sum of two tensors of one shape.
    Add,
    /// Elementwise product of two tensors of one shape.
    Mul,
    /// Product with a number.
    Scale {
        /// The number, finite and not 0.
        factor: f64,
    },
    /// Zeroes elements with probability `p` in training and scales the rest by 1/(1-p).
    Dropout {
        /// Probability, at least 0 and less than 1.
        p: f64,
    },
    /// Convolution. Parameters: weight `[outputs, inputs, kernel, kernel]`, bias `[outputs]` if `bias`.
    /// `[B, inputs, H, W]` to `[B, outputs, H', W']`.
    Conv2d {
        /// Channels of the input.
        inputs: usize,
        /// Channels of the output.
        outputs: usize,
        /// Side of the square window.
        kernel: usize,
        /// Step of the window.
        stride: usize,
        /// Zeros on every side.
        padding: usize,
        /// Whether there is a bias.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        bias: bool,
    },
    /// Batch norm over batch, height and width. Parameters, each `[channels]`: weight, bias, running mean and running
    /// variance, which are frozen. In training a micro-batch is normalised by its own mean and (biased) variance, and each
    /// moves the running values towards its mean and its unbiased variance; in evaluation those are what counts.
    BatchNorm2d {
        /// Channels, of which each has a mean and a variance.
        channels: usize,
        /// Added to the variance.
        eps: f64,
        /// Share of the way to a micro-batch's values that the running ones go. PyTorch's `momentum`.
        #[serde(default = "default_momentum")]
        momentum: f64,
    },
    /// Largest element of each window: `[B, C, H, W]` to `[B, C, H', W']`.
    MaxPool2d {
        /// Side of the square window.
        kernel: usize,
        /// Step of the window.
        stride: usize,
        /// Padding on every side.
        padding: usize,
    },
    /// Mean over height and width: `[B, C, H, W]` to `[B, 1, C]`.
    GlobalAvgPool,
    /// Loss: logits `[B, S, V]` f32 and labels `[B, S]` i32 to the mean cross-entropy over all B*S tokens, a scalar.
    CrossEntropy,
}

/// PyTorch's.
fn default_momentum() -> f64 {
    0.1
}

impl OpKind {
    /// The op's class.
    pub fn class(&self) -> OpClass {
        self.rule().class()
    }

    /// The op's family, `"linear"` for example: the tag of its JSON form.
    pub fn family(&self) -> &'static str {
        self.rule().family()
    }

    /// What changes its speed besides the types of its inputs and output, in a word: `gelu-tanh`.
    pub(crate) fn variant(&self) -> Option<String> {
        self.rule().variant()
    }

    /// The parameters it takes, in the order of [`crate::Op::params`].
    pub fn param_roles(&self) -> Vec<ParamRole> {
        self.rule().params()
    }

    /// The output's type for inputs of these types.
    ///
    /// # Errors
    /// The number of inputs, their types, or an attribute do not fit.
    pub fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        self.rule().infer(inputs)
    }

    /// The cost of one micro-batch of `batch` rows, for types that [`OpKind::infer`] took and gave.
    pub fn cost(&self, inputs: &[&TensorType], output: &TensorType, batch: usize) -> Cost {
        self.rule().cost(&Io { inputs, output, batch })
    }

    /// As [`OpKind::cost`], where none of the op's parameters is trained; nothing if that changes little.
    pub fn frozen_cost(&self, inputs: &[&TensorType], output: &TensorType, batch: usize) -> Option<Cost> {
        self.rule().frozen_cost(&Io { inputs, output, batch })
    }

    /// What BP reads of FP, of [`OpKind::cost`], as these kernels keep it.
    pub(crate) fn kept_bytes(
        &self,
        inputs: &[&TensorType],
        output: &TensorType,
        batch: usize,
        kernels: Kernels,
    ) -> u64 {
        let (rule, io) = (self.rule(), Io { inputs, output, batch });
        let fused = (kernels == Kernels::Fused).then(|| rule.fused_kept_bytes(&io)).flatten();
        fused.unwrap_or_else(|| rule.cost(&io).kept_bytes)
    }

    /// The one dispatch: adding a kind of op makes the compiler ask for its line here.
    fn rule(&self) -> Box<dyn Rule + '_> {
        match *self {
            Self::Input { dtype, ref shape } => Box::new(Placeholder { family: "input", dtype, shape }),
            Self::Label { ref shape } => Box::new(Placeholder { family: "label", dtype: DType::I32, shape }),
            Self::Embedding { vocab, dim } => Box::new(Embedding { vocab, dim }),
            Self::Position { positions, dim } => Box::new(Position { positions, dim }),
            Self::LayerNorm { dim, eps } => Box::new(LayerNorm { dim, eps }),
            Self::RmsNorm { dim, eps } => Box::new(RmsNorm { dim, eps }),
            Self::Rotary { head_dim, base, ref scaling } => Box::new(Rotary { head_dim, base, scaling }),
            Self::Linear { inputs, outputs, bias, layout } => Box::new(Linear { inputs, outputs, bias, layout }),
            // The mask changes neither shape nor cost.
            Self::Attention { heads, causal: _ } => Box::new(Attention { heads }),
            Self::GroupedAttention { heads, kv_heads, causal: _ } => Box::new(GroupedAttention { heads, kv_heads }),
            Self::Activation { function } => Box::new(Activation { function }),
            Self::Add => Box::new(Elementwise::Add),
            Self::Mul => Box::new(Elementwise::Mul),
            Self::Scale { factor } => Box::new(Scale { factor }),
            Self::Dropout { p } => Box::new(Dropout { p }),
            Self::Conv2d { inputs, outputs, kernel, stride, padding, bias } => {
                Box::new(Conv2d { inputs, outputs, window: Window { kernel, stride, padding }, bias })
            }
            Self::BatchNorm2d { channels, eps, momentum } => Box::new(BatchNorm2d { channels, eps, momentum }),
            Self::MaxPool2d { kernel, stride, padding } => {
                Box::new(MaxPool2d { window: Window { kernel, stride, padding } })
            }
            Self::GlobalAvgPool => Box::new(GlobalAvgPool),
            Self::CrossEntropy => Box::new(CrossEntropy),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_of_each() -> Vec<OpKind> {
        let shape = Shape::batched(&[4]);
        vec![
            OpKind::Input { dtype: DType::I32, shape: shape.clone() },
            OpKind::Label { shape },
            OpKind::Embedding { vocab: 9, dim: 6 },
            OpKind::Position { positions: 4, dim: 6 },
            OpKind::LayerNorm { dim: 6, eps: 1e-5 },
            OpKind::RmsNorm { dim: 6, eps: 1e-5 },
            OpKind::Rotary { head_dim: 6, base: 1e4, scaling: RotaryScaling::None },
            OpKind::Rotary { head_dim: 6, base: 1e4, scaling: RotaryScaling::Linear { factor: 2.0 } },
            OpKind::Linear { inputs: 6, outputs: 3, bias: true, layout: WeightLayout::InOut },
            OpKind::Attention { heads: 2, causal: true },
            OpKind::GroupedAttention { heads: 4, kv_heads: 2, causal: true },
            OpKind::Activation { function: ActivationFunction::GeluTanh },
            OpKind::Add,
            OpKind::Mul,
            OpKind::Scale { factor: 2.0 },
            OpKind::Dropout { p: 0.1 },
            OpKind::Conv2d { inputs: 3, outputs: 4, kernel: 3, stride: 1, padding: 1, bias: false },
            OpKind::Conv2d { inputs: 3, outputs: 4, kernel: 3, stride: 1, padding: 1, bias: true },
            OpKind::BatchNorm2d { channels: 4, eps: 1e-5, momentum: 0.1 },
            OpKind::MaxPool2d { kernel: 2, stride: 2, padding: 0 },
            OpKind::GlobalAvgPool,
            OpKind::CrossEntropy,
        ]
    }

    #[test]
    fn the_family_is_the_json_tag_and_json_round_trips() {
        for kind in one_of_each() {
            let json = serde_json::to_value(&kind).unwrap();
            assert_eq!(json["op"], kind.family());
            assert_eq!(serde_json::from_value::<OpKind>(json).unwrap(), kind);
        }
    }

    #[test]
    fn only_the_parameter_class_takes_parameters() {
        for kind in one_of_each() {
            assert_eq!(kind.class() == OpClass::Parameter, !kind.param_roles().is_empty(), "{kind:?}");
        }
    }

    #[test]
    fn an_unknown_attribute_is_refused() {
        let error = serde_json::from_str::<OpKind>(r#"{"op":"dropout","p":0.1,"q":1}"#).unwrap_err();
        assert!(error.to_string().contains("unknown field `q`"), "{error}");
    }
}
