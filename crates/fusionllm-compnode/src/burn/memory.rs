//! Free memory of the devices that Burn computes on.

use std::process::Command;

use super::device::BurnDevice;
use crate::profile::host_free;

const MIB: u64 = 1 << 20;

/// Free bytes of the device's memory; nothing where nobody tells.
pub(super) fn free_bytes(device: BurnDevice) -> Option<u64> {
    match device {
        // Apple's GPUs use the machine's memory.
        BurnDevice::Cpu | BurnDevice::Metal => Some(host_free()),
        BurnDevice::Rocm(index) => amd_free(index),
        // Vulkan numbers devices its own way; with a single one there is no doubt which is meant.
        BurnDevice::Vulkan(_) => only(nvidia_free).or_else(|| only(amd_free)),
    }
}

fn only(free: impl Fn(usize) -> Option<u64>) -> Option<u64> {
    free(0).filter(|_| free(1).is_none())
}

/// By NVIDIA's own tool, which every driver brings.
fn nvidia_free(index: usize) -> Option<u64> {
    let output = Command::new("nvidia-smi")
        .args(["--query-gpu=memory.free", "--format=csv,noheader,nounits", "-i", &index.to_string()])
        .output()
        .ok()?;
    if output.status.success() { mebibytes(&String::from_utf8_lossy(&output.stdout)) } else { None }
}

fn mebibytes(text: &str) -> Option<u64> {
    text.trim().parse::<u64>().ok()?.checked_mul(MIB)
}

/// As the kernel's driver says.
fn amd_free(index: usize) -> Option<u64> {
    let mut cards: Vec<_> =
        std::fs::read_dir("/sys/class/drm").ok()?.flatten().map(|e| e.path().join("device")).collect();
    cards.retain(|card| card.join("mem_info_vram_total").exists());
    cards.sort();
    let read = |name: &str| std::fs::read_to_string(cards.get(index)?.join(name)).ok()?.trim().parse::<u64>().ok();
    read("mem_info_vram_total")?.checked_sub(read("mem_info_vram_used")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_has_the_machines_free_memory() {
        assert!(free_bytes(BurnDevice::Cpu).unwrap() > MIB);
    }

    #[test]
    fn the_tools_answer_is_in_mebibytes() {
        assert_eq!(mebibytes("23912\n"), Some(23912 * MIB));
        assert_eq!(mebibytes("[N/A]\n"), None);
    }
}
