//! `[model]` for a model of images: sizes of a ResNet.

use fusionllm_graph::{ResnetConfig, ResnetStem};
use serde::{Deserialize, Serialize};

use super::{DataFormat, DataSpec, ModelSpec};

/// Classes of CIFAR-10.
const CIFAR10_CLASSES: usize = 10;

/// The keys that are sizes of a ResNet, and whether each is given.
pub(super) fn given_sizes(model: &ModelSpec) -> [(&'static str, bool); 6] {
    [
        ("model.block", model.block.is_some()),
        ("model.depths", model.depths.is_some()),
        ("model.widths", model.widths.is_some()),
        ("model.stem", model.stem.is_some()),
        ("model.image_size", model.image_size.is_some()),
        ("model.classes", model.classes.is_some()),
    ]
}

/// The families whose sizes a job can give, beside GPT-2's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SizedFamily {
    /// ResNet.
    #[default]
    Resnet,
}

/// The ResNet that a job describes, if it does.
pub(super) fn resnet_config(model: &ModelSpec, data: &DataSpec) -> Option<ResnetConfig> {
    let named = match (&model.name, model.family) {
        (Some(name), _) => ResnetConfig::named(name)?,
        (None, Some(SizedFamily::Resnet)) => ResnetConfig::named("resnet18")?,
        (None, None) => return None,
    };
    let sizes = model.clone();
    let is_cifar = data.format == DataFormat::Cifar10;
    let stem = sizes.stem.unwrap_or(if is_cifar { ResnetStem::Cifar } else { named.stem });
    Some(ResnetConfig {
        block: sizes.block.unwrap_or(named.block),
        depths: sizes.depths.unwrap_or(named.depths),
        widths: sizes.widths.unwrap_or(named.widths),
        stem,
        image_size: sizes.image_size.unwrap_or(stem.image_size()),
        classes: sizes.classes.unwrap_or(if is_cifar { CIFAR10_CLASSES } else { named.classes }),
    })
}
