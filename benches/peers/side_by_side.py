"""FusionLLM beside torch.distributed.pipelining: the same GPT-2, weights, batches, stages and links, in one session.

    python benches/peers/side_by_side.py --out table.md

Needs Linux, root (for network namespaces), a built `fusionllm`, a built `wan-emu`, and requirements.txt. The sides take
turns on each network, and every process has one thread. Finished runs are kept in --work and not run again, so a table
that was cut short is finished by the same command; --fresh starts anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from versus.net import LEAST_STEPS, LINKS, Net, RunFailed
from versus.setting import SHAPES, Recipe, Setting, Shape, write_corpus, write_model
from versus.sides import SIDES, CompNodes, Side, run_pytorch
from versus.table import Cell, write_table
from versus.watch import Run

ROOT = Path(__file__).resolve().parents[2]
BEGAN = time.monotonic()
LONGER = 1.25
"""How many times as many steps compressed runs take, so as to reach the loss of the others."""


@dataclass(frozen=True)
class Plan:
    """Files and numbers of the whole table."""

    work: Path
    fusionllm: Path
    wan_emu: Path
    shape: str
    micro_batches: int
    steps: int
    eval_every: int
    discard: int
    corpus: Path

    def setting(self, side: Side, link: str, stages: int) -> Setting:
        """What one side trains in one cell."""
        steps = LINKS[link].steps(self.steps) if side.whole else round(self.steps * LONGER)
        shape = self.cut()
        recipe = Recipe(eval_batches=max(Recipe.eval_batches, shape.micro_batches))
        return Setting(shape, recipe, stages, steps, self.eval_every, self.corpus, self.work / self.shape)

    def cut(self) -> Shape:
        """The shape in its micro-batches."""
        return replace(SHAPES[self.shape], micro_batches=self.micro_batches)

    def window(self, setting: Setting) -> tuple[int, int]:
        """Steps between which bytes are counted: after the discarded ones, before an evaluation."""
        return self.discard, min(setting.eval_every, setting.steps) - 1

    def key(self, name: str, link: str, stages: int, attempt: int) -> str:
        """The name of a run's result; another binary or another training gives another one."""
        setting = self.setting(SIDES[name], link, stages)
        about = [asdict(setting), asdict(SIDES[name]), asdict(LINKS[link]), self.discard]
        if not SIDES[name].wire:
            about.append(hashlib.sha256(self.fusionllm.read_bytes()).hexdigest())
        digest = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:8]
        return f"{self.shape}-{link}-{stages}-{name}-{attempt}-{digest}"


def measure(plan: Plan, link: str, stages: int, attempt: int, names: list[str]) -> None:
    """Every side's run of one cell that is not there yet."""
    results = {name: plan.work / "results" / f"{plan.key(name, link, stages, attempt)}.json" for name in names}
    missing = {name: path for name, path in results.items() if not path.exists()}
    if not missing:
        return
    folder = fresh(plan.work / "run")
    with ExitStack() as stack:
        net = stack.enter_context(Net(plan.wan_emu, LINKS[link], stages, plan.work))
        compnodes: CompNodes | None = None
        for name, path in missing.items():
            side, setting = SIDES[name], plan.setting(SIDES[name], link, stages)
            try:
                if side.wire:
                    run = run_pytorch(side.wire, net, setting, fresh(folder / name), plan.window(setting))
                else:
                    if compnodes is None:
                        compnodes = CompNodes(net, plan.fusionllm, stages, fresh(folder / "compnodes"))
                        stack.callback(compnodes.close)
                    run = compnodes.run(side, setting, plan.window(setting))
            except RunFailed as failure:
                say(f"{link}, {stages} stages, {name}, round {attempt + 1}: failed: {failure}")
                continue
            say(f"{link}, {stages} stages, {name}, round {attempt + 1}: {outcome(run, plan.discard)}")
            path.write_text(json.dumps(asdict(run)))


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def outcome(run: Run, discard: int) -> str:
    """One line about a run."""
    cell = Cell([run], discard)
    return f"{cell.step_s:.3f} s a step, evaluation loss {cell.eval_loss:.4f} after {len(run.steps)} steps"


def collect(plan: Plan, links: list[str], stages: list[int], names: list[str], rounds: int) -> dict[tuple, Cell]:
    """All results that there are, by (link, stages, side)."""
    cells = {}
    for link in links:
        for count in stages:
            for name in names:
                keys = [plan.key(name, link, count, attempt) for attempt in range(rounds)]
                paths = [path for key in keys if (path := plan.work / "results" / f"{key}.json").exists()]
                if paths:
                    runs = [Run(**json.loads(path.read_text())) for path in paths]
                    cells[link, count, name] = Cell(runs, plan.discard)
    return cells


