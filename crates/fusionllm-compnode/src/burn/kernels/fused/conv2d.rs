//! Convolution as matrix products over the windows of an image (Chellapilla et al., 2006), an image at a time.

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::matrix::{Accum, MatMut, MatRef, add_product, dense, dense_mut, product_into, small_product};
use super::vector::add;
use super::{Fused, tensor};

/// Parts that a micro-batch is cut into for the gradient of the weight, each with a sum of its own. A number that does not
/// depend on the threads, so that the sum does not either.
const PARTS: usize = 8;

/// x [B · inputs · height, width], weight of outputs · inputs · kernel · kernel values, and for `N = 3` a bias [outputs] →
/// [B · outputs · H', W'].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Conv2d {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) window: Window,
    /// Height and width of the input.
    pub(crate) size: [usize; 2],
}

/// A square window that moves over height and width.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) kernel: usize,
    pub(crate) stride: usize,
    pub(crate) padding: usize,
}

impl Window {
    /// How many places it has along `size`, which is at least the kernel less the padding.
    pub(crate) fn places(self, size: usize) -> usize {
        (size + 2 * self.padding).saturating_sub(self.kernel) / self.stride.max(1) + 1
    }

    /// Where an element of the window lies in the image when the window is at `place`; nothing in the padding.
    pub(super) fn at(self, place: usize, offset: usize, size: usize) -> Option<usize> {
        (place * self.stride + offset).checked_sub(self.padding).filter(|&at| at < size)
    }
}

/// What a product is computed on.
#[derive(Clone, Copy)]
enum On {
    AllThreads,
    ThisThread,
}

impl On {
    fn product(self, a: MatRef<'_, f32>, b: MatRef<'_, f32>, out: MatMut<'_, f32>, accum: Accum) {
        match (self, accum) {
            (Self::ThisThread, accum) => small_product(1.0, a, b, out, accum),
            (Self::AllThreads, Accum::Replace) => product_into(a, b, out),
            (Self::AllThreads, Accum::Add) => add_product(a, b, out),
        }
    }
}

impl Conv2d {
    /// Height and width of the output.
    pub(crate) fn output_size(&self) -> [usize; 2] {
        self.size.map(|size| self.window.places(size))
    }

    /// Elements of an input image.
    fn image(&self) -> usize {
        self.inputs * self.size[0] * self.size[1]
    }

    /// Places of the window in an image.
    fn places(&self) -> usize {
        self.output_size().iter().product()
    }

    /// Elements of the window over all channels.
    fn depth(&self) -> usize {
        self.inputs * self.window.kernel * self.window.kernel
    }

    /// Whether an image is itself the matrix of its windows.
    fn is_pointwise(&self) -> bool {
        (self.window.kernel, self.window.stride, self.window.padding) == (1, 1, 0)
    }

    /// The windows of an image as [depth, places], in `room` where they are not the image itself.
    fn windows<'a>(&self, image: &'a [f32], room: &'a mut Vec<f32>) -> &'a [f32] {
        if self.is_pointwise() {
            return image;
        }
        room.resize(self.depth() * self.places(), 0.0);
        let [out_height, out_width] = self.output_size();
        let [height, width] = self.size;
        let plane = height * width;
        for (row, out) in room.chunks_exact_mut(out_height * out_width).enumerate() {
            let (channel, down, right) = self.offsets(row);
            let image = &image[channel * plane..][..plane];
            for (place, out) in out.chunks_exact_mut(out_width).enumerate() {
                match self.window.at(place, down, height) {
                    Some(y) => self.take_row(&image[y * width..][..width], right, out),
                    None => out.fill(0.0),
                }
            }
        }
        room
    }

    /// Channel, and place below and right in the window, of a row of the windows' matrix.
    fn offsets(&self, row: usize) -> (usize, usize, usize) {
        let kernel = self.window.kernel;
        (row / (kernel * kernel), row / kernel % kernel, row % kernel)
    }

