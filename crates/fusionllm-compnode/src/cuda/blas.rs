//! Matrix products by cuBLASLt, each kind described once.
#![expect(unsafe_code, reason = "cuBLASLt's interface")]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtEpilogue_t, cublasLtMatmulDescAttributes_t,
    cublasLtMatmulPreferenceAttributes_t, cublasLtMatrixLayoutAttribute_t, cudaDataType_t,
};
use cudarc::driver;

use super::gpu::{Element, Matrix, Operands, Product};
use crate::ExecutorError;

const MIB: usize = 1 << 20;
/// Memory for products to work in, as NVIDIA advises for Hopper and later, and for what is older.
const WORKSPACE: usize = 32 * MIB;
const WORKSPACE_OLD: usize = 8 * MIB;
const HOPPER: i32 = 9;

/// cuBLASLt on one device. All products run on one stream, so that they may share a workspace.
#[derive(Debug)]
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    workspace_bytes: usize,
    described: Mutex<HashMap<(Product, Alignment), Described>>,
}

/// The largest powers of two, up to 256, that the addresses of a, b, c and d are multiples of.
type Alignment = [u32; 4];

/// A kind of product in cuBLASLt's terms, and how to compute it.
#[derive(Clone, Copy, Debug)]
struct Described {
    operation: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    d: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Blas {
    /// On the device whose context is this thread's.
    ///
    /// # Errors
    /// [`ExecutorError::Device`] if cuBLASLt does not start.
    pub(super) fn new(capability: (i32, i32)) -> Result<Self, ExecutorError> {
        let workspace_bytes = if capability.0 >= HOPPER { WORKSPACE } else { WORKSPACE_OLD };
        // SAFETY: the memory is kept as long as the device is open.
        let workspace = unsafe { driver::result::malloc_sync(workspace_bytes) }
            .map_err(|e| ExecutorError::Device { reason: format!("no memory for matrix products: {e:?}") })?;
        let handle = result::create_handle().map_err(failed)?;
        Ok(Self { handle, workspace, workspace_bytes, described: Mutex::default() })
    }

    /// Starts a product on a stream.
    ///
    /// # Errors
    /// [`ExecutorError::Device`] if cuBLASLt has no way to compute it.
    pub(super) fn multiply(
        &self,
        product: &Product,
        operands: Operands,
        stream: driver::sys::CUstream,
    ) -> Result<(), ExecutorError> {
        // Descriptions hold the address of the bias, so that one is used at a time.
        let mut described = self.described.lock().unwrap_or_else(PoisonError::into_inner);
        let Operands { a, b, d, bias, alpha, .. } = operands;
        let c = if product.adds { operands.c } else { d };
        let alignment = [a, b, c, d].map(|address| 1 << address.trailing_zeros().min(8));
        let of = match described.get(&(*product, alignment)) {
            Some(of) => *of,
            None => {
                let of = self.describe(product, alignment).map_err(|error| unable(product, error))?;
                described.insert((*product, alignment), of);
                of
            }
        };
        let beta = if product.adds { 1.0f32 } else { 0.0 };
        // SAFETY: the descriptions live as long as this. cuBLASLt is column-major: it sees every matrix transposed, so
        // that dᵀ = bᵀ · aᵀ is asked for. The caller keeps within memory that it has taken.
        unsafe {
            if product.bias {
                let attribute = cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
                set(of.operation, attribute, &bias).map_err(failed)?;
            }
            result::matmul(
                self.handle,
                of.operation,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                b as *const c_void,
                of.a,
                a as *const c_void,
                of.b,
                c as *const c_void,
                of.d,
                d as *mut c_void,
                of.d,
                &raw const of.algorithm,
                self.workspace as *mut c_void,
                self.workspace_bytes,
                stream.cast(),
            )
            .map_err(|error| unable(product, error))
        }
    }

    fn describe(&self, product: &Product, alignment: Alignment) -> Result<Described, CublasError> {
        let compute = if product.tf32 {
            cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
        } else {
            cublasComputeType_t::CUBLAS_COMPUTE_32F
        };
        let operation = result::create_matmul_desc(compute, cudaDataType_t::CUDA_R_32F)?;
        // SAFETY: every attribute is of the type that cuBLASLt's manual gives it.
        unsafe {
            set(operation, cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, &turned(product.b))?;
            set(operation, cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, &turned(product.a))?;
            if product.bias {
                let epilogue = cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
                set(operation, cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            }
        }
        let Product { m, n, k, batch, .. } = *product;
        let a = layout(product.b, (k, n), batch)?;
        let b = layout(product.a, (m, k), batch)?;
        let d = layout(product.d, (m, n), batch)?;
        let preference = result::create_matmul_pref()?;
        use cublasLtMatmulPreferenceAttributes_t as Preference;
        let [of_a, of_b, of_c, of_d] = alignment;
        // SAFETY: as above; the preference is destroyed below, and only there.
        unsafe {
            prefer(preference, Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &self.workspace_bytes)?;
            prefer(preference, Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &of_b)?;
            prefer(preference, Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &of_a)?;
            prefer(preference, Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &of_c)?;
            prefer(preference, Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &of_d)?;
            let found = result::get_matmul_algo_heuristic(self.handle, operation, a, b, d, d, preference);
            result::destroy_matmul_pref(preference)?;
            Ok(Described { operation, a, b, d, algorithm: found?.algo })
        }
    }
}

// SAFETY: cuBLASLt may be used from any thread; descriptions are behind a lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Drop for Blas {
    fn drop(&mut self) {
        let described = self.described.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nothing uses any of it after this.
        unsafe {
            for (_, of) in described.drain() {
                let layouts = [of.a, of.b, of.d].map(|layout| result::destroy_matrix_layout(layout).is_ok());
                if !layouts.iter().all(|&ok| ok) || result::destroy_matmul_desc(of.operation).is_err() {
                    tracing::debug!("a description of a matrix product was not freed");
                }
            }
            if result::destroy_handle(self.handle).is_err() || driver::result::free_sync(self.workspace).is_err() {
                tracing::debug!("cuBLASLt was not closed");
            }
        }
    }
}

/// cuBLASLt's number for a matrix that the product takes as it lies, 0, or transposed, 1: the same in its world.
fn turned(matrix: Matrix) -> i32 {
    i32::from(matrix.transposed)
}

/// A matrix that the product sees as [rows, columns].
fn layout(
    matrix: Matrix,
    (rows, columns): (usize, usize),
    batch: usize,
) -> Result<sys::cublasLtMatrixLayout_t, CublasError> {
    let kind = match matrix.element {
        Element::F32 => cudaDataType_t::CUDA_R_32F,
        Element::Bf16 => cudaDataType_t::CUDA_R_16BF,
    };
    let (rows, columns) = if matrix.transposed { (columns, rows) } else { (rows, columns) };
    let layout = result::create_matrix_layout(kind, columns as u64, rows as u64, matrix.leading as i64)?;
    if batch > 1 {
        let (count, stride) = (batch as i32, matrix.stride as i64);
        use cublasLtMatrixLayoutAttribute_t as Attribute;
        // SAFETY: the two attributes are of these types.
        unsafe {
            let (count, stride) = ((&raw const count).cast(), (&raw const stride).cast());
            let (of_count, of_stride) =
                (Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET);
            result::set_matrix_layout_attribute(layout, of_count, count, size_of::<i32>())?;
            result::set_matrix_layout_attribute(layout, of_stride, stride, size_of::<i64>())?;
        }
    }
    Ok(layout)
}

/// # Safety
/// The attribute must be of type `T`.
unsafe fn set<T>(
    operation: sys::cublasLtMatmulDesc_t,
    attribute: cublasLtMatmulDescAttributes_t,
    value: &T,
) -> Result<(), CublasError> {
    // SAFETY: as the caller says.
    unsafe { result::set_matmul_desc_attribute(operation, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// # Safety
/// The attribute must be of type `T`.
unsafe fn prefer<T>(
    preference: sys::cublasLtMatmulPreference_t,
    attribute: cublasLtMatmulPreferenceAttributes_t,
    value: &T,
) -> Result<(), CublasError> {
    // SAFETY: as the caller says.
    unsafe {
        result::set_matmul_pref_attribute(preference, attribute, std::ptr::from_ref(value).cast(), size_of::<T>())
    }
}

fn failed(error: CublasError) -> ExecutorError {
    ExecutorError::Device { reason: format!("cuBLASLt: {error}") }
}

fn unable(product: &Product, error: CublasError) -> ExecutorError {
    ExecutorError::Device { reason: format!("cuBLASLt cannot multiply {product:?}: {error}") }
}
