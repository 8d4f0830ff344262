#!/usr/bin/env python3
"""Memory and speed of a GPT-2 with a real vocabulary: the resident memory of each CompNode after each step, beside what
was planned for it, and tokens per second.

    python benches/memory/vocabulary.py --binary target/release/fusionllm --steps 30 --arrangements one,two,private

One block of width 768, 50,257 entries, 2 x 128 tokens a step, dense: in one process, on two CompNodes of this host that
share the tied table, and on two with private data, where one holds both ends of it. `--small` is GPT-2 small on four.
What the job took is the highest resident memory less that of the process before the job was placed, which no plan counts.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

JOB = """
name = "vocabulary"
[model]
name = "gpt2"
vocab_size = 50257
n_layer = {layers}
[data]
path = "text.txt"
tokenizer = "bytes"
seq_len = 128
private = {private}
[train]
steps = {steps}
batch = 2
micro_batches = {micro_batches}
warmup = 0
eval_batches = 1
[placement]
strategy = "equal-compute"
[compression]
policy = "dense"
[checkpoint]
every = 0
"""

ARRANGEMENTS = {
    "one": dict(compnodes=1, private=False, layers=1),
    "two": dict(compnodes=2, private=False, layers=1),
    "private": dict(compnodes=2, private=True, layers=2),
    "small-one": dict(compnodes=1, private=False, layers=12),
    "small-four": dict(compnodes=4, private=False, layers=12),
}


def children(pid):
    """The CompNodes that a run has started, by name."""
    found = {}
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(stat[1]) == pid and b"--name" in words:
            found[words[words.index(b"--name") + 1].decode()] = int(entry.name)
    return found


def resident(pid):
    """Resident and peak resident bytes of a process; None if it is gone."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return (sizes["VmRSS"], sizes["VmHWM"]) if len(sizes) == 2 else None


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def planned(binary, folder, settings):
    """What the plan says a CompNode needs, by name, where speeds do not matter."""
    cluster = "\n".join(f'[[device]]\nname = "compnode-{i}"\nflop_per_s = 1e11' for i in range(settings["compnodes"]))
    cluster += '\n[[link]]\nfrom = "*"\nto = "*"\nlatency_ms = 0.1\nmbit_per_s = 2500'
    (folder / "cluster.toml").write_text(cluster)
    command = [binary, "plan", "job.toml", "--cluster", "cluster.toml", "--json"]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if told.returncode:
        return {}
    return {c["name"]: c["memory_bytes"] for c in json.loads(told.stdout)["prediction"]["compnodes"]}


def run(binary, name, steps, micro_batches, text, log):
    settings = ARRANGEMENTS[name]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "text.txt").write_text(text)
        private = str(settings["private"]).lower()
        job = JOB.format(steps=steps, layers=settings["layers"], private=private, micro_batches=micro_batches)
        (folder / "job.toml").write_text(job)
        plan = planned(binary, folder, settings)
        command = [binary, "train", "job.toml", "--compnodes", str(settings["compnodes"]), "--out", "out"]
        with open(log, "w") as out:
            process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out)
        by_step, seen, peaks, empty = {}, 0, {}, {}
        while process.poll() is None:
            time.sleep(0.05)
            sizes = {n: resident(p) for n, p in children(process.pid).items()}
            is_placed = (folder / "out" / "placement.json").exists()
            for n, size in sizes.items():
                if size and not is_placed:
                    empty[n] = size[0]
                elif size:
                    peaks[n] = max(peaks.get(n, 0), size[0])
            now = len(lines_of(folder / "out" / "metrics.jsonl"))
            if now > seen:
                by_step[now] = {n: size[0] for n, size in sizes.items() if size}
                print(f"{name:10} step {now:4}  " + "  ".join(f"{n} {s / 1e6:7.0f} MB" for n, s in sorted(by_step[now].items())))
                seen = now
        metrics = lines_of(folder / "out" / "metrics.jsonl")
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed, see {log}:\n{pathlib.Path(log).read_text()[-2000:]}")
    warm = metrics[len(metrics) // 4 :]
    rate = statistics.median(m["tokens"] / m["step_s"] for m in warm)
    losses = [m["loss"] for m in metrics]
    return dict(name=name, rate=rate, by_step=by_step, peaks=peaks, empty=empty, plan=plan, losses=losses)


def table(results):
    rows = ["| arrangement | tokens/s | CompNode | planned | resident before the job | after a quarter | at the end | highest | what the job took, of planned |", "|" + "---|" * 9]
    for r in results:
        steps = sorted(r["by_step"])
        for n in sorted(r["peaks"]):
            at = lambda step: r["by_step"][step].get(n, 0) / 1e6
            peak, plan = r["peaks"][n], r["plan"].get(n)
            before = r["empty"].get(n, 0)
            share = f"{(peak - before) / plan:.2f}" if plan else "?"
            needed = f"{plan / 1e6:.0f} MB" if plan else "?"
            rows.append(
                f"| {r['name']} | {r['rate']:.0f} | {n} | {needed} | {before / 1e6:.0f} MB | {at(steps[len(steps) // 4]):.0f} MB "
                f"| {at(steps[-2 if len(steps) > 1 else -1]):.0f} MB | {peak / 1e6:.0f} MB | {share} |"
            )
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/fusionllm")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--arrangements", default="one,two,private")
    parser.add_argument("--small", action="store_true", help="GPT-2 small in one process and on four CompNodes instead")
    parser.add_argument("--log", default="vocabulary.log")
    options = parser.parse_args()
    text = "".join(chr(32 + i * i * 31 % 91) + ("\n" if i % 61 == 0 else "") for i in range(200_000))
    names = ["small-one", "small-four"] if options.small else options.arrangements.split(",")
    binary = os.path.abspath(options.binary)
    results = [run(binary, n, options.steps, options.micro_batches, text, os.path.abspath(options.log)) for n in names]
    print(table(results))
    for r in results:
        print(r["name"], "losses", r["losses"][:2], "...", r["losses"][-1])


if __name__ == "__main__":
    main()
