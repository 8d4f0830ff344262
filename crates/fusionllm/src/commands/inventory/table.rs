//! An inventory as tables.

use std::collections::BTreeMap;

use fusionllm_planner::{LinkProfile, clusters_by_bandwidth, format_bytes};
use fusionllm_protocol::Inventory;

/// Machines of which all links are shown; beyond it only the clusters are.
const MOST_COLUMNS: usize = 16;

/// Machines, the matrix of links, and the clusters they form.
pub(super) fn inventory(inventory: &Inventory) -> String {
    if inventory.machines.is_empty() {
        return "no CompNodes have joined".to_owned();
    }
    let mut text = machines(inventory);
    if inventory.machines.len() > 1 {
        text.push_str(&links(inventory));
        text.push_str(&clusters(inventory));
    }
    text.trim_end().to_owned()
}

fn machines(inventory: &Inventory) -> String {
    let mut text = format!(
        "{:<16} {:<18} {:>10} {:>12} {:>6} {:>12} {:>5}  {}\n",
        "CompNode", "device", "free", "S", "λ", "memory", "job", "machine"
    );
    for machine in &inventory.machines {
        let profile = &machine.profile;
        let free = profile.memory_bytes.map_or_else(|| "?".to_owned(), |bytes| format_bytes(bytes as f64));
        let efficiency = machine.efficiency.map_or_else(|| "-".to_owned(), |share| format!("{share:.2}"));
        let job = machine.job.map_or_else(|| "idle".to_owned(), |job| job.0.to_string());
        let lanes = profile.cpu.map_or_else(String::new, |cpu| format!(" (computes for {} at once)", cpu.lanes));
        let org = machine.org.as_ref().map_or_else(String::new, |org| format!(", of {org}"));
        text.push_str(&format!(
            "{:<16} {:<18} {free:>10} {:>12} {efficiency:>6} {:>12} {job:>5}  {}{lanes}{org}\n",
            machine.name,
            machine.device,
            format!("{} FLOP/s", short(profile.flop_per_s)),
            format!("{}B/s", short(profile.memory_bytes_per_s)),
            profile.host,
        ));
    }
    text
}

fn links(inventory: &Inventory) -> String {
    let names: Vec<&str> = inventory.machines.iter().map(|m| m.name.as_str()).collect();
    if names.len() > MOST_COLUMNS {
        return format!("\n{} links were measured; --json and --toml have them all\n", inventory.links.len());
    }
    let table: BTreeMap<(&str, &str), (Option<LinkProfile>, bool)> =
        inventory.links.iter().map(|l| ((l.from.as_str(), l.to.as_str()), (l.link, l.relayed))).collect();
    let mut text = format!("\n{:<16}", "from \\ to");
    for name in &names {
        text.push_str(&format!(" {name:>20}"));
    }
    for from in &names {
        text.push_str(&format!("\n{from:<16}"));
        for to in &names {
            let cell = match table.get(&(*from, *to)) {
                _ if from == to => String::new(),
                Some((Some(link), relayed)) => {
                    let (mbit, ms) = (link.bytes_per_s * 8.0 / 1e6, link.latency_s * 1e3);
                    let mark = if *relayed { "*" } else { "" };
                    format!("{mbit:.*} Mbit/s {ms:.1} ms{mark}", usize::from(mbit < 100.0))
                }
                Some((None, _)) => "unreachable".to_owned(),
                None => "?".to_owned(),
            };
            text.push_str(&format!(" {cell:>20}"));
        }
    }
    text.push('\n');
    if inventory.links.iter().any(|link| link.relayed) {
        text.push_str("* over the broker's relay: there is no direct way\n");
    }
    if inventory.links.iter().any(|link| link.link.is_none()) {
        text.push_str(match inventory.relay {
            true => {
                "unreachable: not over the broker's relay either; the log of a CompNode says whether it reaches that\n"
            }
            false => {
                "unreachable: where a router is between two CompNodes, `fusionllm broker --relay` lets them meet\n"
            }
        });
    }
    text
}

fn clusters(inventory: &Inventory) -> String {
    let mut members: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    for (machine, cluster) in inventory.machines.iter().zip(clusters_by_bandwidth(&inventory.cluster())) {
        members.entry(cluster).or_default().push(&machine.name);
    }
    let lines = members.values().map(|names| format!("  {}\n", names.join(", ")));
    format!("\nclusters by bandwidth\n{}", lines.collect::<String>())
}

/// A number with a decimal prefix.
fn short(value: f64) -> String {
    let steps = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")];
    let step = steps.into_iter().find(|(size, _)| value >= *size).unwrap_or((1e3, "k"));
    format!("{:.1} {}", value / step.0, step.1)
}

#[cfg(test)]
mod tests {
    use fusionllm_graph::Kernels;
    use fusionllm_protocol::{CpuShare, DeviceProfile, LinkReport, MachineReport};

    use super::*;

    fn machine(name: &str) -> MachineReport {
        MachineReport {
            name: name.to_owned(),
            id: "00".to_owned(),
            device: "cpu (1 thread)".to_owned(),
            job: None,
            org: None,
            profile: DeviceProfile {
                flop_per_s: 9.44e10,
                memory_bytes_per_s: 1.2e10,
                memory_bytes: Some(8_000_000_000),
                host: "office-12345678".to_owned(),
                cpu: Some(CpuShare { lanes: 2.0, threads: 1 }),
                kernels: Kernels::Fused,
            },
            measured: None,
            efficiency: Some(0.51),
        }
    }

    #[test]
    fn machines_links_and_clusters_are_shown() {
        let link = |from: &str, to: &str, link| LinkReport {
            from: from.to_owned(),
            to: to.to_owned(),
            link,
            relayed: to == "b",
            age_s: 0.0,
        };
        let profile = LinkProfile { latency_s: 0.05, bytes_per_s: 1e6 };
        let inventory_of = Inventory {
            machines: vec![machine("a"), machine("b")],
            links: vec![link("a", "b", Some(profile)), link("b", "a", None)],
            pending: 0,
            relay: false,
        };
        let text = inventory(&inventory_of);
        for expected in [
            "94.4 G FLOP/s",
            "0.51",
            "8.00 GB",
            "8.0 Mbit/s 50.0 ms*",
            "unreachable",
            "`fusionllm broker --relay`",
            "* over the broker's relay",
            "clusters by bandwidth",
        ] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
        assert_eq!(inventory(&Inventory::default()), "no CompNodes have joined");
    }
}