    /// The places along a row of the image that are not in the padding.
    fn inside(&self, right: usize, width: usize, places: usize) -> std::ops::Range<usize> {
        let Window { stride, padding, .. } = self.window;
        let first = padding.saturating_sub(right).div_ceil(stride).min(places);
        let end = (width + padding).saturating_sub(right).div_ceil(stride).min(places);
        first..end.max(first)
    }

    /// One element of each window along a row of the image.
    fn take_row(&self, row: &[f32], right: usize, out: &mut [f32]) {
        let Window { stride, padding, .. } = self.window;
        let inside = self.inside(right, row.len(), out.len());
        out[..inside.start].fill(0.0);
        out[inside.end..].fill(0.0);
        if inside.is_empty() {
            return;
        }
        let row = &row[inside.start * stride + right - padding..];
        if stride == 1 {
            out[inside.clone()].copy_from_slice(&row[..inside.len()]);
        } else {
            out[inside].iter_mut().zip(row.iter().step_by(stride)).for_each(|(out, &x)| *out = x);
        }
    }

    /// Adds the gradients of windows, [depth, places], to that of their image, which begins as zeros.
    fn add_windows(&self, windows: &[f32], image: &mut [f32]) {
        let [out_height, out_width] = self.output_size();
        let [height, width] = self.size;
        let Window { stride, padding, .. } = self.window;
        let plane = height * width;
        for (row, windows) in windows.chunks_exact(out_height * out_width).enumerate() {
            let (channel, down, right) = self.offsets(row);
            let inside = self.inside(right, width, out_width);
            if inside.is_empty() {
                continue;
            }
            let image = &mut image[channel * plane..][..plane];
            for (place, windows) in windows.chunks_exact(out_width).enumerate() {
                let Some(y) = self.window.at(place, down, height) else { continue };
                let row = &mut image[y * width + inside.start * stride + right - padding..];
                let windows = &windows[inside.clone()];
                if stride == 1 {
                    row.iter_mut().zip(windows).for_each(|(sum, &term)| *sum += term);
                } else {
                    row.iter_mut().step_by(stride).zip(windows).for_each(|(sum, &term)| *sum += term);
                }
            }
        }
    }

    /// FP of one image.
    fn image_forward(
        &self,
        image: &[f32],
        (weight, bias): (&[f32], Option<&[f32]>),
        out: &mut [f32],
        room: &mut Vec<f32>,
        on: On,
    ) {
        let (depth, places) = (self.depth(), self.places());
        let windows = dense(self.windows(image, room), depth, places);
        let accum = match bias {
            Some(bias) => {
                out.chunks_exact_mut(places).zip(bias).for_each(|(out, &bias)| out.fill(bias));
                Accum::Add
            }
            None => Accum::Replace,
        };
        on.product(dense(weight, self.outputs, depth), windows, dense_mut(out, self.outputs, places), accum);
    }

    /// BP of the images of one part: the gradient of the weight, and that of the images in place.
    fn part_backward(
        &self,
        (images, weight): (&[f32], &[f32]),
        gradients: &[f32],
        mut of_images: Option<&mut [f32]>,
        want_weight: bool,
        on: On,
    ) -> Vec<f32> {
        let (depth, places) = (self.depth(), self.places());
        let mut of_weight = if want_weight { vec![0.0; weight.len()] } else { Vec::new() };
        let (mut room, mut of_windows) = (Vec::new(), vec![0.0; if self.is_pointwise() { 0 } else { depth * places }]);
        let all = images.chunks_exact(self.image()).zip(gradients.chunks_exact(self.outputs * places));
        for (index, (image, gradient)) in all.enumerate() {
            let gradient = dense(gradient, self.outputs, places);
            if want_weight {
                let windows = dense(self.windows(image, &mut room), depth, places);
                let sum = dense_mut(&mut of_weight, self.outputs, depth);
                on.product(gradient, windows.transpose(), sum, Accum::Add);
            }
            let Some(of_images) = of_images.as_deref_mut() else { continue };
            let of_image = &mut of_images[index * self.image()..][..self.image()];
            let weight = dense(weight, self.outputs, depth).transpose();
            if self.is_pointwise() {
                on.product(weight, gradient, dense_mut(of_image, depth, places), Accum::Replace);
            } else {
                on.product(weight, gradient, dense_mut(&mut of_windows, depth, places), Accum::Replace);
                self.add_windows(&of_windows, of_image);
            }
        }
        of_weight
    }

