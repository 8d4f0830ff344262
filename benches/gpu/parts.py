"""The parts of the check. Each adds its records as it goes, and says by raising that it cannot go on."""

import glob
import json
import os
import pathlib
import re
import shutil
import sys
import traceback

from harness import OutOfTime
from training import Shape, measured_enough, one_step

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PYTORCH = REPOSITORY / "benches" / "peers" / "pytorch_single.py"
PRECISIONS = ("f32", "tf32", "bf16")

# How far a loss may be from the CPU's in f32, in nats.
LOSS_LIMITS = {"f32": 1e-4, "tf32": 2e-3, "bf16": 2e-2}
# How much worse the losses of bf16 may be than those of f32 after some hundred steps of text, in nats.
TEXT_LIMIT = 2e-2

SHAPES = {
    "41M": Shape("41M", layers=4, width=768, heads=12, vocab=8192, seq=256, batch=4),
    "124M": Shape("124M", layers=12, width=768, heads=12, vocab=50257, seq=512, batch=4),
    "124M-32x1024": Shape("124M-32x1024", layers=12, width=768, heads=12, vocab=50257, seq=1024, batch=32),
}
CUT_SPEED = Shape("cut-speed", layers=12, width=768, heads=12, vocab=50257, seq=512, batch=16, micro_batches=4)
TEXT = Shape("text", layers=6, width=384, heads=6, vocab=256, seq=256, batch=32)

# The same where no GPU is: to try the script itself.
TINY_SHAPES = {
    "41M": Shape("41M", layers=2, width=64, heads=1, vocab=1024, seq=64, batch=4),
    "124M": Shape("124M", layers=3, width=64, heads=1, vocab=1500, seq=64, batch=4),
    "124M-32x1024": Shape("124M-32x1024", layers=3, width=64, heads=1, vocab=1500, seq=128, batch=8),
}
TINY_CUT_SPEED = Shape("cut-speed", layers=2, width=64, heads=1, vocab=1500, seq=64, batch=8, micro_batches=4)
TINY_TEXT = Shape("text", layers=2, width=64, heads=1, vocab=256, seq=64, batch=8)

PARITY = Shape("parity", layers=2, width=128, heads=2, vocab=256, seq=128, batch=8, micro_batches=2)
# A vocabulary and a length that are multiples of nothing, and dropout.
ODD = Shape("odd", layers=2, width=128, heads=2, vocab=1003, seq=101, batch=6, micro_batches=2)
SANITIZED = Shape("sanitized", layers=1, width=128, heads=2, vocab=256, seq=64, batch=2, micro_batches=2)

EAGER = [
    ("41M", "bf16"),
    ("124M", "bf16"),
    ("124M", "f32"),
    ("41M", "f32"),
    ("124M", "tf32"),
    ("41M", "tf32"),
    ("124M-32x1024", "bf16"),
]
COMPILED = [("41M", "bf16", "default"), ("124M", "bf16", "default"), ("124M-32x1024", "bf16", "default")]
MORE = [
    ("41M", "bf16", "reduce-overhead"),
    ("124M", "bf16", "reduce-overhead"),
    ("124M", "tf32", "default"),
    ("41M", "tf32", "default"),
    ("124M", "f32", "default"),
]


class Check:
    """What the parts share."""

    def __init__(self, options, results, runner, trainer):
        self.options, self.results, self.runner, self.trainer = options, results, runner, trainer
        self.shapes = TINY_SHAPES if options.tiny else SHAPES

    def attempt(self, part, name, function, **values):
        """Adds the record that a function gives; where it fails, one that says why, and the part goes on."""
        try:
            return self.results.add(part, name, **{**function(), **values})
        except OutOfTime:
            raise
        except Exception as error:
            self.results.note(f"{part} {name}", traceback.format_exc())
            return self.results.add(part, name, **values, ok=False, error=str(error) or type(error).__name__)


def device(check):
    """What card this is, which binary, and where the libraries are."""
    check.results.add("device", "host", cpu=processor(), cpus=os.cpu_count(), commit=commit(check), python=sys.version.split()[0])
    if check.options.device.startswith("cuda"):
        check.attempt("device", "gpu", lambda: gpu(check))
    check.attempt("device", "fusionllm", lambda: version(check))
    for library in ("libcuda.so", "libnvrtc.so", "libcublasLt.so"):
        check.results.add("device", library, found=where(library))


def version(check):
    said = check.runner.run("version", [check.options.binary, "--version"], 10)
    return {"path": check.options.binary, "version": said.strip()}


