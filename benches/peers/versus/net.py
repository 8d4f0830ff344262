"""The emulated network of one cell of the table: a broker's namespace and one for each stage, whose links are alike."""

from __future__ import annotations

import json
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

NAME = "sidebyside"
INTERFACE = "wan0"
LEAST_STEPS = 7
SLOW_MBIT_PER_S = 200
BROKER_MBIT_PER_S = 1000
"""Fast, so that weights at the start and checkpoints at the end, which are not counted, take no time."""


class RunFailed(Exception):
    """A run, or what it needs, that did not work; the text is for the user."""


@dataclass(frozen=True)
class Link:
    """What every pair of stages is joined by."""

    label: str
    mbit_per_s: float
    round_trip_ms: float
    share: float
    """Share of the steps that runs with whole messages take: their losses do not depend on the link."""

    def steps(self, steps: int) -> int:
        """Steps of a run that sends every element."""
        return max(round(steps * self.share), LEAST_STEPS)

    def rounds(self, rounds: int) -> int:
        """Rounds that are worth their time: on slow links the wire decides, and one tells all."""
        return rounds if self.mbit_per_s > SLOW_MBIT_PER_S else 1


LINKS = {
    "unlimited": Link("unlimited", 100_000, 0, 1.0),
    "1gbps-2ms": Link("1 Gbit/s, 2 ms", 1000, 2, 0.5),
    "100mbps-50ms": Link("100 Mbit/s, 50 ms", 100, 50, 0.5),
    "8mbps-100ms": Link("8 Mbit/s, 100 ms", 8, 100, 0.0),
}


class Net:
    """A network that is up for as long as the `with` block runs."""

    def __init__(self, wan_emu: Path, link: Link, stages: int, folder: Path) -> None:
        self.wan_emu = wan_emu
        self.file = folder / "net.toml"
        self.file.write_text(
            f'name = "{NAME}"\n[[node]]\nname = "broker"\n[[node]]\nname = "n"\ncount = {stages}\n'
            f'[[link]]\nfrom = "*"\nto = "*"\n'
            f"latency_ms = {link.round_trip_ms / 2}\nmbit_per_s = {link.mbit_per_s}\n"
            f'[[link]]\nfrom = "broker"\nto = "*"\n'
            f"latency_ms = {link.round_trip_ms / 2}\nmbit_per_s = {max(link.mbit_per_s, BROKER_MBIT_PER_S)}\n"
        )

    def __enter__(self) -> Net:
        done = subprocess.run([self.wan_emu, "up", self.file], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunFailed(f"wan-emu up: {(done.stderr or done.stdout).strip()}")
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        subprocess.run([self.wan_emu, "down", "--net", NAME], capture_output=True, check=False)

    def on(self, node: str, command: list[str]) -> list[str]:
        """The command line that runs `command` on a node; its process becomes the command's."""
        return [str(self.wan_emu), "exec", "--net", NAME, node, "--", *command]

    def counters(self) -> dict[str, int]:
        """IP bytes, headers included, that each direction has delivered so far, as `0>1` or `0>broker`."""
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(f"/run/wan-emu/{NAME}.sock")
            control.sendall(b'{"do": "status"}\n')
            answer = json.loads(control.makefile().readline())
        links = answer["status"]["links"]
        return {f"{short(link['from'])}>{short(link['to'])}": link["counters"]["bytes"] for link in links}


def address(node: int) -> str:
    """A stage's address; the broker has the first one."""
    return f"10.77.0.{node + 2}"


def node_name(stage: int) -> str:
    """A stage's node."""
    return f"n-{stage}"


def short(name: str) -> str:
    """`n-0` as `0`."""
    return name.removeprefix("n-")
