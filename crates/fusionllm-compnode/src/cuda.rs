//! The backend on NVIDIA's GPUs: kernels of our own, compiled for the device at hand when it is first used, and matrix
//! products by cuBLASLt.
//!
//! Nothing of CUDA is needed to build this: the driver and two libraries are opened at run time ([`libraries`]). What a
//! stage does is planned as data ([`plan`]), so that all but the driver's own calls runs in tests without a GPU: there
//! the same kernels are compiled for the CPU.

mod angles;
mod blas;
mod driver;
#[cfg(test)]
mod emulated;
mod executor;
mod gpu;
mod kernel;
mod layout;
mod libraries;
mod measure;
mod modules;
mod needs;
mod plan;
mod store;
mod sum;
mod tensor;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use fusionllm_graph::{Kernels, OpDag, OpId};
use fusionllm_planner::Measured;
use fusionllm_protocol::Precision;

use crate::backend::{Backend, DeviceSpeed, ExecutorSpec, Load, MeasureSpec};
use crate::executor::Executor;
use crate::stop::StopFlag;
use crate::{CompNodeError, ExecutorError};
use driver::Driver;
use executor::CudaExecutor;
use gpu::Gpu;

/// An NVIDIA device.
#[derive(Debug)]
pub(crate) struct CudaBackend {
    driver: Arc<Driver>,
    gpu: Arc<dyn Gpu>,
    name: String,
}

impl CudaBackend {
    /// Opens the device of this number.
    ///
    /// # Errors
    /// [`CompNodeError::DeviceChoice`] says what is missing and how to get it.
    pub(crate) fn open(index: usize) -> Result<Self, CompNodeError> {
        let fail = |error: ExecutorError| {
            let reason = match error {
                ExecutorError::Device { reason } => reason,
                other => other.to_string(),
            };
            CompNodeError::DeviceChoice { reason: format!("device cuda:{index} does not work: {reason}") }
        };
        let driver = Arc::new(Driver::open(index).map_err(fail)?);
        measure::try_out(&(Arc::clone(&driver) as Arc<dyn Gpu>)).map_err(fail)?;
        let name = format!("cuda:{index} ({})", driver.name());
        let gpu = Arc::clone(&driver) as Arc<dyn Gpu>;
        Ok(Self { driver, gpu, name })
    }

    /// The first device that works, where there is one. Those that lack something are passed over with a warning.
    pub(crate) fn open_if_any() -> Option<Self> {
        (0..driver::devices()).find_map(|index| match Self::open(index) {
            Ok(backend) => Some(backend),
            Err(error) => {
                tracing::warn!(%error, "an NVIDIA GPU is not used");
                None
            }
        })
    }

    /// What it computes in where this is asked for.
    fn precision(&self, asked: Precision) -> Precision {
        if self.has(asked) { asked } else { Precision::F32 }
    }
}

impl Backend for CudaBackend {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_cpu(&self) -> bool {
        false
    }

    fn kernels(&self) -> Kernels {
        Kernels::Fused
    }

    fn has(&self, precision: Precision) -> bool {
        precision != Precision::Bf16 || self.driver.has_bf16()
    }

    fn lacks(&self, dag: &OpDag) -> Option<OpId> {
        plan::lacks(dag)
    }

    fn free_bytes(&self) -> Option<u64> {
        self.driver.free_bytes()
    }

    fn measure_speed(&self) -> Result<DeviceSpeed, ExecutorError> {
        let speed = measure::measure_speed(&self.gpu);
        self.gpu.trim();
        speed
    }

    fn measure_ops(&self, dag: &Arc<OpDag>, spec: &MeasureSpec, stop: &StopFlag) -> Result<Measured, ExecutorError> {
        let spec = MeasureSpec { precision: self.precision(spec.precision), ..*spec };
        let measured = measure::measure_ops(dag, &spec, &self.gpu, stop);
        self.gpu.trim();
        measured
    }

    fn needs(&self, spec: &ExecutorSpec, load: &Load) -> Result<Option<u64>, ExecutorError> {
        needs::bytes(spec, self.precision(spec.precision), load).map(Some)
    }

    fn build(&self, spec: ExecutorSpec, stop: StopFlag) -> Result<Box<dyn Executor>, ExecutorError> {
        let precision = self.precision(spec.precision);
        // What an earlier job has left has other sizes.
        self.gpu.trim();
        Ok(Box::new(CudaExecutor::new(spec.computing_in(precision), &self.gpu, stop)?))
    }
}
