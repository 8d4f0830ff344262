//! Which device computes.

use std::str::FromStr;

use crate::CompNodeError;

/// A device by kind; GPU kinds other than NVIDIA's exist in builds with their feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// An NVIDIA device that works, else the first GPU kind of this build, else the CPU.
    #[default]
    Auto,
    /// The CPU, which every build has.
    Cpu,
    /// NVIDIA, by CUDA.
    Cuda(usize),
    /// A GPU by Vulkan: the discrete one of this number, or the best there is.
    Vulkan(Option<usize>),
    /// An Apple GPU.
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
