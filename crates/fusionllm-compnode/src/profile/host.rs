//! Which machine this is.

/// Name of this machine, the same for all its processes and for no other machine.
pub(crate) fn host_name() -> String {
    let name = sysinfo::System::host_name().unwrap_or_else(|| "host".to_owned());
    // Machines cloned from one image share name and machine id, but not the id of their last start.
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let boot: String = boot.chars().take(8).collect();
    if boot.is_empty() { name } else { format!("{name}-{boot}") }
}
