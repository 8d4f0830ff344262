//! Conformance of every kernel: its value against the formula written out, its gradient against differences.

use burn_tensor::TensorData;
use fusionllm_codec::{HostTensor, Values};
use fusionllm_graph::{ActivationFunction, DType, OpId, ParamId, RotaryScaling, Shape, TensorType, WeightLayout};

use super::*;
use crate::burn::BurnDevice;
use crate::burn::device;
use crate::burn::host::{to_vec, upload};

/// Differences of the loss are taken over this much of an input.
const STEP: f32 = 1e-2;

/// Numbers without a pattern in [-1, 1).
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| draw()).collect()
}

/// One op on its own: inputs with shapes, parameters flat.
struct Case {
    kind: OpKind,
    shapes: Vec<Vec<usize>>,
    inputs: Vec<Vec<f32>>,
    ids: Option<(Vec<usize>, Vec<i32>)>,
    params: Vec<Vec<f32>>,
    training: bool,
}

impl Case {
    fn new(kind: OpKind, shapes: &[&[usize]], param_sizes: &[usize]) -> Self {
        let inputs = (1..).zip(shapes).map(|(seed, s)| numbers(s.iter().product(), seed)).collect();
        let params = (50..).zip(param_sizes).map(|(seed, &n)| numbers(n, seed)).collect();
        let shapes = shapes.iter().map(|s| s.to_vec()).collect();
        Self { kind, shapes, inputs, ids: None, params, training: true }
    }

    fn with_ids(mut self, shape: &[usize], ids: &[i32]) -> Self {
        self.ids = Some((shape.to_vec(), ids.to_vec()));
        self
    }

    /// Runs FP; with `grad`, also the gradients of sum(output · weights) in inputs and parameters.
    fn run(&self, grad: bool) -> (Vec<f32>, Vec<Vec<f32>>) {
        let (device, _) = device::open(BurnDevice::Cpu).unwrap();
        let device = if grad { device.autodiff() } else { device };
        let op = Op {
            name: "op".to_owned(),
            kind: self.kind.clone(),
            inputs: vec![OpId(0); self.inputs.len()],
            params: vec![ParamId(0); self.params.len()],
            output: TensorType { dtype: DType::F32, shape: Shape::scalar() },
        };
        let track = |t: Tensor<1>| if grad { t.require_grad() } else { t };
        let flat =
            |values: &Vec<f32>| track(Tensor::<1>::from_data(TensorData::new(values.clone(), [values.len()]), &device));
        let leaves: Vec<Tensor<1>> = self.inputs.iter().map(flat).collect();
        let params: Vec<Tensor<1>> = self.params.iter().map(flat).collect();
        let real = |(leaf, shape): (&Tensor<1>, &Vec<usize>)| {
            let (rows, columns) = crate::burn::host::rows_and_columns(shape);
            Value::Real(RealValue { tensor: leaf.clone().reshape([rows, columns]), shape: shape.clone() })
        };
        let mut inputs: Vec<Value> = leaves.iter().zip(&self.shapes).map(real).collect();
        if let Some((shape, ids)) = &self.ids {
            inputs.push(upload(HostTensor::new(shape.clone(), Values::I32(ids.clone())).unwrap(), &device));
        }
        let angles = AngleTables::default();
        let context = KernelContext { device: &device, training: self.training, seed: [5; 32], angles: &angles };
        let arguments = Arguments { op: &op, inputs, params: params.clone() };
        let Value::Real(output) = forward(&arguments, context).unwrap() else { panic!("not real") };
        let values = to_vec(output.tensor.clone()).unwrap();
        if !grad {
            return (values, Vec::new());
        }
        let dims = output.tensor.dims();
        let seed = Tensor::<2>::from_data(TensorData::new(numbers(values.len(), 99), dims), &device);
        let gradients = (output.tensor * seed).sum().backward();
        let of = |t: &Tensor<1>| to_vec(t.grad(&gradients).unwrap()).unwrap();
        (values, leaves.iter().chain(&params).map(of).collect())
    }

