#!/usr/bin/env python3
"""Bytes that each CompNode copies in a training step, and its peak resident memory, of one or several builds.

    python benches/memory/copies.py --binary target/release/fusionllm --binary OLD/fusionllm

Counts calls of memcpy and memmove by a library that is preloaded (copies.c, compiled by `cc`), so it needs Linux and a
binary that calls the C library's. Counters are read as each step's line comes, from the tenth on, so that start and end do
not count; the memory is that of the whole run. Not counted are copies that the compiler writes out (small, of constant size), loops that convert while they copy,
and what the kernel copies: compare builds by it, and do not take it for all memory traffic.
"""

import argparse
import os
import pathlib
import struct
import subprocess
import tempfile
import time

from vocabulary import children, lines_of, resident

HERE = pathlib.Path(__file__).parent

JOB = """
name = "copies"
[model]
name = "gpt2"
{model}
[data]
path = "text.txt"
tokenizer = "bytes"
seq_len = 128
[train]
steps = {steps}
{batch}
warmup = 0
eval_batches = 1
[placement]
strategy = "equal-compute"
{more}
[checkpoint]
every = 0
"""

# `tied`: most parameters are in a table that both CompNodes hold, and all boundary tensors are dense. `quickstart`: the
# shapes and codecs of examples/quickstart.toml.
JOBS = {
    "tied": dict(
        compnodes=2,
        model="n_layer = 4\nn_embd = 512\nn_head = 8\nvocab_size = 8192",
        batch="batch = 8\nmicro_batches = 4",
        more='[compression]\npolicy = "dense"',
    ),
    "quickstart": dict(
        compnodes=3,
        model="n_layer = 4\nn_embd = 128\nn_head = 4",
        batch="batch = 16\nmicro_batches = 4\nlr = 2e-3",
        more='pipeline = "1f1b"',
    ),
}


# The step from which on copies count.
FIRST = 10


def compiled(folder):
    """The library that counts."""
    library = folder / "copies.so"
    flags = ["-O2", "-fno-builtin", "-fno-tree-loop-distribute-patterns", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, str(HERE / "copies.c"), "-o", str(library), "-ldl"], check=True)
    return library


def counted(path):
    """Bytes that were copied in pieces of at least a page, and in smaller ones."""
    _, large, _, small = struct.unpack("4Q", path.read_bytes())
    return large, small


def run(binary, name, steps, library, log):
    """By CompNode, bytes that it copies in a step, in large and in small pieces, and peak resident bytes; and the losses."""
    job = JOBS[name]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "text.txt").write_text("".join(chr(32 + i * i * 31 % 91) for i in range(200_000)))
        (folder / "job.toml").write_text(JOB.format(steps=steps, **job))
        command = [binary, "train", "job.toml", "--compnodes", str(job["compnodes"]), "--out", "out"]
        environment = dict(os.environ, LD_PRELOAD=str(library), COPIES=str(folder))
        with open(log, "w") as out:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
        pids, peaks, by_step = {}, {}, {}
        while process.poll() is None:
            time.sleep(0.01)
            if not by_step:
                pids.update(children(process.pid))
            for n, pid in pids.items():
                size = resident(pid)
                if size:
                    peaks[n] = size[1]
            step = len(lines_of(folder / "out" / "metrics.jsonl"))
            if FIRST <= step < steps and step not in by_step:
                by_step[step] = {n: counted(folder / f"copies-{pid}") for n, pid in pids.items()}
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{pathlib.Path(log).read_text()[-2000:]}")
        losses = [m["loss"] for m in lines_of(folder / "out" / "metrics.jsonl")]
    first, last = min(by_step), max(by_step)
    each = lambda n: tuple((a - b) / (last - first) for a, b in zip(by_step[last][n], by_step[first][n]))
    return {n: each(n) for n in by_step[last]}, peaks, losses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", action="append", help="a build; may be given several times")
    parser.add_argument("--jobs", default="tied,quickstart")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--log", default="copies.log")
    options = parser.parse_args()
    print("| job | build | CompNode | copied a step | in pieces below 4 KiB | peak resident |\n" + "|---" * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(pathlib.Path(folder))
        for name in options.jobs.split(","):
            for binary in options.binary or ["target/release/fusionllm"]:
                copied, peaks, losses = run(os.path.abspath(binary), name, options.steps, library, options.log)
                for n, (large, small) in sorted(copied.items()):
                    sizes = f"{(large + small) / 1e6:.1f} MB | {small / 1e6:.1f} MB | {peaks[n] / 1e6:.0f} MB"
                    print(f"| {name} | {binary} | {n} | {sizes} |", flush=True)
                print(f"<!-- losses {losses[0]} ... {losses[-1]} -->", flush=True)


if __name__ == "__main__":
    main()
