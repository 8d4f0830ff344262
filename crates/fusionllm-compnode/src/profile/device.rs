//! Speed of a device without a job, and which machine it belongs to.

use burn_tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::{median_of_runs, pattern, timed};
use crate::ExecutorError;

/// Side of the square matrices: 2 GFLOP a product.
const SIDE: usize = 1024;
/// Elements of the tensors that are added: 32 MiB each, more than caches hold.
const ELEMENTS: usize = 8 << 20;

/// What does not change while device, machine and program stay the same.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct DeviceSpeed {
    /// S: FLOP/s of a square matrix product.
    pub(crate) flop_per_s: f64,
    /// Bytes per second that an addition reads and writes.
    pub(crate) memory_bytes_per_s: f64,
}

/// Measures the device; takes a second at the most on a CPU.
pub(crate) fn measure_device(device: &Device) -> Result<DeviceSpeed, ExecutorError> {
    let matrix = Tensor::<2>::from_data(TensorData::new(pattern(SIDE * SIDE), [SIDE, SIDE]), device);
    let [product_s] = median_of_runs(|| Ok([timed(device, || Ok(matrix.clone().matmul(matrix.clone())))?.0]))?;
    let long = Tensor::<1>::from_data(TensorData::new(pattern(ELEMENTS), [ELEMENTS]), device);
    // Two owners, so that neither is written over.
    let other = long.clone();
    let [add_s] = median_of_runs(|| Ok([timed(device, || Ok(long.clone() + other.clone()))?.0]))?;
    Ok(DeviceSpeed {
        flop_per_s: 2.0 * (SIDE as f64).powi(3) / product_s.max(1e-9),
        memory_bytes_per_s: 12.0 * ELEMENTS as f64 / add_s.max(1e-9),
    })
}

/// Name of this machine, the same for all its processes and for no other machine.
pub(crate) fn host_name() -> String {
    let name = sysinfo::System::host_name().unwrap_or_else(|| "host".to_owned());
    // Machines cloned from one image share name and machine id, but not the id of their last start.
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let boot: String = boot.chars().take(8).collect();
    if boot.is_empty() { name } else { format!("{name}-{boot}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_a_speed_and_a_machine() {
        let speed = measure_device(&Device::flex()).unwrap();
        assert!(speed.flop_per_s > 1e8 && speed.flop_per_s < 1e16, "{speed:?}");
        assert!(speed.memory_bytes_per_s > 1e7 && speed.memory_bytes_per_s < 1e14, "{speed:?}");
        assert_eq!(host_name(), host_name());
    }
}
