//! `[data]` of images: how their pixels become numbers, and how they are changed while training.

use super::data_spec::{DataFormat, DataSpec, RowKind};
use super::refusal::fail;
use super::validate::in_range;
use crate::JobError;

/// Means and deviations of ImageNet's channels, by which torchvision's models are trained.
const IMAGENET: [[f64; 3]; 2] = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]];
/// The same of CIFAR-10.
const CIFAR10: [[f64; 3]; 2] = [[0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]];
/// Most pixels that an image is shifted by.
const MOST_PADDING: u32 = 1024;

impl DataSpec {
    /// Mean and standard deviation of each channel: those of ImageNet or CIFAR-10, unless the job says others.
    pub fn image_moments(&self) -> ([f64; 3], [f64; 3]) {
        let [mean, std] = if self.format == DataFormat::Cifar10 { CIFAR10 } else { IMAGENET };
        (self.mean.unwrap_or(mean), self.std.unwrap_or(std))
    }

    /// What images must fulfil, and that nothing else is given with keys of images.
    pub(super) fn validate_images(&self) -> Result<(), JobError> {
        let Self { mean, std, crop_padding, flip, .. } = *self;
        if !self.format.is_images() {
            let keys = [
                ("data.mean", mean.is_some()),
                ("data.std", std.is_some()),
                ("data.crop_padding", crop_padding > 0),
                ("data.flip", flip),
            ];
            return match keys.iter().find(|(_, given)| *given) {
                Some((key, _)) => fail(key, "is given, but data.format has no images".to_owned()),
                None => Ok(()),
            };
        }
        let of_text = [
            ("data.tokenizer", self.tokenizer != Self::BYTES),
            ("data.column", self.column != Self::TEXT_COLUMN),
            ("data.rows", self.rows != RowKind::default()),
            ("data.chat_template", self.chat_template.is_some()),
            ("data.seq_len", self.seq_len != Self::SEQ_LEN),
        ];
        if let Some((key, _)) = of_text.iter().find(|(_, given)| *given) {
            return fail(key, "is given, but data.format has images: leave it out".to_owned());
        }
        for value in mean.into_iter().flatten() {
            in_range("data.mean", value, (0.0..=1.0).contains(&value), "at least 0 and at most 1")?;
        }
        for value in std.into_iter().flatten() {
            in_range("data.std", value, value > 1e-3 && value <= 1.0, "above 0.001 and at most 1")?;
        }
        if crop_padding > MOST_PADDING {
            return fail("data.crop_padding", format!("is {crop_padding}, expected at most {MOST_PADDING}"));
        }
        Ok(())
    }
}