    fn bias_gradient(&self, gradient: &[f32]) -> FlexTensor {
        let mut sums = vec![0.0; self.outputs];
        for image in gradient.chunks_exact((self.outputs * self.places()).max(1)) {
            for (sum, plane) in sums.iter_mut().zip(image.chunks_exact(self.places())) {
                *sum += plane.iter().sum::<f32>();
            }
        }
        tensor(sums, [self.outputs])
    }
}

impl<const N: usize> Fused<N> for Conv2d {
    /// x and the weight.
    type Saved = (FlexTensor, FlexTensor);

    fn forward(&self, inputs: [FlexTensor; N]) -> (FlexTensor, Self::Saved) {
        let [x, weight] = [0, 1].map(|i| inputs[i].clone());
        let images = x.as_slice::<f32>().unwrap_or_default();
        let params =
            (weight.as_slice::<f32>().unwrap_or_default(), inputs.get(2).and_then(FlexTensor::as_slice::<f32>));
        let [height, width] = self.output_size();
        let batch = images.len() / self.image().max(1);
        let mut out = vec![0.0; batch * self.outputs * height * width];
        if batch == 1 {
            self.image_forward(images, params, &mut out, &mut Vec::new(), On::AllThreads);
        } else {
            out.par_chunks_mut(self.outputs * height * width).zip(images.par_chunks(self.image())).for_each_init(
                Vec::new,
                |room, (out, image)| {
                    self.image_forward(image, params, out, room, On::ThisThread);
                },
            );
        }
        (tensor(out, [batch * self.outputs * height, width]), (x, weight))
    }

    fn backward(&self, saved: Self::Saved, gradient: FlexTensor, wanted: [bool; N]) -> [Option<FlexTensor>; N] {
        let (x, weight) = saved;
        let images = x.as_slice::<f32>().unwrap_or_default();
        let of_output = gradient.as_slice::<f32>().unwrap_or_default();
        let values = weight.as_slice::<f32>().unwrap_or_default();
        let batch = images.len() / self.image().max(1);
        let [want_x, want_weight] = [0, 1].map(|i| wanted.get(i) == Some(&true));
        let mut of_x = vec![0.0; if want_x { images.len() } else { 0 }];
        let size = batch.div_ceil(PARTS).max(1);
        let on = if batch == 1 { On::AllThreads } else { On::ThisThread };
        let mut of_parts: Vec<Option<&mut [f32]>> = match want_x {
            true => of_x.chunks_mut(size * self.image()).map(Some).collect(),
            false => (0..batch.div_ceil(size)).map(|_| None).collect(),
        };
        let parts: Vec<Vec<f32>> = of_parts
            .par_iter_mut()
            .zip(images.par_chunks(size * self.image()))
            .zip(of_output.par_chunks(size * self.outputs * self.places()))
            .map(|((of_images, images), gradients)| {
                self.part_backward((images, values), gradients, of_images.as_deref_mut(), want_weight, on)
            })
            .collect();
        drop(of_parts);
        // In the order of the parts, so that the sum is the same on any threads.
        let of_weight = parts.into_iter().reduce(|mut sum, part| {
            add(&mut sum, &part);
            sum
        });
        let (rows, columns) = (x.layout().num_elements() / self.size[1].max(1), self.size[1]);
        let mut given = [
            want_x.then(|| tensor(of_x, [rows, columns])),
            of_weight.filter(|_| want_weight).map(|sum| tensor(sum, [values.len()])),
        ];
        std::array::from_fn(|input| match input {
            0 | 1 => given[input].take(),
            _ => wanted[input].then(|| self.bias_gradient(of_output)),
        })
    }
}
