//! Memory of this machine that is free for a job.

/// Bytes that are free: what the machine has, its control group leaves, and this process may still map.
pub(crate) fn host_free() -> u64 {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_free_memory() {
        assert!(host_free() > 1 << 20);
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
}