    fn forward(&self) -> Vec<f32> {
        self.run(false).0
    }

    /// Each gradient against central differences, and FP with and without autodiff against each other.
    fn check_gradients(&mut self, tolerance: f64) {
        let (values, gradients) = self.run(true);
        assert_near(&values, &wide(&self.forward()));
        let seed = numbers(values.len(), 99);
        let loss =
            |case: &Self| -> f64 { case.forward().iter().zip(&seed).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum() };
        let inputs = self.inputs.len();
        for (index, gradient) in gradients.iter().enumerate() {
            for (element, &got) in gradient.iter().enumerate() {
                let mut shifted = |by: f32| {
                    let list = if index < inputs { &mut self.inputs[index] } else { &mut self.params[index - inputs] };
                    let old = list[element];
                    list[element] = old + by;
                    let loss = loss(self);
                    let list = if index < inputs { &mut self.inputs[index] } else { &mut self.params[index - inputs] };
                    list[element] = old;
                    loss
                };
                let expected = (shifted(STEP) - shifted(-STEP)) / (2.0 * f64::from(STEP));
                let difference = (f64::from(got) - expected).abs();
                assert!(
                    difference <= tolerance * expected.abs().max(1.0),
                    "{:?}, argument {index}, element {element}: {got} against {expected}",
                    self.kind
                );
            }
        }
    }
}

fn assert_near(got: &[f32], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    for (i, (&a, &b)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(a) - b).abs() < 1e-5 * b.abs().max(1.0), "element {i}: {a} against {b}");
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

#[test]
fn linear_in_both_layouts() {
    for (layout, bias) in [(WeightLayout::InOut, true), (WeightLayout::OutIn, true), (WeightLayout::InOut, false)] {
        let sizes: &[usize] = if bias { &[12, 4] } else { &[12] };
        let kind = OpKind::Linear { inputs: 3, outputs: 4, bias, layout };
        let mut case = Case::new(kind, &[&[2, 2, 3]], sizes);
        let (x, w) = (wide(&case.inputs[0]), wide(&case.params[0]));
        let b = if bias { wide(&case.params[1]) } else { vec![0.0; 4] };
        let weight = |i: usize, o: usize| match layout {
            WeightLayout::InOut => w[i * 4 + o],
            WeightLayout::OutIn => w[o * 3 + i],
        };
        let out = |n: usize, o: usize| b[o] + (0..3).map(|i| x[n * 3 + i] * weight(i, o)).sum::<f64>();
        let expected: Vec<f64> = (0..4).flat_map(|n| (0..4).map(move |o| (n, o))).map(|(n, o)| out(n, o)).collect();
        assert_near(&case.forward(), &expected);
        case.check_gradients(1e-3);
    }
}

#[test]
fn layer_norm() {
    let mut case = Case::new(OpKind::LayerNorm { dim: 5, eps: 1e-5 }, &[&[1, 3, 5]], &[5, 5]);
    let (x, g, b) = (wide(&case.inputs[0]), wide(&case.params[0]), wide(&case.params[1]));
    let mut expected = Vec::new();
    for row in x.chunks(5) {
        let mean = row.iter().sum::<f64>() / 5.0;
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 5.0;
        expected.extend((0..5).map(|i| (row[i] - mean) / (variance + 1e-5).sqrt() * g[i] + b[i]));
    }
    assert_near(&case.forward(), &expected);
    case.check_gradients(2e-2);
}

#[test]
fn attention_sees_only_the_past() {
    let (seq, width, heads) = (3, 4, 2);
    for causal in [true, false] {
        let mut case = Case::new(OpKind::Attention { heads, causal }, &[&[2, seq, 3 * width]], &[]);
        let x = wide(&case.inputs[0]);
        let at = |b: usize, s: usize, part: usize, h: usize, k: usize| x[(b * seq + s) * 12 + part * width + h * 2 + k];
        let mut expected = Vec::new();
        for (b, s, h, k) in (0..2)
            .flat_map(|b| (0..seq).flat_map(move |s| (0..heads).flat_map(move |h| (0..2).map(move |k| (b, s, h, k)))))
        {
            let keys = if causal { s + 1 } else { seq };
            let score = |t: usize| (0..2).map(|j| at(b, s, 0, h, j) * at(b, t, 1, h, j)).sum::<f64>() / 2f64.sqrt();
            let total: f64 = (0..keys).map(|t| score(t).exp()).sum();
            expected.push((0..keys).map(|t| score(t).exp() / total * at(b, t, 2, h, k)).sum());
        }
        assert_near(&case.forward(), &expected);
        case.check_gradients(2e-3);
    }
}

