//! ResNet (He et al., 2015) as an OP-DAG with torchvision's parameter names and initial values.
//!
//! The pooled features are one position of a sequence, so that the loss is the one of every model here.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::builder::DagBuilder;
use crate::dag::{OpDag, OpId, ParamId};
use crate::dtype::DType;
use crate::error::GraphError;
use crate::kind::{ActivationFunction, WeightLayout};
use crate::op::OpKind;
use crate::param::{Init, Param};
use crate::plain::read_value;
use crate::shape::Shape;

pub(super) const MODEL: &str = "resnet";
/// `model_type` in exports: Hugging Face's own `resnet` has other names of tensors.
pub(super) const MODEL_TYPE: &str = "torchvision-resnet";
const CHANNELS: usize = 3;
const BATCH_NORM_EPS: f64 = 1e-5;
const BATCH_NORM_MOMENTUM: f64 = 0.1;
/// Channels inside the blocks of the four layers of the published models.
const WIDTHS: [usize; 4] = [64, 128, 256, 512];
/// Most layers, and most blocks of one.
const MOST_BLOCKS: usize = 256;
/// Most channels, classes, and pixels of a side.
const LARGEST: usize = 1 << 20;

/// What a residual block is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResnetBlock {
    /// Two 3x3 convolutions.
    Basic,
    /// 1x1, 3x3 (which has the stride) and 1x1, the last with four times the channels.
    Bottleneck,
}

impl ResnetBlock {
    /// Every block with its name.
    pub const ALL: [(&'static str, Self); 2] = [("basic", Self::Basic), ("bottleneck", Self::Bottleneck)];

    /// Channels that leave a block over those inside it.
    fn expansion(self) -> usize {
        match self {
            Self::Basic => 1,
            Self::Bottleneck => 4,
        }
    }
}

/// What comes before the residual blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResnetStem {
    /// A 7x7 convolution of stride 2 and a max pool of stride 2.
    Imagenet,
    /// A 3x3 convolution of stride 1.
    Cifar,
}

impl ResnetStem {
    /// Every stem with its name.
    pub const ALL: [(&'static str, Self); 2] = [("imagenet", Self::Imagenet), ("cifar", Self::Cifar)];

    /// Pixels of the side of the images that it is made for.
    pub fn image_size(self) -> usize {
        match self {
            Self::Imagenet => 224,
            Self::Cifar => 32,
        }
    }
}

/// Sizes of a ResNet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResnetConfig {
    /// What a residual block is made of.
    pub block: ResnetBlock,
    /// Blocks of each layer; each layer but the first halves height and width.
    pub depths: Vec<usize>,
    /// Channels inside the blocks of each layer.
    pub widths: Vec<usize>,
    /// What comes before them.
    pub stem: ResnetStem,
    /// Pixels of a side of its square images.
    pub image_size: usize,
    /// Classes that it tells apart.
    pub classes: usize,
}

impl ResnetConfig {
    /// A published model (`resnet18`, `resnet50` or `resnet101`), for images of 224 pixels and 1000 classes.
    pub fn named(name: &str) -> Option<Self> {
        let (block, depths) = match name {
            "resnet18" => (ResnetBlock::Basic, [2, 2, 2, 2]),
            "resnet50" => (ResnetBlock::Bottleneck, [3, 4, 6, 3]),
            "resnet101" => (ResnetBlock::Bottleneck, [3, 4, 23, 3]),
            _ => return None,
        };
        let stem = ResnetStem::Imagenet;
        let (depths, widths) = (depths.to_vec(), WIDTHS.to_vec());
        Some(Self { block, depths, widths, stem, image_size: stem.image_size(), classes: 1000 })
    }

    /// The name of the published model that has these blocks.
    fn name(&self) -> &'static str {
        let is = |name: &&&str| {
            Self::named(name).is_some_and(|named| {
                (named.block, &named.depths, &named.widths) == (self.block, &self.depths, &self.widths)
            })
        };
        ["resnet18", "resnet50", "resnet101"].iter().find(is).copied().unwrap_or(MODEL)
    }

