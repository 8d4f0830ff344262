//! Network files: what is read, and what is refused.

use super::*;

const THREE: &str = r#"
    name = "three sites"
    [[node]]
    name = "broker"
    site = "office"
    [[node]]
    name = "gpu"
    count = 2
    site = "berlin"
    access = "home-fibre"
    down_mbit_per_s = 300.0
    [[link]]
    from = "*"
    to = "*"
    preset = "100mbps-50ms"
    [[link]]
    from = "gpu"
    to = "gpu"
    latency_ms = 0.3
    mbit_per_s = 1000.0
    [[link]]
    from = "gpu-1"
    to = "office"
    latency_ms = 60.0
    mbit_per_s = 8.0
    back_mbit_per_s = 50.0
"#;

fn resolve(text: &str) -> Result<Network, Error> {
    toml::from_str::<NetworkFile>(text).unwrap().resolve("test")
}

#[test]
fn the_last_rule_that_fits_counts_and_a_way_back_may_differ() {
    let network = resolve(THREE).unwrap();
    let mbit = |a, b| network.link(a, b).bits_per_s / 1e6;
    assert_eq!((mbit(0, 1), mbit(1, 2), mbit(2, 0), mbit(0, 2)), (100.0, 1000.0, 8.0, 50.0));
    assert_eq!(network.link(0, 1).latency, Duration::from_millis(25));
    let names: Vec<&str> = network.nodes.iter().map(|node| node.name.as_str()).collect();
    assert_eq!(names, ["broker", "gpu-0", "gpu-1"]);
    assert_eq!(network.nodes[2].address, Ipv4Addr::new(10, 77, 0, 3));
    assert_eq!((network.nodes[1].access.up, network.nodes[1].access.down), (Some(1e8), Some(3e8)));
    assert_eq!(network.nodes[0].access.up, None);
}

#[test]
fn a_change_fits_as_a_rule_does() {
    let mut network = resolve(THREE).unwrap();
    let cut = |from: &str, to: &str, one_way| LinkRule {
        from: from.to_owned(),
        to: to.to_owned(),
        one_way,
        cut: Some(true),
        ..LinkRule::default()
    };
    assert_eq!(network.change(&cut("broker", "gpu-0", true)).unwrap(), [(0, 1)]);
    assert_eq!(network.change(&cut("berlin", "office", false)).unwrap(), [(0, 1), (0, 2), (1, 0), (2, 0)]);
    assert!(network.link(2, 0).cut && !network.link(1, 2).cut);
    assert_eq!(network.link(2, 0).bits_per_s, 8e6);
    let unknown = network.change(&cut("paris", "office", false)).unwrap_err();
    assert!(unknown.to_string().contains("`paris`, which is neither"));
    assert!(network.change(&cut("broker", "broker", false)).unwrap_err().to_string().contains("no link goes"));
}

#[test]
fn what_does_not_fit_is_named() {
    let fault = |more: &str| resolve(&format!("{THREE}{more}")).unwrap_err().to_string();
    assert!(fault("[[node]]\nname = \"gpu-1\"").contains("two nodes are named `gpu-1`"));
    assert!(fault("[[node]]\nname = \"a b\"").contains("node name `a b`"));
    assert!(fault("[[node]]\nname = \"x\"\ncount = 99").contains("expected 2 to 24"));
    assert!(fault("[[link]]\nfrom = \"x\"\nto = \"*\"").contains("`x`, which is neither"));
    assert!(fault("[[link]]\nfrom = \"*\"\nto = \"gpu\"").contains("needs `latency_ms`"));
    assert!(fault("[[step]]\nat_s = 1.0").contains("needs `link`, `kill` or `run`"));
    assert!(fault("[[step]]\nat_s = 1.0\nkill = { node = \"x\" }").contains("step at_s = 1: no node is named `x`"));
    let alone = "[[node]]\nname = \"a\"\ncount = 2\n[[link]]\nfrom = \"a-0\"\nto = \"a-1\"\npreset = \"1gbps-2ms\"";
    assert!(resolve(alone).is_ok());
    assert!(resolve(&format!("{alone}\none_way = true")).unwrap_err().to_string().contains("no link rule fits `a-1`"));
}

#[test]
fn the_planners_cluster_files_are_networks_too() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/clusters");
    let network = Network::read(&examples.join("three-sites.toml"), None).unwrap();
    assert_eq!((network.nodes.len(), network.name.as_str()), (24, "three-sites--24-GPUs"));
    assert_eq!(network.link(0, 8).latency, Duration::from_millis(120));
}