#[test]
fn each_head_of_queries_sees_the_keys_of_its_group() {
    let (seq, heads, kv_heads, dim) = (3, 4, 2, 2);
    let kind = OpKind::GroupedAttention { heads, kv_heads, causal: true };
    let mut case =
        Case::new(kind, &[&[2, seq, heads * dim], &[2, seq, kv_heads * dim], &[2, seq, kv_heads * dim]], &[]);
    let [q, k, v] = [0, 1, 2].map(|part| wide(&case.inputs[part]));
    let at = |x: &[f64], of: usize, b: usize, s: usize, h: usize, j: usize| x[((b * seq + s) * of + h) * dim + j];
    let mut expected = Vec::new();
    for b in 0..2 {
        for s in 0..seq {
            for h in 0..heads {
                let g = h / 2;
                let score = |t: usize| {
                    (0..dim).map(|j| at(&q, heads, b, s, h, j) * at(&k, kv_heads, b, t, g, j)).sum::<f64>()
                        / 2f64.sqrt()
                };
                let total: f64 = (0..=s).map(|t| score(t).exp()).sum();
                let mixed = |j| (0..=s).map(|t| score(t).exp() / total * at(&v, kv_heads, b, t, g, j)).sum::<f64>();
                expected.extend((0..dim).map(mixed));
            }
        }
    }
    assert_near(&case.forward(), &expected);
    case.check_gradients(2e-3);
}

#[test]
fn rms_norm_of_each_group() {
    let mut case = Case::new(OpKind::RmsNorm { dim: 3, eps: 1e-5 }, &[&[2, 2, 6]], &[3]);
    let (x, weight) = (wide(&case.inputs[0]), wide(&case.params[0]));
    let normed = |group: &[f64]| {
        let scale = (group.iter().map(|x| x * x).sum::<f64>() / 3.0 + 1e-5).sqrt();
        group.iter().zip(&weight).map(|(x, w)| x / scale * w).collect::<Vec<_>>()
    };
    let expected: Vec<f64> = x.chunks(3).flat_map(normed).collect();
    assert_near(&case.forward(), &expected);
    case.check_gradients(2e-2);
}

#[test]
fn rotary_turns_each_pair_of_a_head_by_its_position() {
    let kind = OpKind::Rotary { head_dim: 4, base: 100.0, scaling: RotaryScaling::Linear { factor: 2.0 } };
    let mut case = Case::new(kind, &[&[2, 3, 8]], &[]);
    let mut expected = wide(&case.inputs[0]);
    for (row, values) in expected.chunks_mut(8).enumerate() {
        for head in values.chunks_mut(4) {
            for pair in 0..2 {
                let angle = (row % 3) as f64 / 2.0 / 10f64.powi(pair as i32);
                let (a, b) = (head[pair], head[pair + 2]);
                head[pair] = a * angle.cos() - b * angle.sin();
                head[pair + 2] = b * angle.cos() + a * angle.sin();
            }
        }
    }
    assert_near(&case.forward(), &expected);
    case.check_gradients(1e-3);
}

