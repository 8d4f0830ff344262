//! A training over `tools/wan-emu`, whose tests on real namespaces are otherwise run by hand.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::process::{Bench, text};

const NETWORK: &str = "
[[node]]
name = \"broker\"

[[node]]
name = \"gpu\"
count = 2

[[link]]
from = \"*\"
to = \"*\"
latency_ms = 20
mbit_per_s = 100
loss_percent = 0.5
";

/// A broker and two CompNodes, each on a node, and a job from its submission to its end.
const SCRIPT: &str = r#"
on() { node=$1; shift; wan-emu exec "$node" --net "$WAN_EMU_NET" -- env XDG_STATE_HOME="$PWD/$node" "$@"; }
on broker fusionllm broker > broker.out 2> broker.err &
until grep -q 'fusionllm join' broker.out; do sleep 0.1; done
ticket=broker/fusionllm/join.ticket
on gpu-0 fusionllm join --ticket-file $ticket --name gpu-0 --device cpu --data . 2> gpu-0.err &
on gpu-1 fusionllm join --ticket-file $ticket --name gpu-1 --device cpu --data . 2> gpu-1.err &
until on broker fusionllm status | grep -q '^gpu-1' && on broker fusionllm status | grep -q '^gpu-0'; do sleep 0.1; done
on broker fusionllm submit job.toml --follow
"#;

/// Beside the `fusionllm` that is tested, or where its own folder has it.
fn wan_emu() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_BIN_EXE_fusionllm")).with_file_name("wan-emu");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    [beside, root.join("tools/wan-emu/target/release/wan-emu")].into_iter().find(|path| path.is_file())
}

/// Why it cannot be tried here.
fn obstacle() -> Option<&'static str> {
    let is_root = std::fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
    if !is_root {
        return Some("it needs root");
    }
    if !Path::new("/dev/net/tun").exists() {
        return Some("there is no /dev/net/tun");
    }
    wan_emu().is_none().then_some("it is not built: cargo build --release --manifest-path tools/wan-emu/Cargo.toml")
}

#[test]
fn a_job_trains_over_an_emulated_wan() {
    if let Some(reason) = obstacle() {
        eprintln!("no training over wan-emu: {reason}");
        return;
    }
    let bench = Bench::new();
    bench.write("lab.toml", NETWORK);
    bench.write("lab.sh", SCRIPT);
    let folder = wan_emu().unwrap().parent().unwrap().display().to_string();
    // A request to end takes the network down; being killed would leave it.
    let line =
        format!("PATH={folder}:$PATH; timeout 120 wan-emu run lab.toml --net job-{} -- sh lab.sh", std::process::id());
    let output = bench.shell(&line).stdin(Stdio::null()).output().unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    let log = |name: &str| std::fs::read_to_string(bench.path(name)).unwrap_or_default();
    let logs = ["broker.err", "gpu-0.err", "gpu-1.err"].map(log).join("\n");
    assert!(output.status.success() && out.contains("step 8/8"), "{out}\n{err}\n{logs}");
}
