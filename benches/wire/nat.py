"""Two CompNodes behind routers that translate addresses: how they meet, how fast their link is, and a training over it, as a table.

    cargo build --release
    cargo build --release --manifest-path tools/wan-emu/Cargo.toml
    sudo python benches/wire/nat.py [--only NAME ...] [--steps N]

Needs root, `ip` and `nft`. Broker and routers are nodes of wan-emu: 100 Mbit/s and 50 ms round trip between each two. Behind
each router is a namespace with the address 192.168.1.2, in which a CompNode runs. A router that is a `cone` has the same outer
port for all that one sends to, one that is `symmetric` another for each; both let nobody in who was not asked.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
NET = "nat"
SITES = ["site-a", "site-b"]
KINDS = {
    "no routers": (None, None),
    "cone - cone": ("cone", "cone"),
    "cone - symmetric": ("cone", "symmetric"),
    "symmetric - symmetric": ("symmetric", "symmetric"),
}
NETWORK = f"""
name = "{NET}"
[[node]]
name = "broker"
[[node]]
name = "site-a"
[[node]]
name = "site-b"
[[link]]
from = "*"
to = "*"
latency_ms = 25.0
mbit_per_s = 100.0
"""
JOB = """
name = "nat"
[model]
name = "gpt2"
n_layer = 2
n_embd = 64
n_head = 2
[data]
path = "text.txt"
seq_len = 64
[train]
steps = STEPS
batch = 16
micro_batches = 4
lr = 1e-3
warmup = 2
[placement]
strategy = "equal-compute"
[compression]
policy = "dense"
"""
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def sh(line, **options):
    subprocess.run(line, shell=True, check=True, **options)


def translate(site, kind):
    """Puts a namespace behind a node of the network. Gives its name."""
    node, home = f"wanemu.{NET}.{site}", f"home-{site}"
    subprocess.run(["ip", "netns", "del", home], **QUIET)
    sh(f"ip netns add {home}")
    sh(f"ip -n {node} link add in0 type veth peer name eth0 netns {home}")
    for where, device, own in [(node, "in0", "192.168.1.1/24"), (home, "eth0", "192.168.1.2/24")]:
        sh(f"ip -n {where} addr add {own} dev {device} && ip -n {where} link set {device} up")
    sh(f"ip -n {home} link set lo up && ip -n {home} route add default via 192.168.1.1")
    ports = " fully-random" if kind == "symmetric" else ""
    rules = f"""table ip t {{
        chain out {{ type nat hook postrouting priority 100; oifname wan0 masquerade{ports}; }}
        chain in {{ type filter hook input priority 0; iifname wan0 ct state new drop; }}
    }}"""
    sh(f"ip netns exec {node} sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward'")
    subprocess.run(["ip", "netns", "exec", node, "nft", "-f", "-"], input=rules, text=True, check=True)
    return home


def seconds(line):
    return datetime.datetime.fromisoformat(re.match(r"\S*?(\d{4}-\S+Z)", line)[1]).timestamp()


def direct_after(log):
    """Milliseconds from the first path of the link to its first direct one, by the log of the CompNode that dialled."""
    paths = [line for line in log if " prev_network_path=" in line]
    found = {}
    for line in paths:
        remote = re.search(r"remote=(\w+)", line)[1]
        kind = "relay" if "relay" in re.search(r" network_path=(.*?)( prev|$)", line)[1].lower() else "direct"
        found.setdefault(remote, {}).setdefault(kind, seconds(line))
    both = [at["direct"] - at["relay"] for at in found.values() if {"relay", "direct"} <= at.keys()]
    return [round(took * 1000) for took in both if took >= 0]


def run(args, kinds):
    folder = pathlib.Path(tempfile.mkdtemp(prefix="nat-"))
    words = ["the", "broker", "cuts", "graphs", "and", "machines", "train", "them", "over", "slow", "links"]
    (folder / "text.txt").write_text(" ".join(words[(i * i + i // 7) % len(words)] for i in range(20000)))
    (folder / "job.toml").write_text(JOB.replace("STEPS", str(args.steps)))
    (folder / "net.toml").write_text(NETWORK)
    environment = {**os.environ, "XDG_STATE_HOME": str(folder)}
    loud = {**environment, "FUSIONLLM_LOG": "warn,fusionllm=info,fusionllm_compnode=info,fusionllm_transport=info,iroh::_events=debug"}
    enter = lambda namespace, *line: ["ip", "netns", "exec", namespace, args.fusionllm, *line]
    at_broker = lambda *line: enter(f"wanemu.{NET}.broker", *line, "--state", str(folder / "state"))
    ask = lambda *line: subprocess.run(at_broker(*line), cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    processes = []
    subprocess.run([args.wan_emu, "up", str(folder / "net.toml")], check=True, **QUIET)
    try:
        homes = [translate(site, kind) if kind else f"wanemu.{NET}.{site}" for site, kind in zip(SITES, kinds)]
        broker = at_broker("broker", "--relay", "--runs", str(folder / "runs"))
        processes.append(subprocess.Popen(broker, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=open(folder / "broker.log", "w")))
        while not (folder / "state/join.ticket").exists():
            time.sleep(0.1)
        time.sleep(0.5)
        for site, home in zip(SITES, homes):
            join = enter(home, "join", "--ticket-file", str(folder / "state/join.ticket"), "--name", site, "--device", "cpu",
                         "--threads", "1", "--data", str(folder), "--state", str(folder / f"state-{site}"))
            processes.append(subprocess.Popen(join, cwd=folder, env=loud, stdout=subprocess.DEVNULL, stderr=open(folder / f"{site}.log", "w")))
            while site not in ask("status"):
                time.sleep(0.2)
        inventory = json.loads(ask("inventory", "--json"))
        links = {(link["from"], link["to"]): link for link in inventory["links"]}
        ask("submit", "job.toml", "--follow")
        job = json.loads(ask("status", "--json"))["jobs"][-1]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        subprocess.run([args.wan_emu, "down", "--net", NET], **QUIET)
        for site in SITES:
            subprocess.run(["ip", "netns", "del", f"home-{site}"], **QUIET)
    train = [args.fusionllm, "train", "job.toml", "--compnodes", "2", "--out", "calm"]
    subprocess.run(train, cwd=folder, env=environment, check=True, **QUIET)
    steps = lambda run: [json.loads(line) for line in open(folder / run / "metrics.jsonl")]
    here, calm = steps(job["run_dir"]), steps("calm")
    equal = [step["loss"] for step in here] == [step["loss"] for step in calm]
    took = sorted(step["step_s"] for step in here[1:])[len(here) // 2]
    logs = [open(folder / f"{site}.log").read().splitlines() for site in SITES]
    after = [ms for log in logs for ms in direct_after(log)]
    return links, equal, took, after


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    parser.add_argument("--fusionllm", default=str(target / "release/fusionllm"))
    parser.add_argument("--wan-emu", default=str(ROOT / "tools/wan-emu/target/release/wan-emu"))
    parser.add_argument("--only", nargs="+", default=list(KINDS))
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    print("| routers | way | direct after | a to b, b to a | round trip | median step | losses as `train` |", flush=True)
    print("|---" * 7 + "|", flush=True)
    for name in args.only:
        links, equal, took, after = run(args, KINDS[name])
        there, back = (links[pair] for pair in [("site-a", "site-b"), ("site-b", "site-a")])
        rates = ", ".join(f"{link['link']['bytes_per_s'] * 8 / 1e6:.1f}" for link in (there, back))
        way = "relay" if there["relayed"] else "direct"
        waited = f"{min(after)} ms" if after else "-"
        trip = f"{there['link']['latency_s'] * 2e3:.0f} ms"
        print(f"| {name} | {way} | {waited} | {rates} Mbit/s | {trip} | {took * 1e3:.0f} ms | {'yes' if equal else 'NO'} |", flush=True)


if __name__ == "__main__":
    main()
