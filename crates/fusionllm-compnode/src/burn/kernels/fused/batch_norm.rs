//! Batch norm over batch, height and width (Ioffe and Szegedy, arXiv 1502.03167), two passes each way.

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::vector::{sum_of, sum_of_two};
use super::{Fused, TASK, tensor};

/// x [B · channels · H, W], weight [channels], bias [channels] → (x - mean) / sqrt(var + eps) · weight + bias, with mean
/// and variance of each channel in `moments`, or its own (biased) ones.
#[derive(Clone, Debug)]
pub(crate) struct BatchNorm {
    pub(crate) eps: f64,
    pub(crate) channels: usize,
    /// H · W.
    pub(crate) plane: usize,
    /// Mean and biased variance by channel.
    pub(crate) moments: Vec<(f32, f32)>,
}

/// What BP needs.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    x: FlexTensor,
    weight: FlexTensor,
}

/// Mean and biased variance of each channel of x [B · channels · plane].
pub(crate) fn moments_of(x: &FlexTensor, channels: usize, plane: usize) -> Vec<(f32, f32)> {
    let x = x.to_contiguous();
    let values = x.as_slice::<f32>().unwrap_or_default();
    let count = (values.len() / channels.max(1)) as f64;
    let moments = |channel: usize| {
        // Sums of a plane in f32, of planes in f64: a channel may have millions of elements.
        let planes = || values.chunks_exact(plane).skip(channel).step_by(channels);
        let mean = planes().map(|x| f64::from(sum_of(x, |x| x))).sum::<f64>() / count;
        let around = mean as f32;
        let variance = planes().map(|x| f64::from(sum_of(x, |x| (x - around) * (x - around)))).sum::<f64>() / count;
        (around, variance as f32)
    };
    (0..channels).into_par_iter().map(moments).collect()
}

impl BatchNorm {
    /// 1 / sqrt(var + eps) of a channel.
    fn scale(&self, variance: f32) -> f32 {
        (1.0 / (f64::from(variance) + self.eps).sqrt()) as f32
    }

    /// Planes that one task takes.
    fn per_task(&self) -> usize {
        (TASK / self.plane.max(1)).max(1)
    }
}

impl Fused<3> for BatchNorm {
    type Saved = Saved;

    fn forward(&self, [x, weight, bias]: [FlexTensor; 3]) -> (FlexTensor, Saved) {
        let values = x.as_slice::<f32>().unwrap_or_default();
        let scales = weight.as_slice::<f32>().unwrap_or_default();
        let shifts = bias.as_slice::<f32>().unwrap_or_default();
        let affine = self.moments.iter().zip(scales).zip(shifts);
        let affine: Vec<(f32, f32, f32)> =
            affine.map(|((&(mean, variance), &weight), &bias)| (mean, self.scale(variance) * weight, bias)).collect();
        let mut out = vec![0.0; values.len()];
        out.par_chunks_mut(self.plane)
            .zip(values.par_chunks(self.plane))
            .enumerate()
            .with_min_len(self.per_task())
            .for_each(|(index, (out, x))| {
                let (mean, scale, shift) = affine[index % self.channels];
                out.iter_mut().zip(x).for_each(|(out, &x)| *out = (x - mean) * scale + shift);
            });
        let dims = x.layout().shape().clone();
        (tensor(out, dims), Saved { x, weight })
    }

    fn backward(&self, saved: Saved, mut gradient: FlexTensor, wanted: [bool; 3]) -> [Option<FlexTensor>; 3] {
        let x = saved.x.as_slice::<f32>().unwrap_or_default();
        let weight = saved.weight.as_slice::<f32>().unwrap_or_default();
        let (channels, plane) = (self.channels, self.plane);
        let of_output = gradient.as_slice::<f32>().unwrap_or_default();
        let sums = |channel: usize| {
            let (mean, variance) = self.moments[channel];
            let planes = |of| <[f32]>::chunks_exact(of, plane).skip(channel).step_by(channels);
            let (mut plain, mut along) = (0.0f64, 0.0f64);
            for (g, x) in planes(of_output).zip(planes(x)) {
                plain += f64::from(sum_of(g, |g| g));
                along += f64::from(sum_of_two(g, x, |g, x| g * (x - mean)));
            }
            (plain, along * f64::from(self.scale(variance)))
        };
        let sums: Vec<(f64, f64)> = (0..channels).into_par_iter().map(sums).collect();
        let count = (x.len() / channels.max(1)) as f64;
        if wanted[0] {
            gradient
                .storage_mut::<f32>()
                .par_chunks_mut(plane)
                .zip(x.par_chunks(plane))
                .enumerate()
                .with_min_len(self.per_task())
                .for_each(|(index, (gradient, x))| {
                    let channel = index % channels;
                    let ((mean, variance), (plain, along)) = (self.moments[channel], sums[channel]);
                    let scale = self.scale(variance);
                    let (plain, along) = ((plain / count) as f32, (along / count) as f32 * scale);
                    let factor = scale * weight[channel];
                    for (gradient, &x) in gradient.iter_mut().zip(x) {
                        *gradient = (*gradient - plain - (x - mean) * along) * factor;
                    }
                });
        }
        let by_channel = |of: fn(&(f64, f64)) -> f64| tensor(sums.iter().map(|s| of(s) as f32).collect(), [channels]);
        let of_weight = wanted[1].then(|| by_channel(|s| s.1));
        let of_bias = wanted[2].then(|| by_channel(|s| s.0));
        [wanted[0].then_some(gradient), of_weight, of_bias]
    }
}
