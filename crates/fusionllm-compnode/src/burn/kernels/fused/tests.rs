//! Every fused op against its plain form in Burn: values and gradients, at sizes that no block or vector divides.
//! `kernels/tests.rs` holds the same ops against formulas and differences.

use burn_tensor::activation::silu;
use burn_tensor::{Int, TensorData};
use fusionllm_graph::{RotaryScaling, WeightLayout};

use super::*;
use crate::burn::host::to_vec;
use crate::burn::kernels::{activation, attention, batch_norm2d, conv2d, linear, loss, norm, pool, rotary};
use crate::targets::no_target;

/// Numbers without a pattern in [-2, 2).
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 22) as f32 - 2.0
    };
    (0..count).map(|_| draw()).collect()
}

fn device() -> Device {
    Device::flex().autodiff()
}

/// A leaf of the tape.
fn leaf<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
    let values = numbers(shape.iter().product(), seed);
    Tensor::from_data(TensorData::new(values, shape), &device()).require_grad()
}

/// The output's values, and the gradients of Σ output · numbers in x and the parameters.
fn run(output: Tensor<2>, x: &Tensor<2>, params: &[Tensor<1>]) -> Vec<Vec<f32>> {
    let mut found = vec![to_vec(output.clone()).unwrap()];
    let dims = output.dims();
    let seed = Tensor::from_data(TensorData::new(numbers(dims[0] * dims[1], 9), dims), &device());
    let mut tape = (output * seed).sum().backward();
    found.push(to_vec(x.grad_remove(&mut tape).unwrap()).unwrap());
    found.extend(params.iter().map(|p| to_vec(p.grad_remove(&mut tape).unwrap()).unwrap()));
    found
}

fn assert_alike(what: &str, fused: Option<Vec<Vec<f32>>>, plain: Vec<Vec<f32>>) {
    let fused = fused.unwrap_or_else(|| panic!("{what}: declined"));
    for (part, (fused, plain)) in fused.iter().zip(&plain).enumerate() {
        assert_eq!(fused.len(), plain.len(), "{what}, part {part}");
        let size = plain.iter().fold(1.0f32, |max, v| max.max(v.abs()));
        for (i, (a, b)) in fused.iter().zip(plain).enumerate() {
            assert!((a - b).abs() <= 2e-5 * size, "{what}, part {part}, element {i}: {a} against {b}");
        }
    }
}

#[test]
fn layer_norm_is_the_plain_one() {
    for (rows, columns) in [(1, 1), (3, 7), (33, 70), (600, 129)] {
        let (x, params) = (leaf([rows, columns], 1), [leaf([columns], 2), leaf([columns], 3)]);
        let [weight, bias] = &params;
        let operands = [Operand::of(&x), Operand::of(weight), Operand::of(bias)];
        let fused = apply(LayerNorm { eps: 1e-5 }, operands).map(|y| run(y, &x, &params));
        let plain = run(norm::plain(x.clone(), weight.clone(), bias.clone(), 1e-5), &x, &params);
        assert_alike(&format!("layer norm {rows} x {columns}"), fused, plain);
    }
}

#[test]
fn gates_are_the_plain_ones() {
    type Plain = fn(Tensor<2>) -> Tensor<2>;
    for (op, plain) in [(Gated::Gelu, activation::gelu_tanh as Plain), (Gated::Silu, silu as Plain)] {
        for shape in [[1, 1], [5, 13], [130, 257]] {
            let x = leaf(shape, 1) * 3.0;
            let fused = apply(op, [Operand::of(&x)]).map(|y: Tensor<2>| to_vec(y).unwrap());
            let expected = to_vec(plain(x.clone())).unwrap();
            assert_alike(&format!("{op:?}"), fused.map(|v| vec![v]), vec![expected]);
            let x = leaf(shape, 2);
            let fused = apply(op, [Operand::of(&x)]).map(|y| run(y, &x, &[]));
            assert_alike(&format!("{op:?}"), fused, run(plain(x.clone()), &x, &[]));
        }
    }
}