def say(text: str) -> None:
    """Progress, with the seconds since the start."""
    print(f"{time.monotonic() - BEGAN:5.0f} s  {text}", file=sys.stderr, flush=True)


def chosen(options: Iterable[str], what: str) -> Callable[[str], list[str]]:
    """An argparse type: a comma-separated list of some of the options."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in options:
                raise argparse.ArgumentTypeError(f"unknown {what} {name!r}, expected some of {', '.join(options)}")
        return names

    return parse


def stage_counts(text: str) -> list[int]:
    """An argparse type: a comma-separated list of stage counts."""
    counts = [int(word) for word in text.split(",")]
    if min(counts) < 2:
        raise argparse.ArgumentTypeError("a pipeline has at least 2 stages")
    return counts


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fusionllm", type=Path, default=ROOT / "target/release/fusionllm")
    parser.add_argument("--wan-emu", type=Path, default=ROOT / "tools/wan-emu/target/release/wan-emu")
    parser.add_argument("--links", type=chosen(LINKS, "link"), default=list(LINKS), help=",".join(LINKS))
    parser.add_argument("--sides", type=chosen(SIDES, "side"), default=list(SIDES), help=",".join(SIDES))
    parser.add_argument("--stages", type=stage_counts, default=[2, 4], help="such as 2,4")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--micro-batches", type=int, help="of a step (default: the shape's)")
    parser.add_argument("--steps", type=int, default=100, help="steps to the loss that is compared")
    parser.add_argument("--eval-every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--discard", type=int, default=3, help="first steps that no time or byte counts of")
    parser.add_argument("--rounds", type=int, default=2, help="runs of every side, taking turns")
    parser.add_argument("--corpus", type=Path, help="an ASCII text (default: this repository's sources and documents)")
    parser.add_argument("--work", type=Path, default=ROOT / "target/side-by-side", help="where results are kept")
    parser.add_argument("--fresh", action="store_true", help="forget the results in --work")
    parser.add_argument("--out", type=Path, help="where the table goes (default: standard output)")
    args = parser.parse_args()
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a message where something cannot work."""
    if os.geteuid() != 0:
        parser.error("network namespaces need root")
    for option in ("fusionllm", "wan_emu"):
        if not os.access(getattr(args, option), os.X_OK):
            parser.error(f"--{option.replace('_', '-')}: no program {getattr(args, option)}; build it or name another")
    if args.corpus and not args.corpus.read_bytes().isascii():
        parser.error(f"--corpus: {args.corpus} is not ASCII")
    if min(args.eval_every, LEAST_STEPS) - 1 <= args.discard:
        parser.error(f"--eval-every and {LEAST_STEPS} must exceed --discard by at least 2")
    if args.steps < LEAST_STEPS or args.steps % args.eval_every:
        parser.error(f"--steps must be a multiple of --eval-every, and at least {LEAST_STEPS}")
    shape = SHAPES[args.shape]
    if args.micro_batches is not None and (args.micro_batches < 1 or shape.batch % args.micro_batches):
        parser.error(f"--micro-batches: the {shape.batch} sequences of {args.shape} do not divide by it")
    if max(args.stages) > shape.layers:
        parser.error(f"--stages: the shape {args.shape} has {shape.layers} blocks")


def prepare(args: argparse.Namespace) -> Plan:
    """The files that every run starts from."""
    work = args.work.resolve()
    if args.fresh:
        shutil.rmtree(work, ignore_errors=True)
    (work / "results").mkdir(parents=True, exist_ok=True)
    corpus = args.corpus.resolve() if args.corpus else work / "corpus.txt"
    if not corpus.exists():
        write_corpus(corpus, ROOT)
    if not (work / args.shape / "config.json").exists():
        write_model(work / args.shape, SHAPES[args.shape], Recipe.seed)
    programs = args.fusionllm.resolve(), args.wan_emu.resolve()
    micro_batches = args.micro_batches or SHAPES[args.shape].micro_batches
    return Plan(work, *programs, args.shape, micro_batches, args.steps, args.eval_every, args.discard, corpus)


def main() -> None:
    args = parse_args()
    plan = prepare(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for attempt in range(args.rounds):
            for link in args.links:
                if attempt < LINKS[link].rounds(args.rounds):
                    for count in args.stages:
                        measure(plan, link, count, attempt, args.sides)
    except KeyboardInterrupt:
        say("interrupted: the table has what was measured; the same command goes on from there")
    except RunFailed as failure:
        sys.exit(f"error: {failure}")
    cells = collect(plan, args.links, args.stages, args.sides, args.rounds)
    text = write_table(cells, plan.steps, plan.cut(), plan.fusionllm)
    if args.out:
        args.out.write_text(text)
    else:
        print(text, end="")
    if len(cells) < len(args.links) * len(args.stages) * len(args.sides):
        sys.exit("error: some runs are missing")


if __name__ == "__main__":
    main()
