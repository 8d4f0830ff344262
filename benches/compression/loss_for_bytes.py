"""Evaluation loss, bytes and predicted step time of one job under several compressions, as a table.

    cargo build --release
    python benches/compression/loss_for_bytes.py --out /tmp/loss-for-bytes ROW...

A row is NAME=key=value,key=value (keys of the section [compression]); without rows the ones of docs/compression.md
run. Finished runs in --out are not run again. The loss of each is that of the model as it would be exported: the
evaluation passes do not compress. The data is frozen in --out at the first run, so that editing the repository does not
change it.
"""

import argparse
import json
import pathlib
import shutil
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).resolve().parent

ROWS = ["dense=policy=dense"] + [
    f"{name}-{ratio}={keys},ratio={ratio}"
    for name, keys in [
        ("uniform-topk", "policy=uniform-topk"),
        ("ada-topk", "policy=ada-topk"),
        ("adaptive", "policy=adaptive"),
    ]
    for ratio in (10, 30, 100)
]


def run(row, args):
    name, keys = row.split("=", 1)
    out = args.out / name
    if not (out / "done").exists():
        shutil.rmtree(out, ignore_errors=True)
        sets = [f"compression.{key}" for key in keys.split(",")] + args.set
        command = [str(args.binary), "train", str(args.job), "--out", str(out), "--set", f"data.path={args.out / 'data'}"]
        for override in sets:
            command += ["--set", override]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (out / "done").touch()
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    placement = json.loads((out / "placement.json").read_text())
    codecs = {(e["activation_codec"], e["gradient_codec"]) for e in map(codec_names, placement["placement"]["edges"])}
    return {
        "name": name,
        "eval": next(s["eval_loss"] for s in reversed(steps) if s.get("eval_loss") is not None),
        "train": sum(s["loss"] for s in steps[-50:]) / len(steps[-50:]),
        "bytes": sum(link["bytes"] for s in steps for link in s["links"]),
        "step_s": placement["prediction"]["step_s"],
        "codecs": sorted(codecs),
    }


def codec_names(edge):
    return {key: json.dumps(edge[key]) for key in ("activation_codec", "gradient_codec")}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", nargs="*", default=ROWS)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--job", type=pathlib.Path, default=HERE / "job.toml")
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "target/release/fusionllm")
    parser.add_argument("--set", action="append", default=[], help="further overrides of the job")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = args.out / "data"
    if not data.exists():
        data.mkdir()
        listed = ["git", "ls-files", "crates/**/*.rs", "docs", "examples", "README.md", "ARCHITECTURE.md"]
        for index, path in enumerate(subprocess.check_output(listed, cwd=ROOT, text=True).split()):
            shutil.copy(ROOT / path, data / f"{index:04}-{pathlib.Path(path).name}")
    rows = []
    for row in args.rows:
        rows.append(run(row, args))
        print(line(rows[-1], rows[0]), flush=True)


def line(row, first):
    loss = f"{row['eval']:.4f} | {100 * (row['eval'] / first['eval'] - 1):+.1f} %"
    size = f"{row['bytes'] / 1e6:.1f} MB | {first['bytes'] / row['bytes']:.1f}×"
    return f"| {row['name']} | {loss} | {row['train']:.4f} | {size} | {row['step_s'] * 1e3:.0f} ms |"


if __name__ == "__main__":
    main()
