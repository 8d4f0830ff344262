"""Checks and measures training on one GPU, most valuable first, in less than eight minutes.

Each part has a time limit of its own. What hangs or fails is ended, said, and the next goes on. Results are written
to OUT/results.jsonl at once, what the programs said to OUT/log.txt, the tables at the end to OUT/table.md.
"""

import argparse
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
import traceback

from harness import Clock, OutOfTime, Results, Runner
from parts import PARTS, REPOSITORY, Check
from table import tables
from training import Trainer


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu-check", metavar="DIR", help="where results go [default: %(default)s]")
    parser.add_argument("--binary", default=REPOSITORY / "target/release/fusionllm", metavar="PATH", help="the program to check")
    parser.add_argument("--tests", metavar="PATH", help="a test executable of cargo, for the part unit")
    parser.add_argument("--filter", default="cuda::", help="which of its tests to run [default: %(default)s]")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, in this order [default: %(default)s]")
    parser.add_argument("--total", type=float, default=470, metavar="SECONDS", help="for all parts [default: %(default)s]")
    parser.add_argument("--patience", type=float, default=1, help="multiplies all limits of time, such as for a slow machine")
    parser.add_argument("--device", default="cuda", help="device of both sides; cpu to try the script [default: %(default)s]")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few steps, to try the script")
    parser.add_argument("--commit", help="commit of the program, where the repository is not there to ask")
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    options.binary = os.path.abspath(options.binary)
    options.tests = options.tests and os.path.abspath(options.tests)
    return options


def run_part(part, check, clock):
    """Runs one part; whatever goes wrong there, the next one can run."""
    began = time.monotonic()
    function, limit = PARTS[part]
    clock.begin(limit)
    values = {}
    try:
        if clock.left() < 5:
            raise OutOfTime("the time of the whole check is used up")
        function(check)
    except OutOfTime as error:
        values = {"ok": False, "error": str(error)}
    except Exception as error:
        check.results.note(part, traceback.format_exc())
        values = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    check.results.add(part, "part", seconds=round(time.monotonic() - began, 1), **values)


def main():
    options = parse_args()
    # Ended from outside, the children are ended too, and the tables are still written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    results = Results(options.out)
    clock = Clock(options.total, options.patience)
    work = pathlib.Path(tempfile.mkdtemp(prefix="gpu-check-"))
    runner = Runner(results, clock, work)
    check = Check(options, results, runner, Trainer(runner, options.binary, options.device))
    try:
        for part in options.parts:
            run_part(part, check, clock)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        text = tables(results)
        (results.folder / "table.md").write_text(text)
        print("\n" + text, flush=True)


if __name__ == "__main__":
    main()
