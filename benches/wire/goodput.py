"""Speed of OP-Data between two CompNodes over emulated links, beside TCP, as a table.

    cargo build --release -p fusionllm-compnode --example goodput
    cargo build --release --manifest-path tools/wan-emu/Cargo.toml
    sudo python benches/wire/goodput.py [LINK ...]

Needs root (for wan-emu) and iperf3; TCP's BBR needs `modprobe tcp_bbr`. Each round runs every contender in turn over the
same emulated link, so that what else the machine does falls on all of them. A figure is the median over rounds, of payload
in Mbit/s from the arrival of the first tensor to that of the last; TCP's leaves out its first two seconds.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Rate, round trip, loss in percent; MiB of a tensor, tensors, seconds of TCP.
LINKS = {
    "100mbit-50ms": (100, 50, 0, 16, 4, 6),
    "8mbit-100ms": (8, 100, 0, 2, 5, 8),
    "100mbit-50ms-loss": (100, 50, 1, 16, 4, 6),
    "200mbit-100ms": (200, 100, 0, 16, 6, 6),
    "500mbit-100ms": (500, 100, 0, 32, 6, 6),
}


def network(name, link):
    rate, trip, loss = link[:3]
    nodes = '[[node]]\nname = "a"\n[[node]]\nname = "b"\n'
    rule = f'from = "*"\nto = "*"\nmbit_per_s = {float(rate)}\nlatency_ms = {trip / 2}\nloss_percent = {float(loss)}\n'
    return f'name = "goodput"\n{nodes}[[link]]\n{rule}'


class Lab:
    def __init__(self, args, name):
        self.args, self.link = args, LINKS[name]
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="goodput-"))
        self.file = self.folder / "net.toml"
        self.file.write_text(network(name, self.link))

    def __enter__(self):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([self.args.wan_emu, "up", self.file], check=True, **quiet)
        return self

    def __exit__(self, *_):
        subprocess.run([self.args.wan_emu, "down", "--net", "goodput"], stdout=subprocess.DEVNULL)

    def command(self, node, *words):
        return [self.args.wan_emu, "exec", "--net", "goodput", node, "--", *map(str, words)]

    def ours(self, control, both):
        addrs = {"a": "10.77.0.1:7711", "b": "10.77.0.2:7711"}
        flags = ["--dir", self.folder, "--mb", self.link[3], "--count", self.link[4], "--control", control]
        flags += ["--both"] if both else []
        side = lambda role, own, peer: self.command(
            own, self.args.goodput, role, "--bind", addrs[own], "--peer", addrs[peer], *flags)
        other = subprocess.Popen(side("receive", "b", "a"), stdout=subprocess.DEVNULL)
        try:
            time.sleep(0.5)
            out = subprocess.run(side("send", "a", "b"), check=True, capture_output=True, text=True, timeout=150)
            return json.loads(out.stdout)
        finally:
            other.terminate()
            other.wait()

    def tcp(self, control):
        server = subprocess.Popen(self.command("b", "iperf3", "-s", "-1"), stdout=subprocess.DEVNULL)
        time.sleep(0.5)
        flags = ["-c", "10.77.0.2", "-C", control, "-t", self.link[5], "-O", 2, "-J"]
        out = subprocess.run(self.command("a", "iperf3", *flags), check=True, capture_output=True, text=True)
        server.wait()
        return json.loads(out.stdout)["end"]["sum_received"]["bits_per_second"] / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("links", nargs="*", help="of " + ", ".join(LINKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--controls", default="link-rate", help="of link-rate, bbr3, cubic; several by comma")
    parser.add_argument("--no-tcp", action="store_true")
    parser.add_argument("--wan-emu", default=ROOT / "tools/wan-emu/target/release/wan-emu")
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    parser.add_argument("--goodput", default=target / "release/examples/goodput")
    args = parser.parse_args()
    controls = args.controls.split(",")
    tcp = {} if args.no_tcp else {"TCP BBR": "bbr", "TCP CUBIC": "cubic"}

    print("| link | who | Mbit/s | first tensor | both ways at once | a small message: quiet, loaded, 95 % of them |")
    print("|---|---|---|---|---|---|")
    for name in args.links or LINKS:
        seen = {}
        with Lab(args, name) as lab:
            for _ in range(args.rounds):
                for who, control in tcp.items():
                    seen.setdefault(who, []).append({"then_mbit_per_s": lab.tcp(control)})
                for control in controls:
                    one = lab.ours(control, False)
                    both = lab.ours(control, True)
                    one["both"] = (both["then_mbit_per_s"], both["back_mbit_per_s"])
                    seen.setdefault(f"OP-Data, {control}", []).append(one)
        for who, runs in seen.items():
            middle = lambda key: statistics.median(run[key] for run in runs)
            cells = [name, who, f"{middle('then_mbit_per_s'):.1f}"]
            if "both" in runs[0]:
                there, back = (statistics.median(run["both"][way] for run in runs) for way in (0, 1))
                trips = [f"{middle(key):.0f} ms" for key in ("quiet_ms", "loaded_ms", "loaded_95_ms")]
                cells += [f"{middle('first_mbit_per_s'):.1f}", f"{there:.1f} + {back:.1f}", ", ".join(trips)]
            else:
                cells += ["", "", ""]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
