//! The backend on Burn, and all that knows Burn: kernels, tapes, gradients, the optimizer, and what measures them.

mod device;
mod executor;
mod gradients;
mod host;
mod kernels;
mod measure;
mod memory;
mod optimizer;
mod owed;
mod running;
mod speed;
mod stage;

use std::sync::Arc;
use std::time::Instant;

use burn_tensor::Device;
use fusionllm_graph::{Kernels, OpDag};
use fusionllm_planner::Measured;
use fusionllm_protocol::Precision;

use crate::backend::{Backend, DeviceSpeed, ExecutorSpec, MeasureSpec};
use crate::executor::Executor;
use crate::stop::StopFlag;
use crate::{CompNodeError, ExecutorError};
pub(crate) use device::BurnDevice;
pub use device::PROBE_THREAD;
use executor::BurnExecutor;
use kernels::fused;

/// A device of Burn's.
#[derive(Debug)]
pub(crate) struct BurnBackend {
    device: Device,
    name: String,
    kind: BurnDevice,
}

impl BurnBackend {
    /// Opens a device and has it compute something.
    ///
    /// # Errors
    /// [`CompNodeError::DeviceChoice`] if this build has no such kind, or this machine no such device.
    pub(crate) fn open(kind: BurnDevice) -> Result<Self, CompNodeError> {
        let (device, name) = device::open(kind)?;
        Ok(Self { device, name, kind })
    }
}

impl Backend for BurnBackend {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_cpu(&self) -> bool {
        self.kind == BurnDevice::Cpu
    }

    fn kernels(&self) -> Kernels {
        kernels_of(&self.device)
    }

    fn has(&self, precision: Precision) -> bool {
        precision == Precision::F32
    }

    fn free_bytes(&self) -> Option<u64> {
        memory::free_bytes(self.kind)
    }

    fn measure_speed(&self) -> Result<DeviceSpeed, ExecutorError> {
        speed::measure_speed(&self.device)
    }

    fn measure_ops(&self, dag: &Arc<OpDag>, spec: &MeasureSpec, stop: &StopFlag) -> Result<Measured, ExecutorError> {
        measure::measure_ops(dag, spec, &self.device, stop)
    }

    fn build(&self, spec: ExecutorSpec, stop: StopFlag) -> Result<Box<dyn Executor>, ExecutorError> {
        Ok(Box::new(BurnExecutor::new(spec, self.device.clone(), stop)?))
    }
}

/// How a device computes ops of several steps.
fn kernels_of(device: &Device) -> Kernels {
    if fused::is_cpu(device) { Kernels::Fused } else { Kernels::Plain }
}

/// Seconds until all that `work` put on the device is done.
fn timed<T>(device: &Device, work: impl FnOnce() -> Result<T, ExecutorError>) -> Result<(f64, T), ExecutorError> {
    let began = Instant::now();
    let result = work()?;
    device.sync().map_err(|e| ExecutorError::Device { reason: format!("{e:?}") })?;
    Ok((began.elapsed().as_secs_f64(), result))
}
