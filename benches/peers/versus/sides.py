"""How each side runs one setting on a network that is up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from versus.net import INTERFACE, Net, RunFailed, address, node_name
from versus.setting import Setting
from versus.watch import Processes, Run, read_steps

PEERS = Path(__file__).resolve().parents[1]
MEMORY_GB = 4


@dataclass(frozen=True)
class Side:
    """A row of the table: a program and what it sends."""

    label: str
    wire: str | None = None
    """What PyTorch sends; FusionLLM if there is none."""
    overrides: tuple[str, ...] = ()
    """Job keys of FusionLLM."""
    whole: bool = True
    """Whether every element is sent, so that the losses do not depend on the link."""


SIDES = {
    "torch": Side("PyTorch, f32", wire="f32"),
    "torch-bf16": Side("PyTorch, bf16 on the wire", wire="bf16"),
    "dense": Side("FusionLLM, dense f32", overrides=("compression.policy=dense",)),
    "default": Side("FusionLLM, defaults", whole=False),
}


def run_side(side: Side, net: Net, setting: Setting, folder: Path, fusionllm: Path, window: tuple[int, int]) -> Run:
    """One run; a failure is in the result."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        if side.wire:
            return run_pytorch(side.wire, net, setting, folder, window)
        return run_fusionllm(side, net, setting, folder, fusionllm, window)
    except RunFailed as failure:
        return Run(error=str(failure))


def run_pytorch(wire: str, net: Net, setting: Setting, folder: Path, window: tuple[int, int]) -> Run:
    """A process a stage, joined by gloo."""
    setting.save(folder / "setting.json")
    log = folder / "steps.jsonl"
    env = os.environ | {
        "MASTER_ADDR": address(0),
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": "1",
    }
    with Processes(folder) as processes:
        for rank in range(setting.stages):
            words = [str(folder / "setting.json"), "--rank", str(rank), "--log", str(log), "--wire", wire]
            command = net.on(node_name(rank), [sys.executable, "-m", "versus.stage", *words])
            processes.start(f"stage-{rank}", command, env, PEERS)
        sent = processes.follow(net, lambda: log, f"stage-{setting.stages - 1}", window)
        return Run(read_steps(log), sent, processes.memory)


def run_fusionllm(
    side: Side, net: Net, setting: Setting, folder: Path, binary: Path, window: tuple[int, int]
) -> Run:
    """A broker and a CompNode a stage; what they measured of their device is kept for the next run."""
    state, runs = folder / "broker", folder / "runs"
    job = folder / "job.toml"
    job.write_text(job_text(setting))
    env = dict(os.environ)
    with Processes(folder) as processes:
        listen = [str(binary), "broker", "--json", "--bind", "10.77.0.1:7710", "--state", str(state)]
        processes.start("broker", net.on("broker", [*listen, "--runs", str(runs)]), env)
        processes.await_("the broker's ticket", lambda: "\n" in processes.output("broker"))
        ticket = json.loads(processes.output("broker").splitlines()[0])["ticket"]
        for stage in range(setting.stages):
            name = f"stage-{stage}"
            kept = folder.parent / f"state-{stage}-of-{setting.stages}"
            join = [str(binary), "join", ticket, "--name", name, "--bind", f"{address(stage)}:7711"]
            limits = ["--threads", "1", "--memory-gb", str(MEMORY_GB), "--device", "cpu", "--state", str(kept)]
            processes.start(name, net.on(node_name(stage), [*join, *limits]), env)
            processes.await_(f"{name} to join", lambda n=stage: joined(net, binary, state) > n)
        submit = [str(binary), "submit", str(job), "--follow", "--json", "--state", str(state)]
        for override in side.overrides:
            submit += ["--set", override]
        processes.start("submit", net.on("broker", submit), env)
        sent = processes.follow(net, lambda: next(runs.glob("*/metrics.jsonl"), None), "submit", window)
        memory = {name: peak for name, peak in processes.memory.items() if name != "submit"}
        steps = read_steps(next(runs.glob("*/metrics.jsonl")))
        codecs = {f"{short(link['from'])}>{short(link['to'])}": link["codec"] for link in steps[0]["links"]}
        return Run(steps, sent, memory, codecs)


def joined(net: Net, binary: Path, state: Path) -> int:
    """CompNodes that the broker knows."""
    command = net.on("broker", [str(binary), "status", "--json", "--state", str(state)])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return len(json.loads(done.stdout)["compnodes"]) if done.returncode == 0 else 0


def short(name: str) -> str:
    """`stage-0` as `0`."""
    return name.removeprefix("stage-")


def job_text(setting: Setting) -> str:
    """FusionLLM's job file."""
    shape, recipe = setting.shape, setting.recipe
    ends = [f"h.{setting.blocks(s)[-1]}.add_2" for s in range(setting.stages - 1)] + ["loss"]
    stages = ", ".join(f'{{ compnode = {s}, last_op = "{end}" }}' for s, end in enumerate(ends))
    return f"""\
name = "side-by-side"

[model]
path = {json.dumps(str(setting.model))}

[data]
path = {json.dumps(str(setting.corpus))}
tokenizer = "bytes"
seq_len = {shape.seq}
eval_fraction = {recipe.eval_fraction}

[train]
steps = {setting.steps}
batch = {shape.batch}
micro_batches = {shape.micro_batches}
lr = {recipe.lr}
warmup = {recipe.warmup}
schedule = "constant"
betas = [{recipe.beta1}, {recipe.beta2}]
epsilon = {recipe.epsilon}
weight_decay = {recipe.weight_decay}
clip = 0
seed = {recipe.seed}
eval_every = {setting.eval_every}
eval_batches = {recipe.eval_batches}

[placement]
pipeline = "1f1b"
stages = [{stages}]
"""
