"""Child processes with a time limit, and the files that results go to."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import time

# After it was asked to end, a process has so many seconds before it is killed.
GRACE_S = 5.0
ERROR_CHARS = 600


class OutOfTime(Exception):
    """No time is left for what comes next."""


class Results:
    """Records, one JSON object a line, each written at once, and a log of what the children said."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.records = []
        self.lines = open(self.folder / "results.jsonl", "w")
        self.log = open(self.folder / "log.txt", "w", errors="replace")

    def add(self, part, name, **values):
        record = {"part": part, "name": name, **values}
        self.records.append(record)
        self.lines.write(json.dumps(record) + "\n")
        self.lines.flush()
        print(brief(record), flush=True)
        return record

    def note(self, title, text):
        """Adds to the log what somebody said, without the lines of steps, which are many."""
        text = "\n".join(line for line in text.splitlines() if '"event":"step"' not in line)
        self.log.write(f"==== {title}\n{text.rstrip()}\n")
        self.log.flush()

    def find(self, part, **wanted):
        """The first record of a part with these values, or an empty one."""
        matches = (r for r in self.records if r["part"] == part and all(r.get(k) == v for k, v in wanted.items()))
        return next(matches, {})


def brief(record):
    """A record in one line of the screen."""
    left_out = ("part", "name", "losses", "phases")
    values = ", ".join(f"{k} {shown(v)}" for k, v in record.items() if k not in left_out and v is not None)
    return f"[{record['part']}] {record['name']}: {values}"[:400]


def shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("\n", " ")


class Clock:
    """How much time the current part may still take, its own limit and that of the whole check heeded."""

    def __init__(self, total_s, patience):
        self.patience = patience
        self.end = time.monotonic() + total_s * patience
        self.part_end = self.end

    def begin(self, limit_s):
        self.part_end = min(self.end, time.monotonic() + limit_s * self.patience)

    def left(self):
        return self.part_end - time.monotonic()

    def limit(self, seconds):
        """The time for a child that should take no more than `seconds`."""
        limit = min(seconds * self.patience, self.left())
        if limit < 1:
            raise OutOfTime("the part's time is used up")
        return limit


class Child:
    """A process in a group of its own, whose output goes to a file."""

    def __init__(self, command, output, env=None, cwd=None):
        self.command, self.output = [str(word) for word in command], pathlib.Path(output)
        self.began, self.began_unix = time.monotonic(), time.time()
        with open(self.output, "wb") as file:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                process_group=0,
            )

    def age(self):
        return time.monotonic() - self.began

    def ended(self):
        return self.process.poll() is not None

    def wait(self, seconds):
        """Whether it ended in time."""
        try:
            self.process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def interrupt(self):
        """Asks it to end as Ctrl-C does, and kills it if it does not."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGINT)
        if not self.wait(GRACE_S):
            self.kill()

    def kill(self):
        """Kills it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait(5)

    def said(self):
        return self.output.read_text(errors="replace")


class Runner:
    """Runs children for the parts of the check."""

    def __init__(self, results, clock, work):
        self.results, self.clock, self.work = results, clock, pathlib.Path(work)
        self.count = 0

    @contextlib.contextmanager
    def child(self, title, command, **options):
        """A child that is gone, and whose output is in the log, when the block is left."""
        self.count += 1
        child = Child(command, self.work / f"{self.count}.out", **options)
        try:
            yield child
        finally:
            child.kill()
            self.results.note(f"{title}: {' '.join(child.command)}, {child.age():.1f} s", child.said())

    def run(self, title, command, limit_s, **options):
        """The output of a command that must end well in time."""
        limit = self.clock.limit(limit_s)
        with self.child(title, command, **options) as child:
            if not child.wait(limit):
                raise RuntimeError(f"killed after {limit:.0f} s: {tail(child.said())}")
            if child.process.returncode:
                raise RuntimeError(f"exit status {child.process.returncode}: {tail(child.said())}")
            return child.said()


def tail(text):
    return text.strip()[-ERROR_CHARS:]