    /// The sizes that `dag` was built with; `None` if it is of another family.
    pub fn of(dag: &OpDag) -> Option<Self> {
        let kind = |name: String| dag.find(&name).map(|op| &dag.op(op).kind);
        let &OpKind::Conv2d { kernel, .. } = kind("conv1".to_owned())? else { return None };
        let block = match kind("layer1.0.conv3".to_owned()) {
            Some(_) => ResnetBlock::Bottleneck,
            None => ResnetBlock::Basic,
        };
        let first = |layer: usize, block: usize| kind(format!("layer{layer}.{block}.conv1"));
        let (mut depths, mut widths) = (Vec::new(), Vec::new());
        while let Some(&OpKind::Conv2d { outputs, .. }) = first(depths.len() + 1, 0) {
            let layer = depths.len() + 1;
            depths.push((0..).take_while(|&block| first(layer, block).is_some()).count());
            widths.push(outputs);
        }
        let [_, image_size, _] = dag.image_size()?;
        let stem = if kernel == 7 { ResnetStem::Imagenet } else { ResnetStem::Cifar };
        let config = Self { block, depths, widths, stem, image_size, classes: dag.vocab()? };
        let same = resnet(&config).ok()?;
        (same.ops() == dag.ops() && same.params() == dag.params()).then_some(config)
    }

    /// What the config.json of an export says.
    pub(super) fn from_keys(keys: &Map<String, Value>) -> Result<Self, GraphError> {
        let config: Self =
            read_value(Value::Object(keys.clone())).map_err(|reason| GraphError::Config { model: MODEL, reason })?;
        config.check().map(|()| config)
    }

    /// The keys that say what is computed.
    pub(super) fn keys(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(keys)) => keys,
            _ => Map::new(),
        }
    }

    fn check(&self) -> Result<(), GraphError> {
        let wrong = |key: &'static str, got: String, expected: String| {
            Err(GraphError::Model { model: MODEL, key, expected, got })
        };
        if self.depths.is_empty() || self.depths.len() > MOST_BLOCKS {
            return wrong("depths", format!("{:?}", self.depths), "the number of blocks of each layer".to_owned());
        }
        if self.widths.len() != self.depths.len() {
            let layers = self.depths.len();
            return wrong("widths", format!("{:?}", self.widths), format!("{layers} numbers, as many as depths"));
        }
        let lists = [("depths", &self.depths, MOST_BLOCKS), ("widths", &self.widths, LARGEST)];
        let sizes = lists.iter().flat_map(|&(key, sizes, most)| sizes.iter().map(move |&size| (key, size, most)));
        let own = [("image_size", self.image_size, LARGEST), ("classes", self.classes, LARGEST)];
        match sizes.chain(own).find(|&(_, size, most)| size == 0 || size > most) {
            Some((key, size, most)) => wrong(key, size.to_string(), format!("1 to {most}")),
            None => Ok(()),
        }
    }
}

/// A ResNet with its loss.
///
/// # Errors
/// A size is out of range, or the image is too small for the stem.
pub fn resnet(config: &ResnetConfig) -> Result<OpDag, GraphError> {
    config.check()?;
    let mut model = Builder { dag: DagBuilder::new(config.name()), block: config.block };
    let shape = Shape::batched(&[CHANNELS, config.image_size, config.image_size]);
    let input = model.dag.op("input", OpKind::Input { dtype: DType::F32, shape }, &[], &[])?;
    let label = model.dag.op("label", OpKind::Label { shape: Shape::batched(&[1]) }, &[], &[])?;
    let mut channels = config.widths.first().copied().unwrap_or_default();
    let window = match config.stem {
        ResnetStem::Imagenet => (7, 2),
        ResnetStem::Cifar => (3, 1),
    };
    let mut hidden = model.conv("conv1", input, CHANNELS, channels, window)?;
    hidden = model.norm("bn1", hidden, channels)?;
    hidden = model.relu("relu", hidden)?;
    if config.stem == ResnetStem::Imagenet {
        let pool = OpKind::MaxPool2d { kernel: 3, stride: 2, padding: 1 };
        hidden = model.dag.op("maxpool", pool, &[hidden], &[])?;
    }
    for (layer, (&blocks, &width)) in config.depths.iter().zip(&config.widths).enumerate() {
        for block in 0..blocks {
            let stride = if layer > 0 && block == 0 { 2 } else { 1 };
            hidden = model.block(&format!("layer{}.{block}", layer + 1), hidden, (channels, width), stride)?;
            channels = width * config.block.expansion();
        }
    }
    let pooled = model.dag.op("avgpool", OpKind::GlobalAvgPool, &[hidden], &[])?;
    // As PyTorch draws a linear layer.
    let init = Init::Uniform { bound: 1.0 / (channels as f32).sqrt() };
    let weight = model.param("fc.weight", &[config.classes, channels], init)?;
    let bias = model.param("fc.bias", &[config.classes], init)?;
    let head = OpKind::Linear { inputs: channels, outputs: config.classes, bias: true, layout: WeightLayout::OutIn };
    let logits = model.dag.op("fc", head, &[pooled], &[weight, bias])?;
    model.dag.op("loss", OpKind::CrossEntropy, &[logits, label], &[])?;
    model.dag.build()
}

