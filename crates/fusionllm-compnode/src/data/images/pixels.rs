//! From a file to the numbers that a model reads.

use image::imageops::{self, FilterType};
use image::{ImageFormat, ImageReader, Limits, RgbImage};

/// Most pixels of a side: what is larger would rather fill the memory.
const MOST_PIXELS: u32 = 1 << 15;
/// Most bytes that a picture may fill while it is decoded.
const MOST_MEMORY: u64 = 1 << 30;

/// Red, green and blue of each pixel, 8 bits each, row by row.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Picture(RgbImage);

/// How a picture is changed in training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    /// Pixels that the picture moves to the left and up; below 0, to the right and down. What comes in is black.
    pub(super) shift: [i64; 2],
    /// Whether it is mirrored.
    pub(super) is_mirrored: bool,
}

/// How pixels become numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Scaling {
    /// Pixels of a side of what the model reads.
    pub(super) size: usize,
    /// By channel.
    pub(super) mean: [f64; 3],
    pub(super) std: [f64; 3],
}

impl Picture {
    /// A PNG or JPEG file.
    ///
    /// # Errors
    /// Why it is none, or cannot be read.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let unreadable = |reason: String| format!("is no PNG or JPEG image that can be read: {reason}");
        let mut reader = ImageReader::new(std::io::Cursor::new(bytes));
        match image::guess_format(bytes) {
            Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg)) => reader.set_format(format),
            _ if bytes.is_empty() => return Err(unreadable("it is empty".to_owned())),
            _ => return Err(unreadable("it begins as neither".to_owned())),
        }
        let mut limits = Limits::default();
        (limits.max_image_width, limits.max_image_height) = (Some(MOST_PIXELS), Some(MOST_PIXELS));
        limits.max_alloc = Some(MOST_MEMORY);
        reader.limits(limits);
        reader.decode().map(|picture| Self(picture.to_rgb8())).map_err(|error| unreadable(one_line(&error.to_string())))
    }

    /// A picture whose channels lie one after the other, `size` pixels a side.
    pub(super) fn of_planes(planes: &[u8], size: usize) -> Self {
        let plane = size * size;
        let pixel = |x: u32, y: u32| {
            let at = y as usize * size + x as usize;
            image::Rgb([0, 1, 2].map(|channel| planes.get(channel * plane + at).copied().unwrap_or_default()))
        };
        Self(RgbImage::from_fn(size as u32, size as u32, pixel))
    }

    /// The middle square of the picture, with its shorter side made as long as the model's images.
    fn fitted(self, size: u32) -> RgbImage {
        let (width, height) = self.0.dimensions();
        let shorter = width.min(height);
        let scaled = |side: u32| {
            let side = (u64::from(side) * u64::from(size) + u64::from(shorter) / 2) / u64::from(shorter.max(1));
            u32::try_from(side).unwrap_or(u32::MAX).max(size)
        };
        let picture = match shorter == size {
            true => self.0,
            false => imageops::resize(&self.0, scaled(width), scaled(height), FilterType::Triangle),
        };
        let (width, height) = picture.dimensions();
        if (width, height) == (size, size) {
            return picture;
        }
        imageops::crop_imm(&picture, (width - size) / 2, (height - size) / 2, size, size).to_image()
    }

    /// Appends what the model reads: `[3, size, size]`.
    pub(super) fn write(self, scaling: &Scaling, change: Change, out: &mut Vec<f32>) {
        let size = scaling.size as i64;
        let picture = self.fitted(scaling.size as u32);
        let pixels = picture.as_raw();
        for channel in 0..3 {
            let (mean, std) = (scaling.mean[channel], scaling.std[channel]);
            // All values that a pixel can have.
            let table: Vec<f32> = (0..256).map(|v| ((f64::from(v) / 255.0 - mean) / std) as f32).collect();
            for y in 0..size {
                for x in 0..size {
                    let x = if change.is_mirrored { size - 1 - x } else { x };
                    let (x, y) = (x + change.shift[0], y + change.shift[1]);
                    let is_inside = (0..size).contains(&x) && (0..size).contains(&y);
                    let at = (y * size + x) as usize * 3 + channel;
                    let value = if is_inside { pixels.get(at).copied().unwrap_or_default() } else { 0 };
                    out.push(table[usize::from(value)]);
                }
            }
        }
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