#[test]
fn activations() {
    let tanh = |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh());
    let logistic = |x: f64| x / (1.0 + (-x).exp());
    let check = |function, formula: &dyn Fn(f64) -> f64| {
        let mut case = Case::new(OpKind::Activation { function }, &[&[2, 3, 4]], &[]);
        // Well away from the kink of relu.
        case.inputs[0].iter_mut().for_each(|x| *x = *x * 3.0 + x.signum() * 0.05);
        let expected: Vec<f64> = wide(&case.inputs[0]).into_iter().map(formula).collect();
        assert_near(&case.forward(), &expected);
        case.check_gradients(2e-3);
    };
    check(ActivationFunction::GeluTanh, &tanh);
    check(ActivationFunction::Relu, &|x| x.max(0.0));
    check(ActivationFunction::Silu, &logistic);
    // The two forms of GELU differ by less than a thousandth.
    let case = Case::new(OpKind::Activation { function: ActivationFunction::GeluErf }, &[&[1, 2, 8]], &[]);
    for (got, x) in case.forward().iter().zip(wide(&case.inputs[0])) {
        assert!((f64::from(*got) - tanh(x)).abs() < 1e-3);
    }
    Case::new(OpKind::Activation { function: ActivationFunction::GeluErf }, &[&[1, 2, 8]], &[]).check_gradients(2e-3);
}

#[test]
fn elementwise() {
    for (kind, formula) in [(OpKind::Add, (|a, b| a + b) as fn(f64, f64) -> f64), (OpKind::Mul, |a, b| a * b)] {
        let mut case = Case::new(kind, &[&[2, 2, 3], &[2, 2, 3]], &[]);
        let pairs = wide(&case.inputs[0]).into_iter().zip(wide(&case.inputs[1]));
        assert_near(&case.forward(), &pairs.map(|(a, b)| formula(a, b)).collect::<Vec<_>>());
        case.check_gradients(1e-3);
    }
}

#[test]
fn embedding_adds_up_the_gradients_of_a_token_that_comes_twice() {
    let mut case = Case::new(OpKind::Embedding { vocab: 5, dim: 3 }, &[], &[15]).with_ids(&[2, 2], &[4, 0, 4, 2]);
    let table = wide(&case.params[0]);
    let expected: Vec<f64> = [4, 0, 4, 2].iter().flat_map(|&id| table[id * 3..id * 3 + 3].to_vec()).collect();
    assert_near(&case.forward(), &expected);
    case.check_gradients(1e-3);
}

#[test]
fn position_adds_the_first_rows() {
    let mut case = Case::new(OpKind::Position { positions: 4, dim: 3 }, &[&[2, 2, 3]], &[12]);
    let (x, w) = (wide(&case.inputs[0]), wide(&case.params[0]));
    let expected: Vec<f64> = x.iter().enumerate().map(|(i, v)| v + w[i % 6]).collect();
    assert_near(&case.forward(), &expected);
    case.check_gradients(1e-3);
}

#[test]
fn cross_entropy_is_the_mean_over_all_tokens() {
    let mut case = Case::new(OpKind::CrossEntropy, &[&[2, 2, 5]], &[]).with_ids(&[2, 2], &[1, 4, 0, 3]);
    let x = wide(&case.inputs[0]);
    let token = |(row, label): (&[f64], usize)| row.iter().map(|v| v.exp()).sum::<f64>().ln() - row[label];
    let expected = x.chunks(5).zip([1, 4, 0, 3]).map(token).sum::<f64>() / 4.0;
    assert_near(&case.forward(), &[expected]);
    case.check_gradients(1e-3);
}

#[test]
fn dropout_keeps_the_mean_and_is_off_in_evaluation() {
    let mut case = Case::new(OpKind::Dropout { p: 0.25 }, &[&[1, 100, 40]], &[]);
    case.inputs[0].fill(1.0);
    let output = case.forward();
    let dropped = output.iter().filter(|v| **v == 0.0).count();
    assert!(output.iter().all(|v| *v == 0.0 || (v - 4.0 / 3.0).abs() < 1e-6));
    assert!((900..1100).contains(&dropped), "{dropped} of 4000");
    assert_eq!(output, case.forward(), "the mask is a function of the seed");
    case.training = false;
    assert_eq!(case.forward(), case.inputs[0]);
    let mut small = Case::new(OpKind::Dropout { p: 0.25 }, &[&[1, 2, 4]], &[]);
    small.check_gradients(1e-3);
}
