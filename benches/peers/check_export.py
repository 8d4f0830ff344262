"""Loads an exported Hugging Face folder and scores tokens with it.

    python benches/peers/check_export.py DIR TOKENS.safetensors

TOKENS holds inputs and labels, i32 [N, S]; logits[n, s] are scored against labels[n, s], no
shift. Prints {"loss": mean cross-entropy of an f32 model}. Where DIR has a tokenizer.json, a
short string must also survive encoding and decoding. Exits non-zero on any misfit.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

SAMPLE = "The quick brown fox, 42 times."
ROWS_AT_ONCE = 8


def load_model(folder):
    """The folder's model in f32; every weight must be there, and no other."""
    model, info = GPT2LMHeadModel.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            sys.exit(f"{folder}: {problem.replace('_', ' ')}: {sorted(info[problem])}")
    return model.eval()


def load_tokens(path, vocab, positions):
    """Inputs and labels as i64, checked against the model's vocabulary and length."""
    tensors = load_file(path)
    missing = {"inputs", "labels"} - tensors.keys()
    if missing:
        sys.exit(f"{path}: no tensor {sorted(missing)}")
    inputs, labels = tensors["inputs"], tensors["labels"]
    if inputs.ndim != 2 or inputs.shape != labels.shape or inputs.numel() == 0:
        sys.exit(f"{path}: inputs {list(inputs.shape)} and labels {list(labels.shape)} "
                 "must both be one [N, S], not empty")
    if inputs.shape[1] > positions:
        sys.exit(f"{path}: rows of {inputs.shape[1]} tokens, the model takes {positions}")
    for name, ids in (("inputs", inputs), ("labels", labels)):
        if ids.dtype != torch.int32:
            sys.exit(f"{path}: {name} is {ids.dtype}, must be i32")
        if ids.min() < 0 or ids.max() >= vocab:
            sys.exit(f"{path}: {name} has ids outside 0..{vocab}")
    return inputs.long(), labels.long()


@torch.no_grad()
def mean_loss(model, inputs, labels):
    """Mean cross-entropy over all tokens."""
    total = 0.0
    for x, y in zip(inputs.split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True):
        logits = model(input_ids=x, use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / labels.numel()


def check_tokenizer(path):
    """Exits unless the sample string comes back as it went in."""
    tokenizer = Tokenizer.from_file(str(path))
    back = tokenizer.decode(tokenizer.encode(SAMPLE).ids)
    if back != SAMPLE:
        sys.exit(f"{path}: {SAMPLE!r} came back as {back!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("tokens", metavar="TOKENS.safetensors", type=Path)
    args = parser.parse_args()
    if not args.folder.is_dir():
        sys.exit(f"{args.folder}: not a folder")

    model = load_model(args.folder)
    inputs, labels = load_tokens(args.tokens, model.config.vocab_size, model.config.n_positions)
    tokenizer = args.folder / "tokenizer.json"
    if tokenizer.exists():
        check_tokenizer(tokenizer)
    print(json.dumps({"loss": mean_loss(model, inputs, labels)}))


if __name__ == "__main__":
    main()