#[test]
fn rms_norm_is_the_plain_one() {
    for (rows, groups, dim) in [(1, 1, 1), (3, 1, 7), (33, 3, 10), (600, 1, 129)] {
        let (x, params) = (leaf([rows, groups * dim], 1), [leaf([dim], 2)]);
        let operands = [Operand::of(&x), Operand::of(&params[0])];
        let fused = apply(RmsNorm { eps: 1e-5 }, operands).map(|y| run(y, &x, &params));
        let plain = run(norm::plain_rms(x.clone(), params[0].clone(), 1e-5), &x, &params);
        assert_alike(&format!("RMS norm {rows} x {groups} x {dim}"), fused, plain);
    }
}

#[test]
fn rotary_is_the_plain_one() {
    for (batch, seq, heads, head_dim) in [(1, 1, 1, 2), (2, 5, 3, 4), (3, 65, 2, 32)] {
        let (cos, sin) = RotaryScaling::None.table(head_dim, 1e4, seq);
        let op = Rotary { seq, head_dim, cos: cos.into(), sin: sin.into() };
        let x = leaf([batch * seq, heads * head_dim], 1);
        let fused = apply(op.clone(), [Operand::of(&x)]).map(|y| run(y, &x, &[]));
        assert_alike(&format!("rotary over {seq}"), fused, run(rotary::plain(x.clone(), &op), &x, &[]));
    }
}

/// Weight and bias are on the tape, but not its leaves.
#[test]
fn a_frozen_linear_gives_the_gradient_of_its_input_alone() {
    for layout in [WeightLayout::InOut, WeightLayout::OutIn] {
        for (rows, inputs, outputs) in [(1, 1, 1), (5, 3, 17), (70, 65, 130)] {
            let op = Linear { inputs, outputs, layout };
            let x = leaf([rows, inputs], 1);
            let [weight, bias] =
                [(inputs * outputs, 2), (outputs, 3)].map(|(n, seed)| leaf([n], seed).inner().autodiff());
            let operands = [Operand::of(&x), Operand::of(&weight), Operand::of(&bias)];
            let fused = apply(FrozenLinear(op), operands).map(|y| run(y, &x, &[]));
            let plain = run(linear::plain(x.clone(), weight.clone(), Some(bias), op), &x, &[]);
            assert_alike(&format!("{layout:?}, {rows} rows"), fused, plain);
            // Without anything to go back to there is no tape.
            let y: Tensor<2> =
                apply(FrozenLinear(op), [Operand::of(&x.inner().autodiff()), Operand::of(&weight)]).unwrap();
            assert!(!y.is_tracked());
        }
    }
}

#[test]
fn linear_is_the_plain_one_in_both_layouts() {
    for layout in [WeightLayout::InOut, WeightLayout::OutIn] {
        for (rows, inputs, outputs) in [(1, 1, 1), (5, 3, 17), (70, 65, 130)] {
            let op = Linear { inputs, outputs, layout };
            let (x, params) = (leaf([rows, inputs], 1), [leaf([inputs * outputs], 2), leaf([outputs], 3)]);
            let [weight, bias] = &params;
            let operands = [Operand::of(&x), Operand::of(weight), Operand::of(bias)];
            let fused = apply(op, operands).map(|y| run(y, &x, &params));
            let plain = run(linear::plain(x.clone(), weight.clone(), Some(bias.clone()), op), &x, &params);
            assert_alike("linear", fused, plain);
            let fused = apply(op, [Operand::of(&x), Operand::of(weight)]).map(|y| run(y, &x, &params[..1]));
            assert_alike("no bias", fused, run(linear::plain(x.clone(), weight.clone(), None, op), &x, &params[..1]));
        }
    }
}

