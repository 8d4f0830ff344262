"""One run's processes: started, watched from outside in the same way for both sides, and ended whatever happens."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from versus.net import Net, RunFailed

TICK_S = 0.01
MEMORY_EVERY = 20
PATIENCE_S = 900.0
GRACE_S = 8.0


@dataclass
class Run:
    """What came of a run; `bytes` are those of one step, by direction."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    bytes: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    codecs: dict[str, str] = field(default_factory=dict)


class Processes:
    """The processes of one run, by name; leaving the `with` block ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.memory: dict[str, int] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends them: Ctrl-C first, then by force."""
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + GRACE_S
        for process in self.running.values():
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name: str, command: list[str], env: dict[str, str], cwd: Path | None = None) -> None:
        """Starts a process; its output goes to NAME.out and NAME.err."""
        with (self.folder / f"{name}.out").open("wb") as out, (self.folder / f"{name}.err").open("wb") as err:
            options: dict[str, Any] = {"env": env, "cwd": cwd, "stdin": subprocess.DEVNULL, "start_new_session": True}
            self.running[name] = subprocess.Popen(command, stdout=out, stderr=err, **options)

    def output(self, name: str) -> str:
        """What a process has printed so far."""
        return (self.folder / f"{name}.out").read_text(errors="replace")

    def check(self) -> None:
        """Fails if a process has failed."""
        for name, process in self.running.items():
            if process.poll():
                lines = (self.folder / f"{name}.err").read_text(errors="replace").strip().splitlines()
                raise RunFailed(f"{name} ended with {process.returncode}: {' | '.join(lines[-4:])}")

    def await_(self, what: str, ready: Callable[[], bool], patience_s: float = 60.0) -> None:
        """Waits until something is so."""
        deadline = time.monotonic() + patience_s
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise RunFailed(f"waited {patience_s:.0f} s in vain for {what}")
            time.sleep(0.05)

    def forget_peaks(self) -> None:
        """Lets the peaks of memory begin anew from what is resident now."""
        self.memory.clear()
        for process in self.running.values():
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")

    def sample_memory(self) -> None:
        """Reads the peak resident bytes (VmHWM) of every process."""
        for name, process in self.running.items():
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                continue
            for line in status.splitlines():
                if line.startswith("VmHWM:"):
                    self.memory[name] = 1024 * int(line.split()[1])

    def follow(self, net: Net, log: Callable[[], Path | None], ends: str, window: tuple[int, int]) -> dict[str, float]:
        """Watches until process `ends` has ended; the bytes of a step, out of the steps `window[0] + 1 ..= window[1]`.

        Counters are read when the line of a step appears in the log, which both sides write as soon as a step is done.
        """
        marks: dict[int, dict[str, int]] = {}
        deadline = time.monotonic() + PATIENCE_S
        tick = 0
        while self.running[ends].poll() is None:
            done = lines_in(log())
            for mark in window:
                if done >= mark and mark not in marks:
                    marks[mark] = net.counters()
            if tick % MEMORY_EVERY == 0:
                self.sample_memory()
                self.check()
            if time.monotonic() > deadline:
                raise RunFailed(f"not done after {PATIENCE_S:.0f} s")
            tick += 1
            time.sleep(TICK_S)
        self.check()
        if len(marks) < 2:
            raise RunFailed("ended before its bytes could be counted: more steps are needed")
        first, last = (marks[mark] for mark in window)
        return {way: (last[way] - first[way]) / (window[1] - window[0]) for way in first}


def lines_in(log: Path | None) -> int:
    """Whole lines of a file."""
    try:
        return log.read_bytes().count(b"\n") if log else 0
    except FileNotFoundError:
        return 0


def read_steps(log: Path) -> list[dict[str, Any]]:
    """The steps of a log."""
    return [json.loads(line) for line in log.read_text().splitlines()]
