//! Devices that Burn computes on.

use burn_tensor::{Device, Tensor};

use crate::CompNodeError;

/// The thread that tries a device; its panics are answers.
pub const PROBE_THREAD: &str = "device-probe";

/// A device by kind; GPU kinds exist in builds with their feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BurnDevice {
    /// The CPU, which every build has.
    Cpu,
    /// A GPU by Vulkan: the discrete one of this number, or the best there is.
    Vulkan(Option<usize>),
    /// An Apple GPU.
    Metal,
    /// AMD, by ROCm.
    Rocm(usize),
}

impl BurnDevice {
    /// The first GPU kind of this build, else the CPU.
    pub(crate) fn best() -> Self {
        if cfg!(feature = "metal") {
            Self::Metal
        } else if cfg!(feature = "rocm") {
            Self::Rocm(0)
        } else if cfg!(feature = "vulkan") {
            Self::Vulkan(None)
        } else {
            Self::Cpu
        }
    }
}

/// Opens the device, has it compute something, and describes it for people.
///
/// # Errors
/// [`CompNodeError::DeviceChoice`] if this build has no such kind, or this machine no such device.
pub(super) fn open(kind: BurnDevice) -> Result<(Device, String), CompNodeError> {
    let (device, name) = select(kind)?;
    if kind != BurnDevice::Cpu {
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

fn select(kind: BurnDevice) -> Result<(Device, String), CompNodeError> {
    #[cfg_attr(
        all(feature = "vulkan", feature = "metal", feature = "rocm"),
        expect(unused_variables, reason = "only builds that lack a kind say so")
    )]
    let lacking = |feature: &str| CompNodeError::DeviceChoice {
        reason: format!("this build has no {feature} support, build it with `--features {feature}`"),
    };
    match kind {
        BurnDevice::Cpu => Ok(cpu_device()),
        #[cfg(feature = "vulkan")]
        BurnDevice::Vulkan(Some(index)) => {
            Ok((Device::wgpu(burn_tensor::DeviceKind::DiscreteGpu(index)), format!("vulkan:{index}")))
        }
        #[cfg(feature = "vulkan")]
        BurnDevice::Vulkan(None) => Ok((Device::wgpu(burn_tensor::DeviceKind::DefaultDevice), "vulkan".to_owned())),
        #[cfg(not(feature = "vulkan"))]
        BurnDevice::Vulkan(_) => Err(lacking("vulkan")),
        #[cfg(feature = "metal")]
        BurnDevice::Metal => Ok((Device::metal(burn_tensor::DeviceKind::DefaultDevice), "metal".to_owned())),
        #[cfg(not(feature = "metal"))]
        BurnDevice::Metal => Err(lacking("metal")),
        #[cfg(feature = "rocm")]
        BurnDevice::Rocm(index) => Ok((Device::rocm(index), format!("rocm:{index}"))),
        #[cfg(not(feature = "rocm"))]
        BurnDevice::Rocm(_) => Err(lacking("rocm")),
    }
}

fn cpu_device() -> (Device, String) {
    let threads = rayon::current_num_threads();
    let plural = if threads == 1 { "" } else { "s" };
    (Device::flex(), format!("cpu ({threads} thread{plural})"))
}
