"""The markdown table: step times, losses, bytes and memory of every side, and how the goals fared."""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from versus.net import LINKS
from versus.setting import Shape
from versus.sides import SIDES
from versus.watch import Run

Key = tuple[str, int, str]
CLOSE = 1e-3
"""Evaluation losses that differ by less, in nats, count as the same."""
LAST_STEPS = 10
GOALS = [
    ("unlimited", "dense", "step", 1.0),
    ("100mbps-50ms", "dense", "step", 1.1),
    ("8mbps-100ms", "dense", "step", 1.1),
    ("100mbps-50ms", "default", "loss", 5.0),
    ("8mbps-100ms", "default", "loss", 9.4),
]


@dataclass(frozen=True)
class Cell:
    """All runs of one side on one network."""

    runs: list[Run]
    discard: int

    @property
    def step_s(self) -> float:
        """Median step of all runs, the first ones of each left out."""
        return statistics.median(s["step_s"] for run in self.runs for s in run.steps[self.discard :])

    @property
    def mean_s(self) -> float:
        """Mean step of all runs, the first ones of each left out: stalls count."""
        return statistics.mean(s["step_s"] for run in self.runs for s in run.steps[self.discard :])

    @property
    def slowest_s(self) -> float:
        """The slowest step of all runs, the first ones of each left out."""
        return max(s["step_s"] for run in self.runs for s in run.steps[self.discard :])

    @property
    def spread(self) -> tuple[float, float]:
        """Least and largest of the runs' medians."""
        medians = [statistics.median(s["step_s"] for s in run.steps[self.discard :]) for run in self.runs]
        return min(medians), max(medians)

    @property
    def evals(self) -> list[tuple[int, float]]:
        """Step and evaluation loss, of the first run; further runs differ by rounding alone."""
        return [(s["step"], s["eval_loss"]) for s in self.runs[0].steps if s.get("eval_loss") is not None]

    @property
    def eval_loss(self) -> float:
        """The last evaluation's."""
        return self.evals[-1][1]

    def losses_at(self, step: int) -> tuple[float, float] | None:
        """Mean training loss of the last steps up to `step`, and the evaluation loss after it."""
        found = [loss for at, loss in self.evals if at == step]
        last = [s["loss"] for s in self.runs[0].steps[:step]][-LAST_STEPS:]
        return (statistics.mean(last), found[0]) if found else None

    def steps_to(self, loss: float) -> float | None:
        """Steps until the evaluation loss is no higher, by a straight line between evaluations."""
        before: tuple[int, float] | None = None
        for step, value in self.evals:
            if value <= loss:
                if before is None:
                    return float(step)
                return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
            if value <= loss + CLOSE:
                return float(step)
            before = step, value
        return None

    @property
    def bytes(self) -> dict[str, float]:
        """Bytes of a step by direction, the median of the runs."""
        return {way: statistics.median(run.bytes[way] for run in self.runs) for way in self.runs[0].bytes}

    @property
    def memory(self) -> dict[str, int]:
        """Peak resident bytes by process, the largest of the runs."""
        names = sorted(self.runs[0].memory, key=lambda name: (name == "broker", name))
        return {name: max(run.memory.get(name, 0) for run in self.runs) for name in names}


class Cells:
    """The whole table."""

    def __init__(self, cells: dict[Key, Cell], steps: int, tokens: int) -> None:
        self.cells, self.steps, self.tokens = cells, steps, tokens

    def losses(self, key: Key) -> tuple[float, float, bool] | None:
        """Training and evaluation loss after all steps, and whether another link's run of the same side gave them."""
        own = self.cells[key].losses_at(self.steps)
        if own:
            return *own, False
        if not SIDES[key[2]].whole:
            return None
        for (_, stages, name), cell in self.cells.items():
            if (stages, name) == key[1:] and (found := cell.losses_at(self.steps)):
                return *found, True
        return None

    def step_ratio(self, key: Key) -> float | None:
        """PyTorch's step time over this one's."""
        torch_cell = self.cells.get((key[0], key[1], "torch"))
        return torch_cell.step_s / self.cells[key].step_s if torch_cell else None

    def to_loss(self, key: Key) -> tuple[float, float] | None:
        """Steps, and seconds by the mean step, to the evaluation loss that PyTorch has after all steps."""
        torch_key = (key[0], key[1], "torch")
        target = self.losses(torch_key) if torch_key in self.cells else None
        if not target:
            return None
        cell = self.cells[key]
        steps = cell.steps_to(target[1])
        if SIDES[key[2]].whole:
            own = self.losses(key)
            steps = float(self.steps) if own and own[1] <= target[1] + CLOSE else None
        return (steps, steps * cell.mean_s) if steps is not None else None

    def parity(self) -> float | None:
        """Largest difference of a step's training loss between FusionLLM dense and PyTorch f32, in nats."""
        pairs = [
            (ours["loss"], theirs["loss"])
            for key, cell in self.cells.items()
            if key[2] == "dense" and (other := self.cells.get((key[0], key[1], "torch")))
            for ours, theirs in zip(cell.runs[0].steps, other.runs[0].steps, strict=False)
        ]
        return max((abs(ours - theirs) for ours, theirs in pairs), default=None)

    def loss_ratio(self, key: Key) -> float | None:
        """PyTorch's time to its loss over this side's time to the same."""
        ours, theirs = self.to_loss(key), self.to_loss((key[0], key[1], "torch"))
        return theirs[1] / ours[1] if ours and theirs else None


