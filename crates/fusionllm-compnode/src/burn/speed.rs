//! Speed of a device without a job.

use burn_tensor::{Device, Tensor, TensorData};

use super::timed;
use crate::profile::{median_of_runs, pattern};
use crate::{DeviceSpeed, ExecutorError};

/// Side of the square matrices: 2 GFLOP a product.
const SIDE: usize = 1024;
/// Elements of the tensors that are added: 32 MiB each, more than caches hold.
const ELEMENTS: usize = 8 << 20;

/// Measures the device; takes a second at the most on a CPU.
pub(super) fn measure_speed(device: &Device) -> Result<DeviceSpeed, ExecutorError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_a_speed() {
        let speed = measure_speed(&Device::flex()).unwrap();
        assert!(speed.flop_per_s > 1e8 && speed.flop_per_s < 1e16, "{speed:?}");
        assert!(speed.memory_bytes_per_s > 1e7 && speed.memory_bytes_per_s < 1e14, "{speed:?}");
    }
}