struct Builder {
    dag: DagBuilder,
    block: ResnetBlock,
}

impl Builder {
    /// A residual block; where its shape changes, the shortcut has a convolution too.
    fn block(
        &mut self,
        name: &str,
        input: OpId,
        (channels, width): (usize, usize),
        stride: usize,
    ) -> Result<OpId, GraphError> {
        let part = |what: &str| format!("{name}.{what}");
        let out = width * self.block.expansion();
        let convolutions: &[_] = match self.block {
            ResnetBlock::Basic => &[(channels, width, (3, stride)), (width, out, (3, 1))],
            ResnetBlock::Bottleneck => &[(channels, width, (1, 1)), (width, width, (3, stride)), (width, out, (1, 1))],
        };
        let mut hidden = input;
        for (number, &(from, to, window)) in (1..).zip(convolutions) {
            hidden = self.conv(&part(&format!("conv{number}")), hidden, from, to, window)?;
            hidden = self.norm(&part(&format!("bn{number}")), hidden, to)?;
            if number < convolutions.len() {
                hidden = self.relu(&part(&format!("relu{number}")), hidden)?;
            }
        }
        let mut shortcut = input;
        if stride > 1 || channels != out {
            shortcut = self.conv(&part("downsample.0"), shortcut, channels, out, (1, stride))?;
            shortcut = self.norm(&part("downsample.1"), shortcut, out)?;
        }
        let sum = self.dag.op(&part("add"), OpKind::Add, &[hidden, shortcut], &[])?;
        self.relu(&part(&format!("relu{}", convolutions.len())), sum)
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
        let kind = OpKind::Conv2d { inputs, outputs, kernel, stride, padding: kernel / 2, bias: false };
        self.dag.op(name, kind, &[input], &[weight])
    }

    fn norm(&mut self, name: &str, input: OpId, channels: usize) -> Result<OpId, GraphError> {
        let of = [channels];
        let weight = self.param(&format!("{name}.weight"), &of, Init::Ones)?;
        let bias = self.param(&format!("{name}.bias"), &of, Init::Zeros)?;
        let mean = self.running(&format!("{name}.running_mean"), &of, Init::Zeros)?;
        let variance = self.running(&format!("{name}.running_var"), &of, Init::Ones)?;
        let kind = OpKind::BatchNorm2d { channels, eps: BATCH_NORM_EPS, momentum: BATCH_NORM_MOMENTUM };
        self.dag.op(name, kind, &[input], &[weight, bias, mean, variance])
    }

    fn relu(&mut self, name: &str, input: OpId) -> Result<OpId, GraphError> {
        self.dag.op(name, OpKind::Activation { function: ActivationFunction::Relu }, &[input], &[])
    }

    fn param(&mut self, name: &str, shape: &[usize], init: Init) -> Result<ParamId, GraphError> {
        let decay = shape.len() > 1;
        self.dag.param(Param { name: name.to_owned(), shape: shape.to_vec(), init, decay, frozen: false })
    }

