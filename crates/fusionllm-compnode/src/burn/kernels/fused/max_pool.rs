//! The largest element of each window, which remembers where it stood.

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::conv2d::Window;
use super::{Fused, TASK, tensor};

/// x [B · C · height, width] → [B · C · H', W']. Of equals the first counts, row by row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MaxPool {
    pub(crate) window: Window,
    /// Height and width of the input.
    pub(crate) size: [usize; 2],
}

/// What BP needs: where in its plane each element of the output stood, and the shape of x.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    places: Vec<u32>,
    dims: [usize; 2],
}

impl MaxPool {
    /// The largest elements of one plane, and where they stood.
    fn plane(&self, x: &[f32], out: &mut [f32], places: &mut [u32]) {
        let [height, width] = self.size;
        let columns = self.window.places(width);
        for (index, (out, place)) in out.iter_mut().zip(places).enumerate() {
            let (down, right) = (index / columns, index % columns);
            let mut largest: Option<(usize, f32)> = None;
            for y in (0..self.window.kernel).filter_map(|offset| self.window.at(down, offset, height)) {
                for x_at in (0..self.window.kernel).filter_map(|offset| self.window.at(right, offset, width)) {
                    let at = y * width + x_at;
                    // Not a number stays visible.
                    if largest.is_none_or(|(_, most)| x[at] > most || x[at].is_nan()) {
                        largest = Some((at, x[at]));
                    }
                }
            }
            let (at, value) = largest.unwrap_or((0, f32::NEG_INFINITY));
            (*out, *place) = (value, at as u32);
        }
    }
}

impl Fused<1> for MaxPool {
    type Saved = Saved;

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, Saved) {
        let values = x.as_slice::<f32>().unwrap_or_default();
        let [height, width] = self.size;
        let [out_height, out_width] = self.size.map(|size| self.window.places(size));
        let (plane, out_plane) = (height * width, out_height * out_width);
        let planes = values.len() / plane.max(1);
        let (mut out, mut places) = (vec![0.0; planes * out_plane], vec![0u32; planes * out_plane]);
        out.par_chunks_mut(out_plane)
            .zip(places.par_chunks_mut(out_plane))
            .zip(values.par_chunks(plane))
            .with_min_len((TASK / plane.max(1)).max(1))
            .for_each(|((out, places), x)| self.plane(x, out, places));
        (tensor(out, [planes * out_height, out_width]), Saved { places, dims: [planes * height, width] })
    }

    fn backward(&self, saved: Saved, gradient: FlexTensor, wanted: [bool; 1]) -> [Option<FlexTensor>; 1] {
        if !wanted[0] {
            return [None];
        }
        let [height, width] = self.size;
        let out_plane: usize = self.size.map(|size| self.window.places(size)).iter().product();
        let of_output = gradient.as_slice::<f32>().unwrap_or_default();
        let mut of_x = vec![0.0; saved.dims.iter().product()];
        of_x.par_chunks_mut(height * width)
            .zip(of_output.par_chunks(out_plane))
            .zip(saved.places.par_chunks(out_plane))
            .with_min_len((TASK / (height * width).max(1)).max(1))
            .for_each(|((of_x, gradient), places)| {
                for (&gradient, &place) in gradient.iter().zip(places) {
                    of_x[place as usize] += gradient;
                }
            });
        [Some(tensor(of_x, saved.dims))]
    }
}
