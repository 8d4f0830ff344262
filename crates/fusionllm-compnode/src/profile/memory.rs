//! Memory that is free for a job.

use std::process::Command;

use crate::device::DeviceChoice;

const MIB: u64 = 1 << 20;

/// Free bytes of the device's memory; nothing where nobody tells.
pub(crate) fn free_bytes(device: DeviceChoice) -> Option<u64> {
    match device {
        DeviceChoice::Cpu => Some(host_free()),
        // Apple's GPUs use the machine's memory.
        DeviceChoice::Metal => Some(host_free()),
        DeviceChoice::Cuda(index) => nvidia_free(index),
        DeviceChoice::Rocm(index) => amd_free(index),
        // Vulkan numbers devices its own way; with a single one there is no doubt which is meant.
        DeviceChoice::Vulkan(_) => only(nvidia_free).or_else(|| only(amd_free)),
        DeviceChoice::Auto if cfg!(any(feature = "rocm", feature = "vulkan")) => nvidia_free(0).or_else(|| amd_free(0)),
        DeviceChoice::Auto => Some(host_free()),
    }
}

fn only(free: impl Fn(usize) -> Option<u64>) -> Option<u64> {
    free(0).filter(|_| free(1).is_none())
}

/// What the machine has, its control group leaves, and this process may still map.
fn host_free() -> u64 {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let of_group = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
    system.available_memory().min(of_group).min(address_space_left().unwrap_or(u64::MAX))
}

/// Bytes that `ulimit -v` leaves this process; nothing where there is no such limit.
fn address_space_left() -> Option<u64> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    left_of(&limits, &status)
}

fn left_of(limits: &str, status: &str) -> Option<u64> {
    let number = |text: &str| text.split_whitespace().next()?.parse::<u64>().ok();
    let most = limits.lines().find_map(|line| number(line.strip_prefix("Max address space")?))?;
    let mapped_kib = status.lines().find_map(|line| number(line.strip_prefix("VmSize:")?))?;
    Some(most.saturating_sub(mapped_kib.saturating_mul(1024)))
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
        assert!(free_bytes(DeviceChoice::Cpu).unwrap() > MIB);
    }

    #[test]
    fn a_limit_of_the_address_space_counts_less_what_is_mapped() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units\n\
                      Max address space         6000000000           unlimited            bytes\n";
        assert_eq!(left_of(limits, "Name:\tx\nVmSize:\t 1000000 kB\n"), Some(6_000_000_000 - 1_024_000_000));
        assert_eq!(
            left_of("Max address space         unlimited            unlimited            bytes", "VmSize: 1 kB"),
            None
        );
    }

    #[test]
    fn the_tools_answer_is_in_mebibytes() {
        assert_eq!(mebibytes("23912\n"), Some(23912 * MIB));
        assert_eq!(mebibytes("[N/A]\n"), None);
    }
}
