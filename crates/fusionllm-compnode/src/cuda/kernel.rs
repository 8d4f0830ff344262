//! The kernels, by file. Their sources say what each computes and takes.

use super::gpu::{Element, Kernel};

/// What files of kernels include: first of all `dev.h`, the words that all of them are written in.
const HEADERS: [(&str, &str); 7] = [
    ("dev.h", include_str!("kernels/dev.h")),
    ("inputs.h", include_str!("kernels/inputs.h")),
    ("attention.h", include_str!("kernels/attention.h")),
    ("attention_grad.h", include_str!("kernels/attention_grad.h")),
    ("attention32.h", include_str!("kernels/attention32.h")),
    ("attention32_grad.h", include_str!("kernels/attention32_grad.h")),
    ("norm.h", include_str!("kernels/norm.h")),
];

/// The files of kernels, by name.
const FILES: [(&str, &str); 20] = [
    ("attention", include_str!("kernels/attention.cu")),
    ("attention_grad", include_str!("kernels/attention_grad.cu")),
    ("attention32", include_str!("kernels/attention32.cu")),
    ("attention32_grad", include_str!("kernels/attention32_grad.cu")),
    ("dropout", include_str!("kernels/dropout.cu")),
    ("elementwise", include_str!("kernels/elementwise.cu")),
    ("embedding", include_str!("kernels/embedding.cu")),
    ("grouped_attention", include_str!("kernels/grouped_attention.cu")),
    ("grouped_attention_grad", include_str!("kernels/grouped_attention_grad.cu")),
    ("grouped_attention32", include_str!("kernels/grouped_attention32.cu")),
    ("grouped_attention32_grad", include_str!("kernels/grouped_attention32_grad.cu")),
    ("heads", include_str!("kernels/heads.cu")),
    ("loss", include_str!("kernels/loss.cu")),
    ("norm", include_str!("kernels/norm.cu")),
    ("optimizer", include_str!("kernels/optimizer.cu")),
    ("reduce", include_str!("kernels/reduce.cu")),
    ("rms_norm", include_str!("kernels/rms_norm.cu")),
    ("rotary", include_str!("kernels/rotary.cu")),
    ("rows", include_str!("kernels/rows.cu")),
    ("squares", include_str!("kernels/squares.cu")),
];

/// What is compiled of a file: NVRTC has no folder to include from.
pub(super) fn source(file: &str) -> Option<String> {
    let (_, text) = FILES.iter().find(|(name, _)| *name == file)?;
    let mut source = String::new();
    include(&mut source, text, &mut Vec::new());
    Some(source)
}

/// Appends a text with what it includes in its place, each header once.
fn include(source: &mut String, text: &str, included: &mut Vec<&'static str>) {
    for line in text.lines().filter(|line| *line != "#pragma once") {
        let named = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        // The words of the emulator stay out: they are for another compiler.
        match named.and_then(|named| HEADERS.iter().find(|(name, _)| *name == named)) {
            Some((name, _)) if included.contains(name) => {}
            Some((name, header)) => {
                included.push(name);
                include(source, header, included);
            }
            None => {
                source.push_str(line);
                source.push('\n');
            }
        }
    }
}

/// Every file.
#[cfg(test)]
pub(super) fn files() -> impl Iterator<Item = &'static str> {
    FILES.iter().map(|(name, _)| *name)
}

const fn kernel(file: &'static str, name: &'static str, threads: u32) -> Kernel {
    Kernel { name, file, threads }
}

/// A kernel that there is for both types of element.
#[derive(Clone, Copy, Debug)]
pub(super) struct OfElement {
    f32: Kernel,
    bf16: Kernel,
}

impl OfElement {
    pub(super) fn of(self, element: Element) -> Kernel {
        match element {
            Element::F32 => self.f32,
            Element::Bf16 => self.bf16,
        }
    }
}

macro_rules! both {
    ($constant:ident, $file:literal, $name:literal, $threads:literal) => {
        pub(super) const $constant: OfElement = OfElement {
            f32: kernel($file, concat!($name, "_f32"), $threads),
            bf16: kernel($file, concat!($name, "_bf16"), $threads),
        };
    };
}

both!(ADD, "elementwise", "add", 256);
both!(PRODUCT, "elementwise", "product", 256);
both!(SCALE, "elementwise", "scale", 256);
both!(ACTIVATION, "elementwise", "activation", 256);
both!(ACTIVATION_GRAD, "elementwise", "activation_grad", 256);
pub(super) const CAST_F32_BF16: Kernel = kernel("elementwise", "cast_f32_bf16", 256);
pub(super) const CAST_BF16_F32: Kernel = kernel("elementwise", "cast_bf16_f32", 256);
/// Elements that a block of [`CAST_F32_BF16`] and [`CAST_BF16_F32`] covers.
pub(super) const CAST_ELEMENTS: usize = 2048;
/// Elements that a block of [`TO_HEADS`] and [`FROM_HEADS`] covers.
pub(super) const HEAD_ELEMENTS: usize = 1024;

/// Elements that a block of the other kernels over elements covers: 16 bytes a thread.
pub(super) const fn elements(element: Element) -> usize {
    match element {
        Element::F32 => 1024,
        Element::Bf16 => 2048,
    }
}

both!(DROPOUT, "dropout", "dropout", 256);
/// Elements that a block of [`DROPOUT`] covers.
pub(super) const DROPOUT_ELEMENTS: usize = 2048;

both!(EMBEDDING, "embedding", "embedding", 128);
both!(EMBEDDING_GRAD, "embedding", "embedding_grad", 128);
both!(POSITION, "embedding", "position", 128);
both!(POSITION_GRAD, "embedding", "position_grad", 128);

