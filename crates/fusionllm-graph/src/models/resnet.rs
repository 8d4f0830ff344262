//! ResNet (He et al., 2015) with bottleneck blocks, for planning: parameter names are torchvision's.
//!
//! The pooled features are one position of a sequence, so that the loss is the one of every model here.

use crate::builder::DagBuilder;
use crate::dag::{OpDag, OpId};
use crate::dtype::DType;
use crate::error::GraphError;
use crate::kind::{ActivationFunction, WeightLayout};
use crate::op::OpKind;
use crate::param::{Init, Param};
use crate::shape::Shape;

/// Blocks of the four layers of ResNet-101.
const BLOCKS: [usize; 4] = [3, 4, 23, 3];
/// Channels inside a block of the first layer; each next layer has twice as many.
const WIDTH: usize = 64;
/// Channels that leave a block over those inside it.
const EXPANSION: usize = 4;
const BATCH_NORM_EPS: f64 = 1e-5;

/// ResNet-101 with its loss, for square images of `image_size` pixels a side and `classes` classes.
///
/// # Errors
/// A size is 0, or the image is too small for the five halvings.
pub fn resnet101(image_size: usize, classes: usize) -> Result<OpDag, GraphError> {
    let mut model = Builder { dag: DagBuilder::new("resnet101") };
    let shape = Shape::batched(&[3, image_size, image_size]);
    let input = model.dag.op("input", OpKind::Input { dtype: DType::F32, shape }, &[], &[])?;
    let label = model.dag.op("label", OpKind::Label { shape: Shape::batched(&[1]) }, &[], &[])?;
    let stem = model.conv("conv1", input, 3, WIDTH, (7, 2))?;
    let stem = model.norm("bn1", stem, WIDTH)?;
    let stem = model.relu("relu", stem)?;
    let pool = OpKind::MaxPool2d { kernel: 3, stride: 2, padding: 1 };
    let mut hidden = model.dag.op("maxpool", pool, &[stem], &[])?;
    let mut channels = WIDTH;
    for (layer, blocks) in BLOCKS.into_iter().enumerate() {
        let width = WIDTH << layer;
        for block in 0..blocks {
            let stride = if layer > 0 && block == 0 { 2 } else { 1 };
            hidden = model.block(&format!("layer{}.{block}", layer + 1), hidden, (channels, width), stride)?;
            channels = width * EXPANSION;
        }
    }
    let pooled = model.dag.op("avgpool", OpKind::GlobalAvgPool, &[hidden], &[])?;
    let weight = model.param("fc.weight", &[classes, channels], Init::Normal { std: 0.01 })?;
    let bias = model.param("fc.bias", &[classes], Init::Zeros)?;
    let head = OpKind::Linear { inputs: channels, outputs: classes, bias: true, layout: WeightLayout::OutIn };
    let logits = model.dag.op("fc", head, &[pooled], &[weight, bias])?;
    model.dag.op("loss", OpKind::CrossEntropy, &[logits, label], &[])?;
    model.dag.build()
}

struct Builder {
    dag: DagBuilder,
}

impl Builder {
    /// A bottleneck block; where its shape changes, the shortcut has a convolution too.
    fn block(
        &mut self,
        name: &str,
        input: OpId,
        (channels, width): (usize, usize),
        stride: usize,
    ) -> Result<OpId, GraphError> {
        let part = |what: &str| format!("{name}.{what}");
        let out = width * EXPANSION;
        let mut hidden = input;
        for (index, (from, to, window)) in
            [(channels, width, (1, 1)), (width, width, (3, stride)), (width, out, (1, 1))].into_iter().enumerate()
        {
            let number = index + 1;
            hidden = self.conv(&part(&format!("conv{number}")), hidden, from, to, window)?;
            hidden = self.norm(&part(&format!("bn{number}")), hidden, to)?;
            if number < 3 {
                hidden = self.relu(&part(&format!("relu{number}")), hidden)?;
            }
        }
        let mut shortcut = input;
        if stride > 1 || channels != out {
            shortcut = self.conv(&part("downsample.0"), shortcut, channels, out, (1, stride))?;
            shortcut = self.norm(&part("downsample.1"), shortcut, out)?;
        }
        let sum = self.dag.op(&part("add"), OpKind::Add, &[shortcut, hidden], &[])?;
        self.relu(&part("relu3"), sum)
    }

    /// A convolution that keeps the size but for its stride; `window` is kernel and stride.
    fn conv(
        &mut self,
        name: &str,
        input: OpId,
        inputs: usize,
        outputs: usize,
        (kernel, stride): (usize, usize),
    ) -> Result<OpId, GraphError> {
        let fan_out = (outputs * kernel * kernel) as f32;
        let init = Init::Normal { std: (2.0 / fan_out).sqrt() };
        let weight = self.param(&format!("{name}.weight"), &[outputs, inputs, kernel, kernel], init)?;
        let kind = OpKind::Conv2d { inputs, outputs, kernel, stride, padding: kernel / 2 };
        self.dag.op(name, kind, &[input], &[weight])
    }

    fn norm(&mut self, name: &str, input: OpId, channels: usize) -> Result<OpId, GraphError> {
        let weight = self.param(&format!("{name}.weight"), &[channels], Init::Ones)?;
        let bias = self.param(&format!("{name}.bias"), &[channels], Init::Zeros)?;
        let kind = OpKind::BatchNorm2d { channels, eps: BATCH_NORM_EPS };
        self.dag.op(name, kind, &[input], &[weight, bias])
    }

    fn relu(&mut self, name: &str, input: OpId) -> Result<OpId, GraphError> {
        self.dag.op(name, OpKind::Activation { function: ActivationFunction::Relu }, &[input], &[])
    }

    fn param(&mut self, name: &str, shape: &[usize], init: Init) -> Result<crate::ParamId, GraphError> {
        let decay = shape.len() > 1;
        self.dag.param(Param { name: name.to_owned(), shape: shape.to_vec(), init, decay, frozen: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resnet101_has_the_published_size() {
        let dag = resnet101(224, 1000).unwrap();
        // torchvision's count; its FLOPs are 7.8 G multiply-adds an image.
        assert_eq!(dag.param_elements(), 44_549_160);
        let multiply_adds = dag.total_cost(1).fp_flops as f64 / 2.0 / 1e9;
        assert!((7.7..8.0).contains(&multiply_adds), "{multiply_adds}");
        assert_eq!(OpDag::from_json(&dag.to_json()).unwrap(), dag);
    }

    #[test]
    fn an_image_that_is_too_small_is_refused() {
        assert!(resnet101(0, 1000).is_err());
        assert!(resnet101(32, 0).is_err());
    }
}
