//! What the executor asks of a GPU: memory, kernels and matrix products, on one stream in order.
//!
//! [`super::driver`] is the real one; tests have one that runs the same kernels on the CPU.

use std::fmt;
use std::sync::Arc;

use crate::ExecutorError;

/// A GPU whose work is done in the order in which it is asked for. Addresses are bytes of its memory.
pub(super) trait Gpu: fmt::Debug + Send + Sync {
    /// Takes memory.
    ///
    /// # Errors
    /// [`ExecutorError::Device`] if there is not so much.
    fn take(&self, bytes: usize) -> Result<u64, ExecutorError>;

    /// Gives memory back that [`Self::take`] gave for so many bytes.
    fn give_back(&self, address: u64, bytes: usize);

    /// Copies `bytes` to the GPU. They may change as soon as it returns.
    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), ExecutorError>;

    /// Copies from the GPU, after all that was asked for before.
    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), ExecutorError>;

    /// Copies within the GPU.
    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), ExecutorError>;

    /// Sets bytes to zero.
    fn zero(&self, at: u64, bytes: usize) -> Result<(), ExecutorError>;

    /// Starts a kernel over a grid of blocks. `arguments` are the bytes of its one argument, a struct.
    fn launch(&self, kernel: Kernel, grid: [u32; 2], arguments: &[u8]) -> Result<(), ExecutorError>;

    /// Starts a matrix product.
    fn multiply(&self, product: &Product, operands: Operands) -> Result<(), ExecutorError>;

    /// Waits until all is done.
    fn sync(&self) -> Result<(), ExecutorError>;

    /// Gives memory that nobody has to whoever else uses the GPU.
    fn trim(&self);

    /// Makes kernels ready that will be launched soon.
    fn prepare(&self, kernels: &[Kernel]) -> Result<(), ExecutorError>;
}

/// A kernel by name, and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Kernel {
    /// The name in the source.
    pub(super) name: &'static str,
    /// Its file in `kernels/`, without the ending.
    pub(super) file: &'static str,
    /// Threads of a block.
    pub(super) threads: u32,
}

/// The type of an element in the GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Element {
    F32,
    Bf16,
}

impl Element {
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// How a matrix lies in memory: row-major, `leading` elements from row to row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Matrix {
    pub(super) element: Element,
    pub(super) leading: usize,
    /// Whether the product takes it transposed.
    pub(super) transposed: bool,
    /// Elements from one matrix of a batch to the next.
    pub(super) stride: usize,
}

impl Matrix {
    /// One matrix, as it lies.
    pub(super) fn new(element: Element, leading: usize) -> Self {
        Self { element, leading, transposed: false, stride: 0 }
    }

    pub(super) fn transposed(self) -> Self {
        Self { transposed: true, ..self }
    }

    pub(super) fn every(self, stride: usize) -> Self {
        Self { stride, ..self }
    }
}

/// `d [m, n] = alpha · a [m, k] · b [k, n]`, plus `c`, which lies as `d` does, or plus a row of `n` biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Product {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) a: Matrix,
    pub(super) b: Matrix,
    pub(super) d: Matrix,
    /// Products of a batch, 1 for a single one.
    pub(super) batch: usize,
    /// Whether f32 operands may be rounded to tf32.
    pub(super) tf32: bool,
    /// Whether `c` is added.
    pub(super) adds: bool,
    /// Whether biases are added, of the element type of `d`.
    pub(super) bias: bool,
}

/// Addresses of a product's operands; those that it does not have are 0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operands {
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) c: u64,
    pub(super) d: u64,
    pub(super) bias: u64,
    pub(super) alpha: f32,
}

/// Memory of a GPU, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Buffer {
    gpu: Arc<dyn Gpu>,
    address: u64,
    bytes: usize,
}

impl Buffer {
    /// Takes memory, which holds anything.
    ///
    /// # Errors
    /// [`ExecutorError::Device`] if there is not so much.
    pub(super) fn take(gpu: &Arc<dyn Gpu>, bytes: usize) -> Result<Self, ExecutorError> {
        // Nobody asks for nothing, but an empty stage may.
        let bytes = bytes.max(1);
        Ok(Self { gpu: Arc::clone(gpu), address: gpu.take(bytes)?, bytes })
    }

    /// Takes memory full of zeros.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub(super) fn zeros(gpu: &Arc<dyn Gpu>, bytes: usize) -> Result<Self, ExecutorError> {
        let buffer = Self::take(gpu, bytes)?;
        gpu.zero(buffer.address, buffer.bytes)?;
        Ok(buffer)
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.gpu.give_back(self.address, self.bytes);
    }
}

/// The bytes of a kernel's one argument: pointers first, then numbers of four bytes.
#[derive(Debug, Default)]
pub(super) struct Packed(Vec<u8>);

impl Packed {
    pub(super) fn pointer(&mut self, address: u64) {
        self.0.extend(address.to_ne_bytes());
    }

    pub(super) fn u32(&mut self, number: u32) {
        self.0.extend(number.to_ne_bytes());
    }

    pub(super) fn f32(&mut self, number: f32) {
        self.0.extend(number.to_ne_bytes());
    }

    /// Padded to whole pointers, as the struct is.
    pub(super) fn bytes(&mut self) -> &[u8] {
        self.0.resize(self.0.len().next_multiple_of(8), 0);
        &self.0
    }
}

/// A count as kernels take it.
///
/// # Errors
/// [`ExecutorError::Device`] if it has more than 32 bits.
pub(super) fn number(count: usize) -> Result<u32, ExecutorError> {
    u32::try_from(count).map_err(|_| ExecutorError::Device {
        reason: format!("{count} elements are too many for the GPU's kernels: take smaller micro-batches or stages"),
    })
}

/// The bytes of numbers, as they lie in memory.
pub(super) fn bytes_of_f32(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}

/// Numbers out of their bytes.
pub(super) fn f32_of_bytes(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_ne_bytes(b)).collect()
}

/// Numbers out of the bytes of bf16.
pub(super) fn f32_of_bf16_bytes(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<2>().0.iter().map(|&b| half::bf16::from_ne_bytes(b).to_f32()).collect()
}
