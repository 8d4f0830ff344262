//! Micro-batches of images.

use std::sync::Arc;

use fusionllm_codec::{HostTensor, Values};
use fusionllm_protocol::{DataSpec, SampleOrder, TrainView};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::pixels::{Change, Scaling};
use super::{Entry, ImageSet};
use crate::data::Batches;
use crate::data::samples::Epochs;
use crate::params::seed_for;
use crate::{CompNodeError, ExecutorError};

/// Batches of a job: images f32 `[B, 3, size, size]`, and classes i32 `[B, 1]`.
#[derive(Debug)]
pub struct ImageBatches {
    set: Arc<ImageSet>,
    scaling: Scaling,
    seed: u64,
    order: SampleOrder,
    /// Images in the global batch.
    batch: usize,
    /// Images in a micro-batch.
    micro_batch_size: usize,
    eval_micro_batches: usize,
    /// Pixels by which an image may move in training.
    crop_padding: u32,
    flip: bool,
}

impl ImageBatches {
    /// The batches of a job whose model reads images of `size` pixels a side. What is drawn is drawn from `seed`.
    pub fn new(set: Arc<ImageSet>, size: usize, data: &DataSpec, train: &TrainView, seed: u64) -> Self {
        let (mean, std) = data.image_moments();
        Self {
            set,
            scaling: Scaling { size, mean, std },
            seed,
            order: data.sample_order(),
            batch: train.batch as usize,
            micro_batch_size: train.micro_batch_size() as usize,
            eval_micro_batches: train.eval_batches as usize,
            crop_padding: data.crop_padding,
            flip: data.flip,
        }
    }

    /// The images of a micro-batch, each as it is changed.
    fn tensors(&self, images: &[(Entry, Change)]) -> Result<(HostTensor, HostTensor), CompNodeError> {
        let size = self.scaling.size;
        let read = |&(entry, change): &(Entry, Change)| {
            let mut values = Vec::with_capacity(3 * size * size);
            self.set.picture(entry)?.write(&self.scaling, change, &mut values);
            Ok(values)
        };
        let values: Vec<Vec<f32>> = images.par_iter().map(read).collect::<Result<_, CompNodeError>>()?;
        let classes = images.iter().map(|(entry, _)| entry.class.cast_signed()).collect();
        let tensor =
            |shape, values| HostTensor::new(shape, values).map_err(|e| ExecutorError::Internal { what: e.to_string() });
        let pixels = tensor(vec![images.len(), 3, size, size], Values::F32(values.concat()))?;
        Ok((pixels, tensor(vec![images.len(), 1], Values::I32(classes))?))
    }

    /// How the image at a place of a step's batch is changed: a function of the seed, the step and the place.
    fn change(&self, step: u64, place: u64) -> Change {
        let parts = [b"image".as_slice(), &step.to_le_bytes(), &place.to_le_bytes()];
        let mut rng = ChaCha8Rng::seed_from_u64(seed_for(self.seed, &parts));
        let most = i64::from(self.crop_padding);
        let shift = [0, 1].map(|_| rng.random_range(-most..=most));
        Change { shift, is_mirrored: self.flip && rng.random_range(0..2u32) == 1 }
    }
}

impl Batches for ImageBatches {
    fn train(&self, step: u64, index: u32) -> Result<(HostTensor, HostTensor), CompNodeError> {
        let epochs = Epochs { order: self.order, seed: self.seed, samples: self.set.train.len() as u64 };
        let first = u64::from(index) * self.micro_batch_size as u64;
        let image = |place: u64| {
            let sample = epochs.sample(step.wrapping_mul(self.batch as u64).wrapping_add(place));
            (self.set.train[sample as usize], self.change(step, place))
        };
        let images: Vec<_> = (first..first + self.micro_batch_size as u64).map(image).collect();
        self.tensors(&images)
    }

    /// Evenly spread over what is held out.
    fn eval(&self, index: u32) -> Result<(HostTensor, HostTensor), CompNodeError> {
        let (held_out, count) = (self.set.eval.len(), self.micro_batch_size * self.eval_micro_batches);
        let first = index as usize * self.micro_batch_size;
        let image = |place: usize| (self.set.eval[place * held_out / count.max(1)], Change::default());
        let images: Vec<_> = (first..first + self.micro_batch_size).map(image).collect();
        self.tensors(&images)
    }
}
