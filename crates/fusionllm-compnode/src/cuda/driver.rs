//! A real NVIDIA device, by the driver's interface.
#![expect(unsafe_code, reason = "the driver's interface")]

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_int};
use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use cudarc::driver::sys::{self, CUdevice_attribute};
use cudarc::driver::{DriverError, result};

use super::blas::Blas;
use super::gpu::{Gpu, Kernel, Operands, Product};
use super::libraries;
use super::modules::Compiler;
use crate::ExecutorError;

/// The oldest compute capability that the kernels are written for: Turing.
const OLDEST: (i32, i32) = (7, 5);
/// The oldest that computes in bf16: Ampere.
const OLDEST_BF16: (i32, i32) = (8, 0);

/// The least bytes that are taken.
const GRAIN: usize = 512;

/// Bytes that are taken for so many: there are eight sizes between a power of two and the next, so that what one leaves
/// fits the next.
fn rounded(bytes: usize) -> usize {
    let step = (1usize << bytes.max(1).ilog2()) / 8;
    bytes.next_multiple_of(step.max(GRAIN))
}

/// An open device with one stream.
pub(super) struct Driver {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    name: String,
    capability: (i32, i32),
    compiler: Compiler,
    functions: Mutex<HashMap<Kernel, Function>>,
    /// Memory that was given back, by bytes: taking memory from the driver and giving it back makes the device wait.
    free: Mutex<BTreeMap<usize, Vec<u64>>>,
    /// Closed before the context is.
    blas: ManuallyDrop<Blas>,
}

/// A kernel's handle, valid as long as the context is.
#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: the driver's handles may be used from any thread that has made the context current, as every method does;
// calls that are not safe at the same time are behind locks.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}
// SAFETY: as above.
unsafe impl Send for Function {}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("name", &self.name).field("capability", &self.capability).finish_non_exhaustive()
    }
}

/// How many devices the driver has, which asks for nothing else. There may be no driver, or one that does not start.
pub(super) fn devices() -> usize {
    if !libraries::has_driver() {
        return 0;
    }
    match result::init().and_then(|()| result::device::get_count()) {
        Ok(count) => usize::try_from(count).unwrap_or(0),
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => 0,
        Err(error) => {
            tracing::warn!(error = words(error), "the NVIDIA driver does not start, its GPUs are not used");
            0
        }
    }
}

impl Driver {
    /// Opens the device of this number.
    ///
    /// # Errors
    /// [`ExecutorError::Device`] says what is missing.
    pub(super) fn open(index: usize) -> Result<Self, ExecutorError> {
        let fail = |reason: String| ExecutorError::Device { reason };
        libraries::open_all().map_err(|missing| fail(missing.to_string()))?;
        result::init().map_err(|e| fail(format!("the NVIDIA driver does not start: {}", words(e))))?;
        let count = result::device::get_count().map_err(failed)?;
        let ordinal = c_int::try_from(index).ok().filter(|&i| i < count);
        let ordinal =
            ordinal.ok_or_else(|| fail(format!("there is no cuda:{index}, the driver has {count} devices")))?;
        let device = result::device::get(ordinal).map_err(failed)?;
        // The number of a device depends on what the process may see; its own id does not.
        let id = result::device::get_uuid(device).map_err(failed)?.bytes;
        let id: String = id.iter().take(4).map(|byte| format!("{:02x}", byte.to_ne_bytes()[0])).collect();
        let name = format!("{}, GPU-{id}", result::device::get_name(device).map_err(failed)?);
        let attribute = |attribute| {
            // SAFETY: the device was just given by the driver.
            unsafe { result::device::get_attribute(device, attribute) }.map_err(failed)
        };
        let capability = (
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < OLDEST {
            let (major, minor) = capability;
            return Err(fail(format!("{name} has compute capability {major}.{minor}, 7.5 (Turing) is the oldest")));
        }
        // SAFETY: the device exists; the context is kept until the program ends.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed)?;
        // SAFETY: the context was just given by the driver.
        unsafe { result::ctx::set_current(context) }.map_err(failed)?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed)?;
        let (compiler, blas) = (Compiler::new(capability)?, ManuallyDrop::new(Blas::new(capability)?));
        Ok(Self {
            device,
            context,
            stream,
            name,
            capability,
            compiler,
            functions: Mutex::default(),
            free: Mutex::default(),
            blas,
        })
    }

    /// The device for people.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether it computes in bf16.
    pub(super) fn has_bf16(&self) -> bool {
        self.capability >= OLDEST_BF16
    }

    /// Bytes of its memory that are free: with the driver, or here for who takes memory next.
    pub(super) fn free_bytes(&self) -> Option<u64> {
        self.enter().ok()?;
        let (free, _) = result::mem_get_info().ok()?;
        let here: usize = self.free().iter().map(|(bytes, addresses)| bytes * addresses.len()).sum();
        Some((free + here) as u64)
    }

    /// Makes the context that of this thread.
    fn enter(&self) -> Result<(), ExecutorError> {
        // SAFETY: the context lives as long as the program.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed)
    }

    fn functions(&self) -> MutexGuard<'_, HashMap<Kernel, Function>> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free(&self) -> MutexGuard<'_, BTreeMap<usize, Vec<u64>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the driver all memory that nobody has.
    fn release(&self) {
        for address in std::mem::take(&mut *self.free()).into_values().flatten() {
            // SAFETY: `take` took it from the driver, and nobody has it. The driver waits for what still uses it.
            if unsafe { result::free_sync(address) }.is_err() {
                tracing::debug!(address, "memory was not given back");
            }
        }
    }

