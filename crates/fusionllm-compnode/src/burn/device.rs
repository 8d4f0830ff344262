//! Devices that Burn computes on.

use burn_tensor::{Device, Tensor};

use crate::{CompNodeError, DeviceChoice};

/// The thread that tries a device; its panics are answers.
pub const PROBE_THREAD: &str = "device-probe";

/// Opens the device, has it compute something, and describes it for people.
///
/// # Errors
/// [`CompNodeError::DeviceChoice`] if this build has no such kind, or this machine no such device.
pub(super) fn open(choice: DeviceChoice) -> Result<(Device, String), CompNodeError> {
    let (device, name) = select(choice)?;
    if choice != DeviceChoice::Cpu {
        probe(device.clone(), &name)?;
    }
    Ok((device, name))
}

/// Backends answer a device that is not there with a panic, so a thread of its own tries.
fn probe(device: Device, name: &str) -> Result<(), CompNodeError> {
    let fail =
        |reason: String| CompNodeError::DeviceChoice { reason: format!("device {name} does not work: {reason}") };
    let compute = move || {
        let two = Tensor::<1>::from_floats([1.0], &device) + 1.0;
        two.try_into_data().map(drop).map_err(|e| format!("{e:?}"))
    };
    let thread = std::thread::Builder::new().name(PROBE_THREAD.to_owned()).spawn(compute);
    match thread.map_err(|e| fail(e.to_string()))?.join() {
        Ok(computed) => computed.map_err(fail),
        Err(panic) => Err(fail(crate::panic_message(panic.as_ref()))),
    }
}

fn select(choice: DeviceChoice) -> Result<(Device, String), CompNodeError> {
    #[cfg_attr(
        all(feature = "vulkan", feature = "metal", feature = "rocm"),
        expect(unused_variables, reason = "only builds that lack a kind say so")
    )]
    let lacking = |feature: &str| CompNodeError::DeviceChoice {
        reason: format!("this build has no {feature} support, build it with `--features {feature}`"),
    };
    match choice {
        DeviceChoice::Auto => auto_device(),
        DeviceChoice::Cpu => Ok(cpu_device()),
        DeviceChoice::Cuda(_) => {
            Err(CompNodeError::DeviceChoice { reason: "NVIDIA's devices are opened without Burn".to_owned() })
        }
        #[cfg(feature = "vulkan")]
        DeviceChoice::Vulkan(Some(index)) => {
            Ok((Device::wgpu(burn_tensor::DeviceKind::DiscreteGpu(index)), format!("vulkan:{index}")))
        }
        #[cfg(feature = "vulkan")]
        DeviceChoice::Vulkan(None) => Ok((Device::wgpu(burn_tensor::DeviceKind::DefaultDevice), "vulkan".to_owned())),
        #[cfg(not(feature = "vulkan"))]
        DeviceChoice::Vulkan(_) => Err(lacking("vulkan")),
        #[cfg(feature = "metal")]
        DeviceChoice::Metal => Ok((Device::metal(burn_tensor::DeviceKind::DefaultDevice), "metal".to_owned())),
        #[cfg(not(feature = "metal"))]
        DeviceChoice::Metal => Err(lacking("metal")),
        #[cfg(feature = "rocm")]
        DeviceChoice::Rocm(index) => Ok((Device::rocm(index), format!("rocm:{index}"))),
        #[cfg(not(feature = "rocm"))]
        DeviceChoice::Rocm(_) => Err(lacking("rocm")),
    }
}

fn cpu_device() -> (Device, String) {
    let threads = rayon::current_num_threads();
    let plural = if threads == 1 { "" } else { "s" };
    (Device::flex(), format!("cpu ({threads} thread{plural})"))
}

#[cfg(feature = "metal")]
fn auto_device() -> Result<(Device, String), CompNodeError> {
    select(DeviceChoice::Metal)
}

#[cfg(all(feature = "rocm", not(feature = "metal")))]
fn auto_device() -> Result<(Device, String), CompNodeError> {
    select(DeviceChoice::Rocm(0))
}

#[cfg(all(feature = "vulkan", not(any(feature = "metal", feature = "rocm"))))]
fn auto_device() -> Result<(Device, String), CompNodeError> {
    select(DeviceChoice::Vulkan(None))
}

#[cfg(not(any(feature = "vulkan", feature = "metal", feature = "rocm")))]
fn auto_device() -> Result<(Device, String), CompNodeError> {
    Ok(cpu_device())
}
