"""How soon a connection is back at speed after what a link may do, by congestion control, as a table.

    cargo build --release -p fusionllm-transport --example stream
    cargo build --release --manifest-path tools/wan-emu/Cargo.toml
    sudo python benches/wire/storms.py [--only NAME ...] [--controls link-rate cubic bbr3]

Needs root (for wan-emu). One stream of bytes runs over an emulated link; after some seconds a storm comes, and goes. A figure
is the time from the storm's end until nine tenths of what the link allows come through, in windows of half a second, and then
the share of it that comes in the last five seconds. `-` says that it did not come back in the time watched.
"""

import argparse
import json
import os
import pathlib
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BEGINS, AFTER, WINDOW = 6, 12, 5
# Rate, round trip; the weather before, during and after; seconds of the storm.
FAIR = {"mbit_per_s": 100.0, "latency_ms": 25.0}
SLOW = {"mbit_per_s": 8.0, "latency_ms": 50.0}
NEAR = {"mbit_per_s": 500.0, "latency_ms": 2.0}
CUT = {"cut": True}
STORMS = {
    "cut 1 s": (FAIR, CUT, {}, 1),
    "cut 5 s": (FAIR, CUT, {}, 5),
    "cut 30 s": (FAIR, CUT, {}, 30),
    "cut 5 s, 8 Mbit/s": (SLOW, CUT, {}, 5),
    "cut 5 s, 500 Mbit/s": (NEAR, CUT, {}, 5),
    "cut 2 s, then a tenth": (FAIR, CUT, {"mbit_per_s": 10.0}, 2),
    "a tenth for 5 s": (FAIR, {"mbit_per_s": 10.0}, {}, 5),
    "a tenth for 5 s, queue of 1 s": ({**FAIR, "queue_ms": 1000.0}, {"mbit_per_s": 10.0}, {}, 5),
    "loss 1 %": ({**FAIR, "loss_percent": 1.0}, {}, {}, 1),
    "loss 5 %": ({**FAIR, "loss_percent": 5.0}, {}, {}, 1),
    "loss 20 %": ({**FAIR, "loss_percent": 20.0}, {}, {}, 1),
    "loss 20 % for 5 s": (FAIR, {"loss_percent": 20.0}, {}, 5),
    "cut 5 s within loss 5 %": ({**FAIR, "loss_percent": 5.0}, CUT, {}, 5),
    "jitter 5 ms, reordering": ({**FAIR, "jitter_ms": 5.0, "reorder": True}, {}, {}, 1),
    "jitter 20 ms, reordering": ({**FAIR, "jitter_ms": 20.0, "reorder": True}, {}, {}, 1),
    "jitter 20 ms, reordering, 20 Mbit/s": ({**FAIR, "mbit_per_s": 20.0, "jitter_ms": 20.0, "reorder": True}, {}, {}, 1),
    "jitter 20 ms, in order": ({**FAIR, "jitter_ms": 20.0}, {}, {}, 1),
    "jitter 20 ms, reordering, for 5 s": (FAIR, {"jitter_ms": 20.0, "reorder": True}, {}, 5),
}


def network(fair):
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in fair.items())
    return f'name = "storms"\n[[node]]\nname = "a"\n[[node]]\nname = "b"\n[[link]]\nfrom = "*"\nto = "*"\n{lines}'


def run(args, storm, control):
    fair, during, after, lasts = storm
    total = BEGINS + lasts + AFTER
    folder = pathlib.Path(tempfile.mkdtemp(prefix="storms-"))
    file = folder / "net.toml"
    file.write_text(network(fair))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    emulator = lambda *words: [args.wan_emu, *map(str, words)]
    inside = lambda node, *words: emulator("exec", "--net", "storms", node, "--", args.stream, *words)
    common = ["--dir", folder, "--control", control]
    subprocess.run(emulator("up", file), check=True, **quiet)
    try:
        receiver = subprocess.Popen(
            inside("b", "receive", "--bind", "10.77.0.2:7711", "--seconds", total + 1, *common), stdout=subprocess.PIPE, text=True)
        while not (folder / "began").exists():
            time.sleep(0.05)
        time.sleep(0.2)
        sender = subprocess.Popen(
            inside("a", "send", "--bind", "10.77.0.1:7711", "--peer", "10.77.0.2:7711", "--seconds", total, *common), **quiet)
        began = float((folder / "began").read_text())
        time.sleep(max(0.0, began + BEGINS - time.time()))
        change(args, during)
        time.sleep(lasts)
        calm = {"jitter_ms": 0.0, "loss_percent": 0.0, "reorder": False, "cut": False, **fair, **after}
        change(args, {name: calm[name] for name in {**during, **after}})
        ended = time.time() - began
        tenths = json.loads(receiver.communicate(timeout=total + 30)[0])
        sender.wait()
    finally:
        subprocess.run(emulator("down", "--net", "storms"), **quiet)
    return judge(tenths, ended, {**fair, **after})


def change(args, weather):
    if not weather:
        return
    words = ["--rate" if name == "mbit_per_s" else "--" + name.replace("_", "-") for name in weather if name != "cut"]
    values = [json.dumps(value) for name, value in weather.items() if name != "cut"]
    flags = [word for pair in zip(words, values) for word in pair]
    if "cut" in weather:
        flags.append("--cut" if weather["cut"] else "--heal")
    subprocess.run([args.wan_emu, "link", "a", "b", "--net", "storms", *flags], check=True, stdout=subprocess.DEVNULL)


def judge(tenths, ended, weather):
    """Seconds until the speed is back, and the share of the link's rate at the end."""
    # Headers take some four percent.
    allowed = weather["mbit_per_s"] * 1e5 / 8 * 0.96 * (1 - weather.get("loss_percent", 0.0) / 100)
    share = lambda at, count: sum(tenths[at:at + count]) / (count * allowed)
    first = int(ended * 10) + 1
    back = next((at - first for at in range(first, len(tenths) - 5) if share(at, 5) >= 0.9), None)
    last = len(tenths) - WINDOW * 10 - 2
    return {"back_s": None if back is None else back / 10, "share": share(last, WINDOW * 10)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    parser.add_argument("--wan-emu", default=str(ROOT / "tools/wan-emu/target/release/wan-emu"))
    parser.add_argument("--stream", default=str(target / "release/examples/stream"))
    parser.add_argument("--only", nargs="+", default=list(STORMS))
    parser.add_argument("--controls", nargs="+", default=["link-rate", "cubic", "bbr3"])
    args = parser.parse_args()
    print("| storm | " + " | ".join(args.controls) + " |", flush=True)
    print("|---" * (len(args.controls) + 1) + "|", flush=True)
    for name in args.only:
        cells = []
        for control in args.controls:
            result = run(args, STORMS[name], control)
            back = "-" if result["back_s"] is None else f"{result['back_s']:.1f} s"
            cells.append(f"{back}, {result['share'] * 100:.0f} %")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
