//! The kernels, by file. Their sources say what each computes and takes.

use super::gpu::{Element, Kernel};

/// The words that all kernels are written in; stands before each of [`sources`].
const WORDS: &str = include_str!("kernels/dev.h");

/// The files of kernels, by name.
const FILES: [(&str, &str); 14] = [
    ("attention", include_str!("kernels/attention.cu")),
    ("attention_grad", include_str!("kernels/attention_grad.cu")),
    ("attention32", include_str!("kernels/attention32.cu")),
    ("attention32_grad", include_str!("kernels/attention32_grad.cu")),
    ("dropout", include_str!("kernels/dropout.cu")),
    ("elementwise", include_str!("kernels/elementwise.cu")),
    ("embedding", include_str!("kernels/embedding.cu")),
    ("heads", include_str!("kernels/heads.cu")),
    ("loss", include_str!("kernels/loss.cu")),
    ("norm", include_str!("kernels/norm.cu")),
    ("optimizer", include_str!("kernels/optimizer.cu")),
    ("reduce", include_str!("kernels/reduce.cu")),
    ("rows", include_str!("kernels/rows.cu")),
    ("squares", include_str!("kernels/squares.cu")),
];

/// What is compiled of a file.
pub(super) fn source(file: &str) -> Option<String> {
    let (_, text) = FILES.iter().find(|(name, _)| *name == file)?;
    Some(format!("{WORDS}\n{}", text.replace("#include \"dev.h\"", "")))
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
/// Rows that a block of [`LAYER_NORM`] covers, one a warp.
pub(super) const NORM_ROWS: usize = 8;
both!(LAYER_NORM_GRAD, "norm", "layer_norm_grad", 256);

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

both!(TO_HEADS, "heads", "to_heads", 256);
both!(FROM_HEADS, "heads", "from_heads", 256);
pub(super) const SOFTMAX: Kernel = kernel("heads", "softmax", 256);
pub(super) const SOFTMAX_GRAD: Kernel = kernel("heads", "softmax_grad", 256);
both!(ROW_DOT, "heads", "row_dot", 256);

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
    ($file:literal, $element:literal, $width:literal) => {
        Flash {
            forward: kernel($file, concat!("attention_", $element, "_d", $width), 128),
            dot: kernel(concat!($file, "_grad"), concat!("attention_dot_", $element, "_d", $width), 128),
            kv_grad: kernel(concat!($file, "_grad"), concat!("attention_kv_grad_", $element, "_d", $width), 128),
            q_grad: kernel(concat!($file, "_grad"), concat!("attention_q_grad_", $element, "_d", $width), 128),
        }
    };
}

/// Flash attention for heads of this width, where there is one.
pub(super) fn flash(element: Element, head_width: usize) -> Option<Flash> {
    match (element, head_width) {
        (Element::F32, 64) => Some(flash!("attention32", "f32", "64")),
        (Element::Bf16, 32) => Some(flash!("attention", "bf16", "32")),
        (Element::Bf16, 64) => Some(flash!("attention", "bf16", "64")),
        (Element::Bf16, 128) => Some(flash!("attention", "bf16", "128")),
        _ => None,
    }
}
