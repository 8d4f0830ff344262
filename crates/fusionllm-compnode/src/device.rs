//! Which device Burn computes on.

use std::str::FromStr;

use burn_tensor::{Device, Tensor};

use crate::CompNodeError;

/// The thread that tries a device; its panics are answers.
pub const PROBE_THREAD: &str = "device-probe";

/// A device by kind; the GPU kinds exist in builds with their feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first GPU kind of this build, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// NVIDIA, by CUDA.
    Cuda(usize),
    /// A GPU by Vulkan: the discrete one of this number, or the best there is.
    Vulkan(Option<usize>),
    /// Apple.
    Metal,
    /// AMD, by ROCm.
    Rocm(usize),
}

impl DeviceChoice {
    /// Whether this is, in this build, the CPU.
    pub fn is_cpu(self) -> bool {
        let has_gpu = cfg!(any(feature = "cuda", feature = "vulkan", feature = "metal", feature = "rocm"));
        match self {
            Self::Cpu => true,
            Self::Auto => !has_gpu,
            Self::Cuda(_) | Self::Vulkan(_) | Self::Metal | Self::Rocm(_) => false,
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = CompNodeError;

    /// Reads `auto`, `cpu`, `cuda`, `cuda:1`, `vulkan:0`, `metal`, `rocm:0`.
    fn from_str(text: &str) -> Result<Self, CompNodeError> {
        let fail = || CompNodeError::DeviceChoice {
            reason: format!("unknown device `{text}`, expected auto, cpu, cuda[:N], vulkan[:N], metal or rocm[:N]"),
        };
        let (kind, index) = match text.split_once(':') {
            Some((kind, index)) => (kind, Some(index.parse().map_err(|_| fail())?)),
            None => (text, None),
        };
        match (kind, index) {
            ("auto", None) => Ok(Self::Auto),
            ("cpu", None) => Ok(Self::Cpu),
            ("cuda", index) => Ok(Self::Cuda(index.unwrap_or(0))),
            ("vulkan", index) => Ok(Self::Vulkan(index)),
            ("metal", None) => Ok(Self::Metal),
            ("rocm", index) => Ok(Self::Rocm(index.unwrap_or(0))),
            _ => Err(fail()),
        }
    }
}

/// Opens the device, has it compute something, and describes it for people.
///
/// # Errors
/// [`CompNodeError::DeviceChoice`] if this build has no such kind, or this machine no such device.
pub fn open_device(choice: DeviceChoice) -> Result<(Device, String), CompNodeError> {
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
        all(feature = "cuda", feature = "vulkan", feature = "metal", feature = "rocm"),
        expect(unused_variables, reason = "only builds that lack a kind say so")
    )]
    let lacking = |feature: &str| CompNodeError::DeviceChoice {
        reason: format!("this build has no {feature} support, build it with `--features {feature}`"),
    };
    match choice {
        DeviceChoice::Auto => auto_device(),
        DeviceChoice::Cpu => Ok(cpu_device()),
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(index) => Ok((Device::cuda(index), format!("cuda:{index}"))),
        #[cfg(not(feature = "cuda"))]
        DeviceChoice::Cuda(_) => Err(lacking("cuda")),
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

#[cfg(feature = "cuda")]
fn auto_device() -> Result<(Device, String), CompNodeError> {
    select(DeviceChoice::Cuda(0))
}

#[cfg(all(feature = "metal", not(feature = "cuda")))]
fn auto_device() -> Result<(Device, String), CompNodeError> {
    select(DeviceChoice::Metal)
}

#[cfg(all(feature = "rocm", not(any(feature = "cuda", feature = "metal"))))]
fn auto_device() -> Result<(Device, String), CompNodeError> {
    select(DeviceChoice::Rocm(0))
}

#[cfg(all(feature = "vulkan", not(any(feature = "cuda", feature = "metal", feature = "rocm"))))]
fn auto_device() -> Result<(Device, String), CompNodeError> {
    select(DeviceChoice::Vulkan(None))
}

#[cfg(not(any(feature = "cuda", feature = "vulkan", feature = "metal", feature = "rocm")))]
fn auto_device() -> Result<(Device, String), CompNodeError> {
    Ok(cpu_device())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_are_read() {
        assert_eq!("cuda:1".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cuda(1));
        assert_eq!("vulkan".parse::<DeviceChoice>().unwrap(), DeviceChoice::Vulkan(None));
        assert!("cpu:1".parse::<DeviceChoice>().is_err());
        assert_eq!("cpu".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cpu);
        let error = "gpu".parse::<DeviceChoice>().unwrap_err().to_string();
        assert!(error.contains("unknown device `gpu`"), "{error}");
    }
}