def write_table(cells: dict[Key, Cell], steps: int, shape: Shape, fusionllm: Path) -> str:
    """Everything, as markdown."""
    table = Cells(cells, steps, shape.tokens)
    rows = [parts(table) for parts in (parity_line, main_rows, goal_rows, byte_rows, memory_rows)]
    return "\n".join([heading(shape, fusionllm), *rows])


def heading(shape: Shape, fusionllm: Path) -> str:
    """What was measured on what."""
    version = subprocess.run([fusionllm, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    return (
        f"GPT-2 with {shape.layers} blocks, width {shape.width}, {shape.heads} heads, {shape.vocab} tokens; "
        f"{shape.batch} sequences of {shape.seq} bytes a step in {shape.micro_batches} micro-batches, 1F1B. "
        f"{version}; PyTorch {torch.__version__}, gloo over TCP with {control}. "
        f"{os.cpu_count()} cores, one thread a process.\n"
    )


def parity_line(table: Cells) -> str:
    """Whether both sides do the same training."""
    parity = table.parity()
    if parity is None:
        return ""
    return f"Uncompressed f32 training losses of both sides differ by at most {parity:.1e} nats in any step.\n"


def main_rows(table: Cells) -> str:
    """Speed and loss."""
    steps = table.steps
    lines = [
        f"| link | stages | side | step, median | runs' medians | mean | slowest | tokens/s | × PyTorch f32 "
        "| MB a step, all links | training loss "
        f"| evaluation loss after {steps} steps | steps to PyTorch's | seconds to it | × |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, cell in table.cells.items():
        losses, reached = table.losses(key), table.to_loss(key)
        same = " ¹" if losses and losses[2] else ""
        low, high = cell.spread
        words = [
            *names(key), f"{cell.step_s:.3f} s", f"{low:.3f}–{high:.3f}",
            f"{cell.mean_s:.3f}", f"{cell.slowest_s:.2f}", f"{table.tokens / cell.step_s:.0f}",
            times(table.step_ratio(key)), f"{sum(cell.bytes.values()) / 1e6:.2f}",
            f"{losses[0]:.4f}{same}" if losses else "–", f"{losses[1]:.4f}{same}" if losses else "–",
            f"{reached[0]:.1f}" if reached else "not reached", f"{reached[1]:.1f}" if reached else "–",
            times(table.loss_ratio(key)),
        ]  # fmt: skip
        lines.append(row(words))
    note = (
        "\n¹ of the same side's run on a faster link: it sends every element, so its losses do not depend on the link, "
        "and its run here was\n"
        "shorter.\n"
    )
    return "\n".join(lines) + "\n" + note


def goal_rows(table: Cells) -> str:
    """What was aimed at."""
    lines = ["| goal | stages | aim | measured | |", "|---|---|---|---|---|"]
    for link, name, kind, aim in GOALS:
        ratio_of: Callable[[Key], float | None] = table.step_ratio if kind == "step" else table.loss_ratio
        what = "step time" if kind == "step" else "time to the same evaluation loss"
        for key in table.cells:
            if (key[0], key[2]) == (link, name):
                ratio = ratio_of(key)
                verdict = "–" if ratio is None else "met" if ratio >= aim else "missed"
                label = f"{LINKS[link].label}, {SIDES[name].label}: {what}"
                lines.append(row([label, str(key[1]), f"{aim}×", times(ratio), verdict]))
    return "\n".join(lines) + "\n"


def byte_rows(table: Cells) -> str:
    """Bytes of each direction that carried more than a trifle."""
    lines = [
        "| link | stages | side | kB a step by direction (stage>stage), with headers | codecs |",
        "|---|---|---|---|---|",
    ]
    for key, cell in table.cells.items():
        ways = {way: count for way, count in cell.bytes.items() if "broker" not in way and count > 0}
        broker = sum(count for way, count in cell.bytes.items() if "broker" in way)
        listed = [f"{way} {count / 1e3:.0f}" for way, count in sorted(ways.items()) if count >= 500]
        if broker >= 500:
            listed.append(f"broker {broker / 1e3:.0f}")
        codecs = ", ".join(f"{way} {codec}" for way, codec in sorted(cell.runs[0].codecs.items()))
        lines.append(row([*names(key), ", ".join(listed), codecs]))
    return "\n".join(lines) + "\n"


def memory_rows(table: Cells) -> str:
    """Peaks of each process."""
    lines = ["| link | stages | side | peak resident MB by process |", "|---|---|---|---|"]
    for key, cell in table.cells.items():
        peaks = ", ".join(f"{name} {peak / 1e6:.0f}" for name, peak in cell.memory.items())
        lines.append(row([*names(key), peaks]))
    return "\n".join(lines) + "\n"


def names(key: Key) -> list[str]:
    """The first columns of every table."""
    return [LINKS[key[0]].label, str(key[1]), SIDES[key[2]].label]


def times(ratio: float | None) -> str:
    """A ratio."""
    return "–" if ratio is None else f"{ratio:.2f}"


def row(words: list[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(words)} |"