/// Values and gradients, the weight's made afterwards and for two micro-batches of the same numbers.
#[test]
fn a_linear_that_defers_is_one_that_does_not() {
    for layout in [WeightLayout::InOut, WeightLayout::OutIn] {
        let (rows, inputs, outputs) = (70, 65, 130);
        let op = Linear { inputs, outputs, layout };
        let (x, params) = (leaf([rows, inputs], 1), [leaf([inputs * outputs], 2), leaf([outputs], 3)]);
        let [weight, bias] = &params;
        for bias in [Some(bias.clone()), None] {
            let with_bias: Vec<_> = std::iter::once(weight.clone()).chain(bias.clone()).collect();
            let mut expected = run(linear::plain(x.clone(), weight.clone(), bias.clone(), op), &x, &with_bias);
            expected[2].iter_mut().for_each(|g| *g *= 2.0);
            for plainly in [false, true] {
                let constant = weight.clone().inner().autodiff();
                let (output, deferred) = if plainly {
                    linear::deferred_plain(x.clone(), constant, bias.clone(), op)
                } else {
                    linear::deferred(x.clone(), constant, bias.clone(), op)
                };
                let mut found = vec![to_vec(output.clone()).unwrap()];
                let seed = Tensor::from_data(TensorData::new(numbers(rows * outputs, 9), [rows, outputs]), &device());
                let mut tape = (output * seed).sum().backward();
                found.push(to_vec(x.grad_remove(&mut tape).unwrap()).unwrap());
                let of_bias = bias.as_ref().map(|b| to_vec(b.grad_remove(&mut tape).unwrap()).unwrap());
                assert!(weight.grad_remove(&mut tape).is_none());
                let owed = deferred.after(&mut tape).unwrap();
                let sum = owed.clone().add_to(Some(owed.add_to(None)));
                found.push(to_vec(sum).unwrap());
                found.extend(of_bias);
                assert_alike(&format!("deferred {layout:?}, plainly: {plainly}"), Some(found), expected.clone());
            }
        }
    }
}

#[test]
fn attention_is_the_plain_one() {
    for causal in [false, true] {
        for (batch, seq, heads, head_dim) in [(1, 1, 1, 1), (2, 5, 3, 4), (3, 65, 2, 8), (1, 130, 2, 16)] {
            let op = Attention { seq, heads, kv_heads: heads, head_dim, causal };
            let qkv = leaf([batch * seq, 3 * heads * head_dim], 1);
            let fused = apply(PackedAttention(op), [Operand::of(&qkv)]).map(|y| run(y, &qkv, &[]));
            let plain = run(attention::plain(qkv.clone(), batch, op), &qkv, &[]);
            assert_alike(&format!("attention over {seq}, causal: {causal}"), fused, plain);
        }
    }
}

/// The gradients of query, key and value, one after the other.
#[test]
fn grouped_attention_is_the_plain_one() {
    for causal in [false, true] {
        for (batch, seq, heads, kv_heads, head_dim) in
            [(1, 1, 1, 1, 1), (2, 5, 4, 2, 3), (3, 65, 6, 2, 8), (1, 130, 4, 1, 16), (2, 7, 3, 3, 4)]
        {
            let op = Attention { seq, heads, kv_heads, head_dim, causal };
            let rows = batch * seq;
            let flat: [Tensor<1>; 3] =
                [heads, kv_heads, kv_heads].map(|heads| leaf([rows * heads * head_dim], heads as u64 + 1));
            let parts = || {
                let [q, k, v] = flat.clone();
                let split = |part: Tensor<1>, heads: usize| part.reshape([rows, heads * head_dim]);
                [split(q, heads), split(k, kv_heads), split(v, kv_heads)]
            };
            let x = leaf([1, 1], 1);
            let with_x = |y: Tensor<2>| y + x.clone();
            let operands = parts();
            let fused = apply(GroupedAttention(op), operands.each_ref().map(Operand::of));
            let fused = fused.map(|y| run(with_x(y), &x, &flat));
            let plain = run(with_x(attention::plain_grouped(parts(), batch, op)), &x, &flat);
            assert_alike(&format!("{heads} heads by {kv_heads} over {seq}, causal: {causal}"), fused, plain);
        }
    }
}