def gpu(check):
    fields = ["name", "driver_version", "memory.total", "compute_cap", "clocks.max.sm", "power.limit"]
    answer = check.runner.run("nvidia-smi", ["nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader"], 15)
    values = [value.strip() for value in answer.splitlines()[0].split(",")]
    return dict(zip(["card", "driver", "memory", "compute_capability", "clock", "power"], values))


def processor():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "?")


def commit(check):
    """The commit as given, else the repository's, where this lies in one."""
    if check.options.commit:
        return check.options.commit
    try:
        return check.runner.run("commit", ["git", "-C", REPOSITORY, "describe", "--always", "--dirty"], 5).strip()
    except (OSError, RuntimeError):
        return None


def where(library):
    """Files of this library in the usual folders."""
    folders = ["/usr/local/cuda*/lib64", "/usr/local/nvidia/lib*", "/usr/lib/x86_64-linux-gnu", "/usr/lib64"]
    folders += [f"{path}/nvidia/*/lib" for path in sys.path if path.endswith("-packages")]
    folders += [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    return sorted(file for folder in folders for file in glob.glob(f"{folder}/{library}*"))


def unit(check):
    """The tests of the GPU executor."""
    if not check.options.tests:
        check.results.add("unit", "tests", skipped="--tests names no executable")
        return
    command = [check.options.tests, check.options.filter, "--test-threads=1"]
    check.attempt("unit", "tests", lambda: tests(check, command))


def tests(check, command):
    limit = check.runner.clock.limit(PARTS["unit"][1])
    with check.runner.child("unit", command) as child:
        in_time = child.wait(limit)
        said = child.said()
    counts = {name: sum(int(n) for n in re.findall(rf"(\d+) {name}", said)) for name in ("passed", "failed", "ignored")}
    if not in_time:
        counts["passed"] = len(re.findall(r"^test .* ok$", said, re.MULTILINE))
    failed = re.findall(r"^test (\S+) .*FAILED$", said, re.MULTILINE)
    last = re.findall(r"^test (\S+)", said, re.MULTILINE)[-1:]
    ok = in_time and child.process.returncode == 0 and counts["passed"] > 0
    hung = None if in_time else f"killed after {limit:.0f} s in {' '.join(last)}"
    return {"ok": ok, **counts, "failures": failed, "error": hung}


def parity(check):
    """Twenty steps beside the CPU's, in each precision; then odd sizes with dropout."""
    compare_with_cpu(check, PARITY, PRECISIONS, [])
    compare_with_cpu(check, ODD, ("f32", "bf16"), ["model.dropout=0.1"])


def compare_with_cpu(check, shape, precisions, sets):
    job = check.trainer.job(shape)
    cpu = check.trainer.train(f"{shape.name} cpu", job, 20, 40, device="cpu", sets=sets)
    check.results.add("parity", f"{shape.name} cpu", losses=cpu.losses())
    for precision in precisions:

        def compared():
            run = check.trainer.train(f"{shape.name} {precision}", job, 20, 30, sets=[f"train.precision={precision}", *sets])
            return against(cpu, run, LOSS_LIMITS[precision])

        check.attempt("parity", f"{shape.name} {precision}", compared, precision=precision)


def against(reference, run, limit):
    """How far the losses and gradient norms of a run are from those of another."""
    apart = [abs(a - b) for a, b in zip(reference.losses(), run.losses(), strict=True)]
    norms = [(a["grad_norm"], b["grad_norm"]) for a, b in zip(reference.metrics, run.metrics)]
    return {
        "ok": all(distance <= limit for distance in apart),
        "apart": max(apart),
        "limit": limit,
        "norms_apart": max((abs(a - b) / a for a, b in norms if a and b), default=None),
        "losses": run.losses(),
    }


def speed(check):
    """The step's time in each shape and precision, and the first step's with nothing compiled and with all compiled."""
    first_steps(check)
    for shape, precision in EAGER:
        check.attempt("speed", f"{shape} {precision}", lambda: fast(check, shape, precision), shape=shape, precision=precision)


def first_steps(check):
    job = check.trainer.job(check.shapes["41M"])
    for start in ("cold", "warm"):

        def first():
            run = check.trainer.train(
                f"first step {start}", job, 100000, 30, sets=["train.precision=bf16"], env=check.trainer.caches("first"), enough=one_step
            )
            return {**run.first_step(), "phases": run.phases}

        check.attempt("speed", f"first step {start}", first, start=start)


def fast(check, shape, precision):
    """The step's time; the gradient norm is not clipped, since PyTorch's side does not."""
    least_s = 0.5 if check.options.tiny else 2.5
    run = check.trainer.train(
        f"speed {shape} {precision}",
        check.trainer.job(check.shapes[shape]),
        100000,
        25,
        sets=[f"train.precision={precision}", "train.clip=0.0"],
        enough=measured_enough(40, least_s),
    )
    return {**run.speed(), **run.first_step(), "memory_mib": run.memory_mib, "loss": run.losses()[-1]}


def pytorch(check):
    """PyTorch on the same card in the same shapes: eager first, then compiled."""
    for shape, precision in EAGER:
        peer(check, shape, precision, None)
    for shape, precision, mode in COMPILED:
        peer(check, shape, precision, mode)


def more(check):
    """Further forms of PyTorch, in the time that is left."""
    for shape, precision, mode in MORE:
        peer(check, shape, precision, mode)


def peer(check, shape, precision, mode):
    form = "eager" if mode is None else "compile" if mode == "default" else f"compile {mode}"
    s = check.shapes[shape]
    steps = 20 if check.options.tiny else 30 if s.tokens() > 10000 else 100 if s.layers > 4 else 200
    command = [sys.executable, PYTORCH, "--device", check.options.device, "--precision", precision, "--steps", steps]
    command += ["--warmup", 20, "--block", 10]
    for name in ("layers", "width", "heads", "vocab", "seq", "batch"):
        command += [f"--{name}", getattr(s, name)]
    if mode:
        command += ["--compile", "--compile-mode", mode]
    env = {"TORCHINDUCTOR_CACHE_DIR": str(check.runner.work / "inductor"), "TRITON_CACHE_DIR": str(check.runner.work / "triton")}

    def measured():
        said = check.runner.run(f"pytorch {shape} {precision} {form}", command, 90 if mode else 60, env=env)
        return json.loads(said.strip().splitlines()[-1])

    check.attempt("pytorch", f"{shape} {precision} {form}", measured, shape=shape, precision=precision, form=form)


# Where PARITY is cut in two: between its blocks, and inside its first attention.
CUTS = {"between blocks": "h.0.add_2", "inside a block": "h.0.attn.c_attn"}


# How far losses may be apart where a cut changes the order in which the gradients of a tied table are added.
CUT_LIMITS = {"f32": 1e-5, "bf16": 1e-3}


def cut(check):
    """The same training in two stages: losses must be equal bit for bit; then what it costs."""
    for precision in ("f32", "bf16"):
        check.attempt("cut", f"equal {precision}", lambda: equal(check, precision), precision=precision)
    cut_speed(check, "bf16")
    for precision in ("f32", "bf16"):
        check.attempt("cut", f"near {precision}, 2 micro-batches", lambda: near(check, precision), precision=precision)
    cut_speed(check, "f32")


def stages(last_op, second):
    """Two stages, the second of them on this CompNode."""
    return f'placement.stages=[{{compnode=0,last_op="{last_op}"}},{{compnode={second},last_op="loss"}}]'


def boundary(precision):
    """Settings of a precision, in which a cut is lossless."""
    return [f"train.precision={precision}", f"compression.values={'bf16' if precision == 'bf16' else 'f32'}"]


def equal(check, precision):
    """One micro-batch and no clipping: with more, a cut changes the order of sums over micro-batches and CompNodes."""
    job, sets = check.trainer.job(PARITY), [*boundary(precision), "train.micro_batches=1", "train.clip=0.0"]

    def train(title, more=(), **options):
        return check.trainer.train(f"cut {precision} {title}", job, 20, 30, sets=[*sets, *more], **options).losses()

    one = train("one")
    runs = {name: train(name, [stages(op, 1)], compnodes=2) for name, op in CUTS.items()}
    runs["private"] = train("private", ["data.private=true", "placement.strategy=equal-compute"], compnodes=2)
    runs["again"] = train("again")
    unequal = {name: first_difference(one, losses) for name, losses in runs.items() if losses != one}
    apart = max(abs(a - b) for losses in runs.values() for a, b in zip(one, losses))
    return {"ok": not unequal, "runs": list(runs), "unequal_from_step": unequal, "apart": apart, "losses": one}


def near(check, precision):
    """Two micro-batches and clipping, as jobs have it."""
    job, sets = check.trainer.job(PARITY), boundary(precision)
    one = check.trainer.train(f"near {precision} one", job, 20, 30, sets=sets)
    two = check.trainer.train(f"near {precision} two", job, 20, 30, sets=[*sets, stages("h.0.add_2", 1)], compnodes=2)
    return against(one, two, CUT_LIMITS[precision])


def first_difference(one, other):
    return next((step for step, (a, b) in enumerate(zip(one, other), 1) if a != b), min(len(one), len(other)) + 1)


# How the stages of cut_speed are placed: how many there are, and how many CompNodes on the card.
PLACEMENTS = {"one stage": (1, 1), "two CompNodes": (2, 2), "two stages of one CompNode": (2, 1)}


def cut_speed(check, precision):
    """One stage, and two stages that hold half of the blocks each, all on one card."""
    shape = TINY_CUT_SPEED if check.options.tiny else CUT_SPEED
    job, half = check.trainer.job(shape), f"h.{shape.layers // 2 - 1}.add_2"
    sets = [*boundary(precision), "train.clip=0.0"]
    enough = measured_enough(20, 0.5 if check.options.tiny else 2.0)
    for placement, (count, compnodes) in PLACEMENTS.items():

        def measured():
            placed = [stages(half, compnodes - 1)] if count == 2 else []
            title = f"cut speed {precision} {placement}"
            run = check.trainer.train(title, job, 100000, 25, sets=[*sets, *placed], compnodes=compnodes, enough=enough)
            return {**run.speed(), "memory_mib": run.memory_mib}

        check.attempt("cut", f"speed {precision}, {placement}", measured, precision=precision, placement=placement)


def text(check):
    """Some hundred steps of the repository's own text in f32 and in bf16."""
    shape, steps = (TINY_TEXT, 40) if check.options.tiny else (TEXT, 300)
    corpus = check.runner.work / "corpus.txt"
    corpus.write_text("\n".join(corpus_of(REPOSITORY / name for name in ("crates", "docs", "README.md", "ARCHITECTURE.md"))))
    job = check.trainer.job(shape, text=corpus)

    def ended(precision):
        sets = [f"train.precision={precision}", "train.lr=1e-3", "train.warmup=30", "train.eval_batches=8"]
        return ending(check.trainer.train(f"text {precision}", job, steps, 40, sets=sets))

    f32 = check.results.add("text", "f32", **ended("f32"))

    def beside():
        bf16 = ended("bf16")
        worse, evals = (bf16[key] - f32[key] for key in ("last_losses", "eval_loss"))
        return {"ok": worse <= TEXT_LIMIT and evals <= TEXT_LIMIT, "worse": worse, "eval_worse": evals, "limit": TEXT_LIMIT, **bf16}

    check.attempt("text", "bf16", beside)


def corpus_of(sources):
    """The texts of these files and folders, in an order that does not depend on the machine."""
    for source in sources:
        files = [source] if source.is_file() else sorted(source.rglob("*.rs")) + sorted(source.rglob("*.md"))
        yield from (file.read_text() for file in files)


def ending(run):
    """The mean of the last losses, and the evaluation at the end."""
    last = run.losses()[-20:]
    first, evaluation = run.losses()[0], run.metrics[-1]["eval_loss"]
    return {"steps": len(run.metrics), "first_loss": first, "last_losses": sum(last) / len(last), "eval_loss": evaluation}


def sanitizer(check):
    """Memory errors and races of a tiny training step, where NVIDIA's tool for that is there."""
    tool = shutil.which("compute-sanitizer") or next(iter(glob.glob("/usr/local/cuda*/bin/compute-sanitizer")), None)
    if not tool:
        check.results.add("sanitizer", "tool", skipped="there is no compute-sanitizer")
        return
    for precision in ("bf16", "f32"):
        for kind in ("memcheck", "racecheck"):
            check.attempt("sanitizer", f"{kind} {precision}", lambda: sanitized(check, tool, kind, precision))


def sanitized(check, tool, kind, precision):
    logs = check.runner.work / f"{kind}-{precision}"
    logs.mkdir()
    sets = [f"train.precision={precision}", f"placement.cluster={check.trainer.cluster()}"]
    prefix = [tool, "--tool", kind, "--target-processes", "all", "--log-file", logs / "%p.log"]
    problem = None
    try:
        check.trainer.train(f"{kind} {precision}", check.trainer.job(SANITIZED), 2, 30, sets=sets, prefix=prefix)
    except RuntimeError as error:
        problem = str(error)
    said = "\n".join(file.read_text(errors="replace") for file in sorted(logs.iterdir()))
    check.results.note(f"{kind} {precision}", said[-20000:])
    found = {
        "errors": sum(int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", said)),
        "hazards": sum(int(n) for n in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", said)),
        "processes": len(re.findall(r"(?:ERROR|RACECHECK) SUMMARY", said)),
    }
    ok = problem is None and found["processes"] > 0 and found["errors"] + found["hazards"] == 0
    return {"ok": ok, **found, "error": problem}


# The parts, most valuable first, and the seconds that each may take.
PARTS = {
    "device": (device, 20),
    "unit": (unit, 75),
    "parity": (parity, 60),
    "speed": (speed, 90),
    "pytorch": (pytorch, 150),
    "cut": (cut, 90),
    "text": (text, 40),
    "sanitizer": (sanitizer, 75),
    "more": (more, 150),
}
