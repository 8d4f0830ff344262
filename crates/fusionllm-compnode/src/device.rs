//! Which device Burn computes on.

use std::str::FromStr;

use burn_tensor::Device;

use crate::CompNodeError;

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
    /// Any GPU, by Vulkan.
    Vulkan(usize),
    /// Apple.
    Metal,
    /// AMD, by ROCm.
    Rocm(usize),
}

impl FromStr for DeviceChoice {
    type Err = CompNodeError;

    /// Reads `auto`, `cpu`, `cuda`, `cuda:1`, `vulkan:0`, `metal`, `rocm:0`.
    fn from_str(text: &str) -> Result<Self, CompNodeError> {
        let fail = || CompNodeError::DeviceChoice {
            reason: format!("unknown device `{text}`, expected auto, cpu, cuda[:N], vulkan[:N], metal or rocm[:N]"),
        };
        let (kind, index) = match text.split_once(':') {
            Some((kind, index)) => (kind, index.parse().map_err(|_| fail())?),
            None => (text, 0),
        };
        match kind {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(index)),
            "vulkan" => Ok(Self::Vulkan(index)),
            "metal" => Ok(Self::Metal),
            "rocm" => Ok(Self::Rocm(index)),
            _ => Err(fail()),
        }
    }
}

/// Opens the device and describes it for people.
///
/// # Errors
/// [`CompNodeError::DeviceChoice`] if this build has no such kind.
pub fn open_device(choice: DeviceChoice) -> Result<(Device, String), CompNodeError> {
    #[cfg_attr(
        any(feature = "cuda", feature = "vulkan", feature = "metal", feature = "rocm"),
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
        DeviceChoice::Vulkan(index) => {
            Ok((Device::vulkan(burn_tensor::DeviceKind::DiscreteGpu(index)), format!("vulkan:{index}")))
        }
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
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    (Device::flex(), format!("cpu ({threads} threads)"))
}

#[cfg(feature = "cuda")]
fn auto_device() -> Result<(Device, String), CompNodeError> {
    open_device(DeviceChoice::Cuda(0))
}

#[cfg(all(feature = "metal", not(feature = "cuda")))]
fn auto_device() -> Result<(Device, String), CompNodeError> {
    open_device(DeviceChoice::Metal)
}

#[cfg(all(feature = "rocm", not(any(feature = "cuda", feature = "metal"))))]
fn auto_device() -> Result<(Device, String), CompNodeError> {
    open_device(DeviceChoice::Rocm(0))
}

#[cfg(all(feature = "vulkan", not(any(feature = "cuda", feature = "metal", feature = "rocm"))))]
fn auto_device() -> Result<(Device, String), CompNodeError> {
    Ok((Device::vulkan(burn_tensor::DeviceKind::DefaultDevice), "vulkan".to_owned()))
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
        assert_eq!("cpu".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cpu);
        let error = "gpu".parse::<DeviceChoice>().unwrap_err().to_string();
        assert!(error.contains("unknown device `gpu`"), "{error}");
    }
}