#[test]
fn attention_survives_scores_beyond_the_range_of_exp() {
    let op = Attention { seq: 3, heads: 1, kv_heads: 1, head_dim: 2, causal: true };
    let qkv = leaf([3, 6], 1) * 1e3;
    let output: Tensor<2> = apply(PackedAttention(op), [Operand::of(&qkv)]).unwrap();
    let plain = to_vec(attention::plain(qkv, 1, op)).unwrap();
    assert_alike("large scores", Some(vec![to_vec(output).unwrap()]), vec![plain]);
}

#[test]
fn cross_entropy_is_the_plain_one() {
    for (rows, vocab) in [(1, 1), (4, 5), (37, 130), (300, 257)] {
        let labels: Vec<i32> = (0..rows as i32).map(|i| i * 31 % vocab as i32).collect();
        let of = |labels: &[i32]| Tensor::<1, Int>::from_data(TensorData::new(labels.to_vec(), [rows]), &device());
        let logits = leaf([rows, vocab], 1);
        let fused = |labels: &[i32], weight| {
            let labels = labels.iter().map(|&label| usize::try_from(label).ok()).collect();
            apply(CrossEntropy { labels, weight }, [Operand::of(&logits)]).map(|y| run(y, &logits, &[]))
        };
        let plain = run(loss::plain(logits.clone(), of(&labels)), &logits, &[]);
        assert_alike("cross-entropy", fused(&labels, None), plain);
        let weight = 0.3;
        let masked: Vec<i32> = (labels.iter().enumerate())
            .map(|(i, &label)| if i % 3 == 1 || i + 1 == rows { no_target(weight) } else { label })
            .collect();
        let plain = run(loss::weighted(logits.clone(), of(&masked), weight), &logits, &[]);
        assert!(plain[0][0] > 0.0 || rows == 1);
        assert!(plain[1][(rows - 1) * vocab..].iter().all(|&x| x == 0.0));
        assert_alike("masked cross-entropy", fused(&masked, Some(weight)), plain);
    }
}

#[test]
fn a_seeded_scalar_gives_its_seed_as_gradient() {
    let x = leaf([3, 5], 1);
    let seed = numbers(15, 4);
    let scalar: Tensor<1> = apply(Seeded::new(tensor(seed.clone(), [3, 5])), [Operand::of(&x)]).unwrap();
    let mut tape = scalar.backward();
    assert_eq!(to_vec(x.grad_remove(&mut tape).unwrap()).unwrap(), seed);
}

#[test]
fn outside_autodiff_only_fp_runs() {
    let x = leaf([4, 6], 1);
    let inner = x.clone().inner();
    let output: Tensor<2> = apply(Gated::Gelu, [Operand::of(&inner)]).unwrap();
    let tracked: Tensor<2> = apply(Gated::Gelu, [Operand::of(&x)]).unwrap();
    assert!(!output.device().is_autodiff() && tracked.is_tracked());
    assert_eq!(to_vec(output).unwrap(), to_vec(tracked).unwrap());
}

#[test]
fn sums_are_in_place_and_complete() {
    let (sum, term) = (numbers(TASK + 3, 1), numbers(TASK + 3, 2));
    let on_device =
        |values: &Vec<f32>| Tensor::<1>::from_data(TensorData::new(values.clone(), [TASK + 3]), &Device::flex());
    let expected: Vec<f32> = sum.iter().zip(&term).map(|(a, b)| a + b).collect();
    assert_eq!(to_vec(accumulate(on_device(&sum), on_device(&term))).unwrap(), expected);
    let squares = sum_of_squares(&on_device(&sum)).unwrap();
    let exact: f64 = sum.iter().map(|&a| f64::from(a) * f64::from(a)).sum();
    assert!((squares - exact).abs() < 1e-6 * exact);
}

