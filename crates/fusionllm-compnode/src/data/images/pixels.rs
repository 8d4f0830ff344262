//! From a file to the numbers that a model reads.

use image::imageops::{self, FilterType};
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::options::DecoderOptions;

/// Most pixels of a side.
const MOST_SIDE: u32 = 1 << 15;
/// Most pixels in all, of four bytes at the most: what is larger would rather fill the memory.
const MOST_PIXELS: u64 = 1 << 27;
/// How often the shorter side may fit into the longer one, which is resized with it.
const MOST_STRETCH: u32 = 100;
/// How an error of the decoder of JPEG begins that is about what it passes over otherwise, and does not touch the pixels.
const HARMLESS: &str = "[strict-mode]";

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
        (limits.max_image_width, limits.max_image_height) = (Some(MOST_SIDE), Some(MOST_SIDE));
        limits.max_alloc = Some(4 * MOST_PIXELS);
        reader.limits(limits);
        let failed = |error: image::ImageError| unreadable(one_line(&error.to_string()));
        let decoder = reader.into_decoder().map_err(failed)?;
        let (width, height) = decoder.dimensions();
        if u64::from(width) * u64::from(height) > MOST_PIXELS {
            return Err(format!("has {width} x {height} pixels, expected at most {MOST_PIXELS} in all"));
        }
        if width.max(height) / width.min(height).max(1) > MOST_STRETCH {
            return Err(format!(
                "has {width} x {height} pixels, expected sides of which one is at most {MOST_STRETCH} times the other"
            ));
        }
        let picture = DynamicImage::from_decoder(decoder).map_err(failed)?;
        Ok(Self(picture.into_rgb8()))
    }

    /// Looks for damage that [`Self::decode`] passes over: it fills what a JPEG lacks with grey.
    ///
    /// # Errors
    /// What is wrong, as of [`Self::decode`].
    pub(super) fn check(bytes: &[u8]) -> Result<(), String> {
        Self::decode(bytes)?;
        if !matches!(image::guess_format(bytes), Ok(ImageFormat::Jpeg)) {
            return Ok(());
        }
        let damaged = |reason: &str| Err(format!("is a damaged JPEG image: {reason}"));
        if !ends(bytes) {
            return damaged("it is cut short");
        }
        let options = DecoderOptions::default().set_strict_mode(true);
        let options = options.set_max_width(MOST_SIDE as usize).set_max_height(MOST_SIDE as usize);
        match JpegDecoder::new_with_options(ZCursor::new(bytes), options).decode() {
            Err(error) if !error.to_string().contains(HARMLESS) => damaged(&one_line(&error.to_string())),
            Ok(_) | Err(_) => Ok(()),
        }
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

/// Whether a JPEG has the mark of its end: ITU-T T.81, B.1. Marks follow each other by the lengths of their segments; after
/// the head of a scan comes the next mark that is no part of what the scan holds.
fn ends(jpeg: &[u8]) -> bool {
    let mut at = 2;
    loop {
        let Some(mark) = jpeg.get(at..).and_then(|rest| rest.iter().position(|&byte| byte == 0xff)) else {
            return false;
        };
        at += mark;
        match jpeg.get(at + 1) {
            Some(0xd9) => return true,
            // A stuffed byte, a mark that restarts, another byte that fills up: no segment follows.
            Some(0x00 | 0x01 | 0xd0..=0xd7) => at += 2,
            Some(0xff) => at += 1,
            Some(_) => {
                let Some(&[high, low]) = jpeg.get(at + 2..at + 4) else { return false };
                at += 2 + usize::from(u16::from_be_bytes([high, low]));
            }
            None => return false,
        }
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