    fn running(&mut self, name: &str, shape: &[usize], init: Init) -> Result<ParamId, GraphError> {
        self.dag.param(Param { name: name.to_owned(), shape: shape.to_vec(), init, decay: false, frozen: true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_models_have_their_sizes() {
        // torchvision's counts, and its multiply-adds an image.
        for (name, parameters, giga) in
            [("resnet18", 11_689_512, 1.8), ("resnet50", 25_557_032, 4.1), ("resnet101", 44_549_160, 7.8)]
        {
            let dag = resnet(&ResnetConfig::named(name).unwrap()).unwrap();
            assert_eq!((dag.param_elements(), dag.name()), (parameters, name));
            assert_eq!(dag.trained_elements(), parameters);
            let multiply_adds = dag.total_cost(1).fp_flops as f64 / 2.0 / 1e9;
            assert!((giga..1.05 * giga).contains(&multiply_adds), "{name}: {multiply_adds}");
        }
    }

    fn small() -> ResnetConfig {
        ResnetConfig {
            block: ResnetBlock::Basic,
            depths: vec![1, 2],
            widths: vec![4, 8],
            stem: ResnetStem::Cifar,
            image_size: 8,
            classes: 3,
        }
    }

    #[test]
    fn a_model_is_known_by_its_graph() {
        let bottleneck = ResnetConfig { block: ResnetBlock::Bottleneck, stem: ResnetStem::Imagenet, ..small() };
        for config in [small(), bottleneck, ResnetConfig::named("resnet50").unwrap()] {
            let dag = resnet(&config).unwrap();
            let again = OpDag::from_json(&dag.to_json()).unwrap();
            assert_eq!((ResnetConfig::of(&again).unwrap(), again), (config, dag));
        }
        let gpt2 = crate::gpt2(&crate::Gpt2Config::named("gpt2").unwrap(), 8).unwrap();
        assert_eq!(ResnetConfig::of(&gpt2), None);
    }

    #[test]
    fn running_values_are_no_parameters_that_training_leaves_as_they_are() {
        let dag = resnet(&small()).unwrap();
        let running = dag.param_ids().filter(|&param| dag.is_running(param));
        let names: Vec<&str> = running.map(|param| dag.param(param).name.as_str()).take(3).collect();
        assert_eq!(names, ["bn1.running_mean", "bn1.running_var", "layer1.0.bn1.running_mean"]);
        assert!(!dag.has_frozen());
        assert_eq!(dag.image_size(), Some([3, 8, 8]));
        assert_eq!(dag.seq_len(), None);
    }

    #[test]
    fn running_values_that_are_trained_or_shared_are_refused() {
        let json = resnet(&small()).unwrap().to_json();
        let error = OpDag::from_json(&json.replace(r#""frozen": true"#, r#""frozen": false"#)).unwrap_err();
        let expected =
            "op `bn1` (batch_norm2d): running_mean `bn1.running_mean` is trained, expected one that is frozen";
        assert!(error.to_string().starts_with(expected), "{error}");
        let mut value: Value = serde_json::from_str(&json).unwrap();
        let params = value["params"].as_array_mut().unwrap();
        params.retain(|param| param["name"] != "layer1.0.bn1.running_mean");
        let text = value.to_string().replace("\"layer1.0.bn1.running_mean\"", "\"bn1.running_mean\"");
        let error = OpDag::from_json(&text).unwrap_err().to_string();
        assert!(error.contains("`bn1.running_mean`: number of ops that make its values is 2, expected 1"), "{error}");
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let refused = |change: fn(&mut ResnetConfig)| {
            let mut config = small();
            change(&mut config);
            resnet(&config).unwrap_err().to_string()
        };
        assert_eq!(refused(|c| c.classes = 0), "resnet: classes is 0, expected 1 to 1048576");
        assert_eq!(refused(|c| c.widths = vec![4]), "resnet: widths is [4], expected 2 numbers, as many as depths");
        assert_eq!(refused(|c| c.depths[1] = 0), "resnet: depths is 0, expected 1 to 256");
        assert_eq!(refused(|c| c.depths = vec![]), "resnet: depths is [], expected the number of blocks of each layer");
        assert!(refused(|c| c.image_size = 0).starts_with("resnet: image_size is 0"));
    }
}