/// Batch, channels, height and width, kernel, stride and padding.
const IMAGES: [([usize; 4], Window); 6] = [
    ([1, 1, 1, 1], Window { kernel: 1, stride: 1, padding: 0 }),
    ([3, 4, 5, 7], Window { kernel: 3, stride: 1, padding: 1 }),
    ([2, 3, 9, 8], Window { kernel: 3, stride: 2, padding: 1 }),
    ([17, 2, 6, 6], Window { kernel: 1, stride: 2, padding: 0 }),
    ([1, 3, 15, 13], Window { kernel: 7, stride: 2, padding: 3 }),
    ([9, 5, 4, 4], Window { kernel: 1, stride: 1, padding: 0 }),
];

fn images([batch, channels, height, width]: [usize; 4], seed: u64) -> Tensor<2> {
    leaf([batch * channels * height, width], seed)
}

#[test]
fn convolutions_are_the_plain_ones() {
    for (dims, window) in IMAGES {
        let [batch, inputs, height, width] = dims;
        let outputs = 4;
        let conv = Conv2d { inputs, outputs, window, size: [height, width] };
        let x = images(dims, 1);
        let params = [leaf([outputs * inputs * window.kernel * window.kernel], 2), leaf([outputs], 3)];
        let [weight, bias] = params.clone();
        let operands = [Operand::of(&x), Operand::of(&weight), Operand::of(&bias)];
        let fused = apply(conv, operands).map(|output| run(output, &x, &params));
        let plain = conv2d::plain(x.clone(), batch, weight.clone(), Some(bias), conv);
        assert_alike(&format!("{dims:?} {window:?}"), fused, run(plain, &x, &params));
        let params = [weight.clone()];
        let fused = apply(conv, [Operand::of(&x), Operand::of(&weight)]).map(|output| run(output, &x, &params));
        let plain = conv2d::plain(x.clone(), batch, weight, None, conv);
        assert_alike(&format!("{dims:?} {window:?} without bias"), fused, run(plain, &x, &params));
    }
}

#[test]
fn a_max_pool_is_the_plain_one() {
    for (dims, window) in IMAGES {
        let pool = MaxPool { window, size: [dims[2], dims[3]] };
        let x = images(dims, 1);
        let fused = apply(pool, [Operand::of(&x)]).map(|output| run(output, &x, &[]));
        let plain = pool::plain_max(x.clone(), [dims[0], dims[1]], pool);
        assert_alike(&format!("{dims:?} {window:?}"), fused, run(plain, &x, &[]));
    }
}

#[test]
fn batch_norm_is_the_plain_one() {
    for [batch, channels, height, width] in [[2, 1, 1, 1], [3, 4, 5, 7], [17, 2, 6, 6], [1, 3, 100, 33]] {
        let dims = [batch, channels, height, width];
        let (x, params) = (images(dims, 1), [leaf([channels], 2), leaf([channels], 3)]);
        let [weight, bias] = params.clone();
        let eps = 1e-5;
        let moments = moments_of(&into_cpu(x.clone().inner()).unwrap(), channels, height * width);
        let norm = BatchNorm { eps, channels, plane: height * width, moments: moments.clone() };
        let operands = [Operand::of(&x), Operand::of(&weight), Operand::of(&bias)];
        let fused = apply(norm, operands).map(|output| run(output, &x, &params));
        let sizes = [batch, channels, height * width];
        let (plain, mean, variance) = batch_norm2d::plain(x.clone(), sizes, weight, bias, eps);
        let plain = run(plain.reshape([batch * channels * height, width]), &x, &params);
        assert_alike(&format!("{dims:?}"), fused, plain);
        let (mean, variance) = (to_vec(mean).unwrap(), to_vec(variance).unwrap());
        for ((m, v), (mean, variance)) in moments.into_iter().zip(mean.into_iter().zip(variance)) {
            assert!((m - mean).abs() < 1e-5 && (v - variance).abs() < 1e-5 * variance.max(1.0), "{m} {v}");
        }
    }
}