    fn function(&self, kernel: Kernel) -> Result<Function, ExecutorError> {
        if let Some(&function) = self.functions().get(&kernel) {
            return Ok(function);
        }
        self.prepare(&[kernel])?;
        self.functions()
            .get(&kernel)
            .copied()
            .ok_or_else(|| ExecutorError::Internal { what: format!("kernel `{}` was not made ready", kernel.name) })
    }

    fn load(&self, code: &[u8], kernels: &[Kernel]) -> Result<(), ExecutorError> {
        // SAFETY: the code is machine code that NVRTC made for this device.
        let module = unsafe { result::module::load_data(code.as_ptr().cast()) }.map_err(failed)?;
        for &kernel in kernels {
            let name = CString::new(kernel.name).map_err(|e| ExecutorError::Internal { what: e.to_string() })?;
            // SAFETY: the module is never unloaded.
            let function = unsafe { result::module::get_function(module, name) }
                .map_err(|e| ExecutorError::Internal { what: format!("kernel `{}`: {}", kernel.name, words(e)) })?;
            self.functions().insert(kernel, Function(function));
        }
        Ok(())
    }
}

impl Gpu for Driver {
    fn take(&self, bytes: usize) -> Result<u64, ExecutorError> {
        self.enter()?;
        let bytes = rounded(bytes);
        if let Some(address) = self.free().get_mut(&bytes).and_then(Vec::pop) {
            return Ok(address);
        }
        // SAFETY: the memory is given back by `release` alone.
        let take = || unsafe { result::malloc_sync(bytes) };
        let taken = take().or_else(|_| {
            self.release();
            take()
        });
        taken.map_err(|error| {
            let free = self.free_bytes().map_or(String::new(), |free| format!(", {free} are free"));
            ExecutorError::Device { reason: format!("{} has no {bytes} bytes left{free}: {}", self.name, words(error)) }
        })
    }

    fn give_back(&self, address: u64, bytes: usize) {
        // What is still to be done with it comes before what its next owner does, on the one stream.
        self.free().entry(rounded(bytes)).or_default().push(address);
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), ExecutorError> {
        self.enter()?;
        // SAFETY: the caller keeps within memory that it has taken. From memory that is not pinned, the driver has
        // copied all bytes before it returns.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream) }.map_err(failed)
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), ExecutorError> {
        self.enter()?;
        // SAFETY: the caller keeps within memory that it has taken; the bytes are waited for below.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.stream) }.map_err(failed)?;
        self.sync()
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), ExecutorError> {
        self.enter()?;
        // SAFETY: the caller keeps within memory that it has taken.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }.map_err(failed)
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<(), ExecutorError> {
        self.enter()?;
        // SAFETY: the caller keeps within memory that it has taken.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream) }.map_err(failed)
    }

    fn launch(&self, kernel: Kernel, grid: [u32; 2], arguments: &[u8]) -> Result<(), ExecutorError> {
        if grid.contains(&0) {
            return Ok(());
        }
        self.enter()?;
        let Function(function) = self.function(kernel)?;
        let mut arguments = arguments.to_vec();
        let mut parameters = [arguments.as_mut_ptr().cast()];
        let (grid, block) = ((grid[0], grid[1], 1), (kernel.threads, 1, 1));
        // SAFETY: the kernel takes one struct, of which these are the bytes; the driver copies them before it returns.
        // That its addresses are those of tensors of the right size is what the plan is made for.
        unsafe { result::launch_kernel(function, grid, block, 0, self.stream, &mut parameters) }
            .map_err(|e| ExecutorError::Device { reason: format!("kernel `{}`: {}", kernel.name, words(e)) })
    }

    fn multiply(&self, product: &Product, operands: Operands) -> Result<(), ExecutorError> {
        self.enter()?;
        self.blas.multiply(product, operands, self.stream)
    }

    fn trim(&self) {
        if self.enter().is_ok() {
            self.release();
        }
    }

    fn sync(&self) -> Result<(), ExecutorError> {
        self.enter()?;
        // SAFETY: the stream lives as long as this.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed)
    }

    fn prepare(&self, kernels: &[Kernel]) -> Result<(), ExecutorError> {
        let mut missing: Vec<Kernel> = kernels.iter().copied().filter(|k| !self.functions().contains_key(k)).collect();
        missing.sort_by_key(|kernel| kernel.file);
        missing.dedup();
        // Compiling takes up to seconds a file, and files know nothing of one another.
        thread::scope(|scope| {
            let files: Vec<_> = missing
                .chunk_by(|a, b| a.file == b.file)
                .map(|kernels| (kernels, scope.spawn(|| self.compiler.machine_code(kernels[0].file))))
                .collect();
            self.enter()?;
            for (kernels, code) in files {
                let code = code
                    .join()
                    .map_err(|panic| ExecutorError::Internal { what: crate::panic_message(panic.as_ref()) })?;
                self.load(&code?, kernels)?;
            }
            Ok(())
        })
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.enter().is_ok() {
            self.release();
        }
        // SAFETY: nothing uses it after this.
        unsafe { ManuallyDrop::drop(&mut self.blas) };
        // SAFETY: nothing uses stream and context after this.
        let freed = self.enter().is_ok() && unsafe { result::stream::destroy(self.stream) }.is_ok();
        // SAFETY: as above.
        if !freed || unsafe { result::primary_ctx::release(self.device) }.is_err() {
            tracing::debug!(name = self.name, "the device was not closed");
        }
    }
}

fn failed(error: DriverError) -> ExecutorError {
    ExecutorError::Device { reason: format!("NVIDIA driver: {}", words(error)) }
}

/// What the driver says of an error: its own text where it has one.
fn words(error: DriverError) -> String {
    match (error.error_name(), error.error_string()) {
        (Ok(name), Ok(text)) => format!("{} ({})", text.to_string_lossy(), name.to_string_lossy()),
        _ => format!("{error:?}"),
    }
}
