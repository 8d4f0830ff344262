"""Runs of `fusionllm train`, and what their metrics say."""

import dataclasses
import json
import math
import random
import shutil
import statistics
import subprocess
import time

POLL_S = 0.02
# Steps before measuring: kernels are loaded, clocks go up, buffers are allocated.
SKIPPED = 20
# Lines of metrics have a time to the millisecond; a block of steps is at least so long that this does not matter.
BLOCK_S = 0.2
# From this vocabulary on a text is of numbered words, so that all entries of the table are met equally often.
WORDS_FROM = 1000

JOB = """name = "{name}"
[model]
name = "gpt2"
vocab_size = {vocab}
n_layer = {layers}
n_embd = {width}
n_head = {heads}
[data]
path = "{text}"
tokenizer = "{tokenizer}"
seq_len = {seq}
[train]
batch = {batch}
micro_batches = {micro_batches}
eval_batches = 1
[compression]
policy = "dense"
[survive]
enabled = false
"""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and the batch of a step."""

    name: str
    layers: int
    width: int
    heads: int
    vocab: int
    seq: int
    batch: int
    micro_batches: int = 1

    def tokens(self):
        return self.batch * self.seq


@dataclasses.dataclass
class Run:
    """What a training run left behind."""

    metrics: list
    began_unix: float
    phases: dict
    memory_mib: int | None = None

    def losses(self):
        """The loss of each step; what is no number is written as none."""
        return [math.nan if line["loss"] is None else line["loss"] for line in self.metrics]

    def first_step(self):
        """Seconds of the first step alone, and from the start of the command to its end."""
        first = self.metrics[0]
        return {"first_step_s": first["step_s"], "until_first_step_s": first["unix_s"] - self.began_unix}

    def speed(self):
        """The step's time without the first steps: the median block by the clock, and the median as reported."""
        lines = self.metrics[min(SKIPPED, len(self.metrics) // 2) :]
        if len(lines) < 3:
            raise RuntimeError(f"{len(self.metrics)} steps are too few to measure")
        reported = statistics.median(line["step_s"] for line in lines[1:])
        size = min(math.ceil(BLOCK_S / reported), len(lines) - 1)
        marks = [line["unix_s"] for line in lines[::size]]
        blocks = [(after - before) / size for before, after in zip(marks, marks[1:])]
        step_s = statistics.median(blocks)
        return {
            "step_s": step_s,
            "step_s_min": min(blocks),
            "step_s_max": max(blocks),
            "step_s_reported": reported,
            "blocks": len(blocks),
            "steps": len(lines) - 1,
            "tokens_per_s": lines[0]["tokens"] / step_s,
        }


class Trainer:
    """Starts training runs in a work folder, which has their texts and job files."""

    def __init__(self, runner, binary, device):
        self.runner, self.binary, self.device = runner, binary, device
        self.work = runner.work

    def job(self, shape, text=None):
        """The job file of a shape."""
        path = self.work / f"{shape.name}.toml"
        if not path.exists():
            words = text is None and shape.vocab >= WORDS_FROM
            values = dataclasses.asdict(shape) | {
                "text": text or (self.words(shape.vocab) if words else self.letters()),
                "tokenizer": self.tokenizer(shape.vocab) if words else "bytes",
            }
            path.write_text(JOB.format(**values))
        return path

    def letters(self):
        """A text with some order in it: lines of made-up words that come again."""
        path = self.work / "letters.txt"
        if not path.exists():
            draw = random.Random(1)
            words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(300)]
            path.write_text("\n".join(" ".join(draw.choices(words, k=12)) for _ in range(4000)))
        return path

    def words(self, vocab):
        """A text of random words, each of which is one entry of the vocabulary."""
        path = self.work / f"words-{vocab}.txt"
        if not path.exists():
            draw = random.Random(2)
            path.write_text("\n".join(" ".join(f"w{draw.randrange(vocab)}" for _ in range(16)) for _ in range(12500)))
        return path

    def tokenizer(self, vocab):
        path = self.work / f"tokenizer-{vocab}.json"
        if not path.exists():
            model = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(vocab)}, "unk_token": "w0"}
            path.write_text(json.dumps({"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}))
        return path

    def cluster(self):
        """A cluster file of one device, by which a job is placed without measuring."""
        path = self.work / "cluster.toml"
        path.write_text('[[device]]\nname = "card"\nflop_per_s = 1e13\n')
        return path

    def caches(self, name):
        """Folders for compiled kernels and for what was measured of the device."""
        return {
            "FUSIONLLM_CUDA_CACHE": str(self.work / name / "kernels"),
            "XDG_STATE_HOME": str(self.work / name / "state"),
        }

    def train(self, title, job, steps, limit_s, *, compnodes=1, device=None, sets=(), env=None, enough=None, prefix=()):
        """Trains, and gives what came of it; with `enough` until that says so of the metrics, else all steps."""
        out = self.work / "run"
        shutil.rmtree(out, ignore_errors=True)
        command = [*prefix, self.binary, "train", job, "--out", out, "--json", "--compnodes", compnodes]
        command += ["--device", device or self.device]
        for value in [f"train.steps={steps}", *sets]:
            command += ["--set", value]
        env = self.caches("warm") | (env or {})
        limit = self.runner.clock.limit(limit_s)
        with self.runner.child(title, command, env=env) as child:
            run = follow(child, out / "metrics.jsonl", limit, enough)
            if child.ended():
                if child.process.returncode:
                    raise RuntimeError(f"exit status {child.process.returncode}: {last_words(child.said())}")
            elif enough and run.metrics:
                run.memory_mib = memory_used(self.runner, self.device)
                child.interrupt()
            else:
                raise RuntimeError(f"killed after {limit:.0f} s and {len(run.metrics)} steps: {last_words(child.said())}")
        shutil.rmtree(out, ignore_errors=True)
        return run


def follow(child, path, limit, enough):
    """Reads the metrics of a run while it goes on, until it ends, has done enough, or its time is up."""
    run, rest, offset, told = Run([], child.began_unix, {}), "", 0, 0
    while True:
        ended = child.ended()
        if path.exists():
            with open(path) as file:
                file.seek(offset)
                rest += file.read()
                offset = file.tell()
            *lines, rest = rest.split("\n")
            run.metrics += [json.loads(line) for line in lines if line]
        if not run.metrics:
            told = note_phases(run, child, told)
        if ended or child.age() > limit or (enough and enough(run.metrics)):
            return run
        time.sleep(POLL_S)


def note_phases(run, child, told):
    """Notes when the job's state changed, by the lines it has printed; gives how many these are."""
    *lines, _ = child.said().split("\n")
    for line in lines[told:]:
        if '"event":"state"' in line:
            state = json.loads(line)["state"]
            name = state["state"] + (": " + state["reason"] if "reason" in state else "")
            run.phases.setdefault(name, round(child.age(), 3))
    return len(lines)


def measured_enough(least_steps, least_s):
    """Enough to measure by: so many steps after the first ones, and so many seconds."""

    def enough(metrics):
        lines = metrics[SKIPPED:]
        return len(lines) > least_steps and lines[-1]["unix_s"] - lines[0]["unix_s"] >= least_s

    return enough


def one_step(metrics):
    return bool(metrics)


def memory_used(runner, device):
    """MiB that are taken on the GPU, by all processes; None where it cannot be told."""
    if not device.startswith("cuda"):
        return None
    card = device.partition(":")[2] or "0"
    query = ["nvidia-smi", f"--id={card}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(query, capture_output=True, text=True, timeout=5).stdout.split()[0])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None


def last_words(text):
    """What a run said last that is no event: its error, if it told one."""
    lines = [line for line in text.splitlines() if not line.startswith("{")]
    return "\n".join(lines)[-600:]