both!(LAYER_NORM, "norm", "layer_norm", 256);
/// Rows that a block of [`LAYER_NORM`] and of [`RMS_NORM`] covers, one a warp.
pub(super) const NORM_ROWS: usize = 8;
both!(LAYER_NORM_GRAD, "norm", "layer_norm_grad", 256);
both!(RMS_NORM, "rms_norm", "rms_norm", 256);
both!(RMS_NORM_GRAD, "rms_norm", "rms_norm_grad", 256);
both!(RMS_NORM_NARROW, "rms_norm", "rms_norm_narrow", 256);
both!(RMS_NORM_NARROW_GRAD, "rms_norm", "rms_norm_narrow_grad", 256);

/// Rows that a block of [`RMS_NORM_NARROW`] covers, if rows of `dim` elements are narrow enough for it.
pub(super) fn narrow_norm_rows(element: Element, dim: usize) -> Option<usize> {
    const BYTES: usize = 16;
    let bytes = dim * element.bytes();
    let narrow = bytes <= 32 * BYTES && bytes.is_multiple_of(BYTES) && bytes > 0;
    narrow.then(|| 256 / (bytes / BYTES).next_power_of_two())
}

both!(ROTARY, "rotary", "rotary", 256);

both!(COLUMN_SUM, "reduce", "column_sum", 128);
/// Columns that a block of [`COLUMN_SUM`] covers.
pub(super) const SUM_COLUMNS: usize = 128;
pub(super) const FOLD: Kernel = kernel("reduce", "fold", 256);
/// Columns that a block of [`FOLD`] covers.
pub(super) const FOLD_COLUMNS: usize = 32;
pub(super) const MEAN_LOSS: Kernel = kernel("reduce", "mean_loss", 256);

both!(CROSS_ENTROPY, "loss", "cross_entropy", 1024);
both!(CROSS_ENTROPY_SMALL, "loss", "cross_entropy_small", 256);
/// Vocabularies up to this size are for [`CROSS_ENTROPY_SMALL`].
pub(super) const SMALL_VOCABULARY: usize = 16_384;

pub(super) const ADAMW: Kernel = kernel("optimizer", "adamw", 256);
pub(super) const SGD: Kernel = kernel("optimizer", "sgd", 256);

pub(super) const TO_HEADS: Kernel = kernel("heads", "to_heads", 256);
pub(super) const FROM_HEADS: Kernel = kernel("heads", "from_heads", 256);
pub(super) const SOFTMAX: Kernel = kernel("heads", "softmax", 256);
pub(super) const SOFTMAX_GRAD: Kernel = kernel("heads", "softmax_grad", 256);
pub(super) const ROW_DOT: Kernel = kernel("heads", "row_dot", 256);

pub(super) const ADD_ROWS: Kernel = kernel("rows", "add_rows", 128);
pub(super) const ADD_LISTED: Kernel = kernel("rows", "add_listed", 128);
pub(super) const GATHER_ROWS: Kernel = kernel("rows", "gather_rows", 128);
pub(super) const CHUNK_SQUARES: Kernel = kernel("squares", "chunk_squares", 256);
pub(super) const SEGMENT_SUMS: Kernel = kernel("squares", "segment_sums", 256);

/// The kernels of flash attention for heads of one width.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flash {
    pub(super) forward: Kernel,
    pub(super) dot: Kernel,
    pub(super) kv_grad: Kernel,
    pub(super) q_grad: Kernel,
}

/// Queries that a block of [`Flash::forward`] and of [`Flash::q_grad`] covers, and keys that one of [`Flash::kv_grad`] does.
pub(super) const FLASH_ROWS: usize = 64;
/// Elements that a block of [`Flash::dot`] covers.
pub(super) const DOT_ELEMENTS: usize = 1024;

macro_rules! flash {
    ($prefix:literal, $file:literal, $element:literal, $width:literal) => {
        Flash {
            forward: kernel(concat!($prefix, $file), concat!($prefix, "attention_", $element, "_d", $width), 128),
            dot: flash!($prefix, $file, "dot", $element, $width),
            kv_grad: flash!($prefix, $file, "kv_grad", $element, $width),
            q_grad: flash!($prefix, $file, "q_grad", $element, $width),
        }
    };
    ($prefix:literal, $file:literal, $what:literal, $element:literal, $width:literal) => {
        kernel(
            concat!($prefix, $file, "_grad"),
            concat!($prefix, "attention_", $what, "_", $element, "_d", $width),
            128,
        )
    };
}

/// Flash attention for heads of this width, where there is one: with queries, keys and values packed into one tensor, or
/// in three.
pub(super) fn flash(element: Element, head_width: usize, packed: bool) -> Option<Flash> {
    match (element, head_width, packed) {
        (Element::F32, 64, true) => Some(flash!("", "attention32", "f32", "64")),
        (Element::Bf16, 32, true) => Some(flash!("", "attention", "bf16", "32")),
        (Element::Bf16, 64, true) => Some(flash!("", "attention", "bf16", "64")),
        (Element::Bf16, 128, true) => Some(flash!("", "attention", "bf16", "128")),
        (Element::F32, 64, false) => Some(flash!("grouped_", "attention32", "f32", "64")),
        (Element::Bf16, 32, false) => Some(flash!("grouped_", "attention", "bf16", "32")),
        (Element::Bf16, 64, false) => Some(flash!("grouped_", "attention", "bf16", "64")),
        (Element::Bf16, 128, false) => Some(flash!("grouped_", "attention", "bf16", "128")),
        _ => None,
    }
}
