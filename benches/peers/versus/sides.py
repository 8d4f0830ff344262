"""How each side runs one setting on a network that is up."""

from __future__ import annotations

import json
import os
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


class CompNodes:
    """A broker and a CompNode a stage, which measure machines and links once and then take one job after the other."""

    def __init__(self, net: Net, binary: Path, stages: int, folder: Path) -> None:
        self.net, self.binary, self.folder = net, binary, folder
        self.state = folder / "broker"
        self.processes = Processes(folder)
        try:
            self._start(stages)
        except BaseException:
            self.close()
            raise

    def _start(self, stages: int) -> None:
        env, binary, processes = dict(os.environ), str(self.binary), self.processes
        listen = [binary, "broker", "--json", "--show-ticket", "--bind", "10.77.0.1:7710", "--state", str(self.state)]
        processes.start("broker", self.net.on("broker", [*listen, "--runs", str(self.folder / "runs")]), env)
        processes.await_("the broker's ticket", lambda: "\n" in processes.output("broker"))
        ticket = json.loads(processes.output("broker").splitlines()[0])["ticket"]
        for stage in range(stages):
            name = f"stage-{stage}"
            kept = self.folder.parents[1] / f"state-{stage}-of-{stages}"
            join = [binary, "join", ticket, "--name", name, "--bind", f"{address(stage)}:7711", "--data", "/"]
            limits = ["--threads", "1", "--memory-gb", str(MEMORY_GB), "--device", "cpu", "--state", str(kept)]
            processes.start(name, self.net.on(node_name(stage), [*join, *limits]), env)
            processes.await_(f"{name} to join", lambda n=stage: joined(self.net, self.binary, self.state) > n)

    def run(self, side: Side, setting: Setting, window: tuple[int, int]) -> Run:
        """One job."""
        job = self.folder / "job.toml"
        job.write_text(job_text(setting))
        submit = [str(self.binary), "submit", str(job), "--follow", "--json", "--state", str(self.state)]
        for override in side.overrides:
            submit += ["--set", override]
        self.processes.forget_peaks()
        self.processes.start("submit", self.net.on("broker", submit), dict(os.environ))
        sent = self.processes.follow(self.net, self._log, "submit", window)
        del self.processes.running["submit"]
        memory = {name: peak for name, peak in self.processes.memory.items() if name != "submit"}
        log = self._log()
        if log is None:
            raise RunFailed("the job has no run directory")
        steps = read_steps(log)
        codecs = {f"{short(link['from'])}>{short(link['to'])}": link["codec"] for link in steps[0]["links"]}
        return Run(steps, sent, memory, codecs)

    def _log(self) -> Path | None:
        """The steps of the job that was submitted last."""
        printed = self.processes.output("submit").split("\n")
        return Path(json.loads(printed[0])["run_dir"]) / "metrics.jsonl" if len(printed) > 1 else None

    def close(self) -> None:
        """Ends them all."""
        self.processes.close()


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
