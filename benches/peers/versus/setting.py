"""What both sides train: the model's shape, the recipe, where it is cut, and the files both start from."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

INIT_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """A GPT-2 over bytes, and the tokens of a step."""

    layers: int
    width: int
    heads: int
    seq: int
    batch: int
    micro_batches: int
    vocab: int = 256

    @property
    def rows(self) -> int:
        """Sequences in a micro-batch."""
        return self.batch // self.micro_batches

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.seq


SHAPES = {
    "small": Shape(layers=4, width=256, heads=4, seq=128, batch=16, micro_batches=4),
    "narrow": Shape(layers=4, width=128, heads=4, seq=128, batch=32, micro_batches=4),
    "wide": Shape(layers=4, width=768, heads=12, seq=128, batch=8, micro_batches=4),
}


@dataclass(frozen=True)
class Recipe:
    """How both sides train. The learning rate stays constant after the warm-up, and gradients are not clipped."""

    lr: float = 1e-3
    warmup: int = 5
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    seed: int = 0
    eval_fraction: float = 0.1
    eval_batches: int = 8

    def lr_at(self, step: int) -> float:
        """Learning rate of the update after `step` updates."""
        return self.lr * min(1.0, (step + 1) / self.warmup)


@dataclass(frozen=True)
class Setting:
    """One training, however it is run."""

    shape: Shape
    recipe: Recipe
    stages: int
    steps: int
    eval_every: int
    corpus: Path
    model: Path

    def blocks(self, stage: int) -> range:
        """Blocks of a stage; they are shared out evenly."""
        cuts = [self.shape.layers * s // self.stages for s in range(self.stages + 1)]
        return range(cuts[stage], cuts[stage + 1])

    def save(self, path: Path) -> None:
        """Writes it for the processes of one run."""
        path.write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def load(cls, path: Path) -> Setting:
        """Reads what `save` wrote."""
        raw = json.loads(path.read_text())
        raw["shape"], raw["recipe"] = Shape(**raw["shape"]), Recipe(**raw["recipe"])
        raw["corpus"], raw["model"] = Path(raw["corpus"]), Path(raw["model"])
        return cls(**raw)


def write_model(folder: Path, shape: Shape, seed: int) -> None:
    """A Hugging Face folder of random weights: normal of std 0.02, as GPT-2 starts, and GPT-2's own layouts."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": shape.vocab,
        "n_positions": shape.seq,
        "n_embd": shape.width,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
    }
    save_file(random_weights(shape, seed), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def random_weights(shape: Shape, seed: int) -> dict[str, torch.Tensor]:
    """Every parameter by its Hugging Face key; linear weights are [in, out]."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}

    def matrix(name: str, *size: int) -> None:
        weights[f"transformer.{name}.weight"] = INIT_STD * torch.randn(*size, generator=generator)

    def linear(name: str, inputs: int, outputs: int) -> None:
        matrix(name, inputs, outputs)
        weights[f"transformer.{name}.bias"] = torch.zeros(outputs)

    def norm(name: str) -> None:
        weights[f"transformer.{name}.weight"] = torch.ones(shape.width)
        weights[f"transformer.{name}.bias"] = torch.zeros(shape.width)

    matrix("wte", shape.vocab, shape.width)
    matrix("wpe", shape.seq, shape.width)
    for block in range(shape.layers):
        norm(f"h.{block}.ln_1")
        linear(f"h.{block}.attn.c_attn", shape.width, 3 * shape.width)
        linear(f"h.{block}.attn.c_proj", shape.width, shape.width)
        norm(f"h.{block}.ln_2")
        linear(f"h.{block}.mlp.c_fc", shape.width, 4 * shape.width)
        linear(f"h.{block}.mlp.c_proj", 4 * shape.width, shape.width)
    norm("ln_f")
    return weights


def write_corpus(path: Path, repository: Path) -> None:
    """The repository's own sources and documents as one ASCII file, so that every byte is a character."""
    listed = ["git", "ls-files", "crates/**/*.rs", "docs", "README.md", "ARCHITECTURE.md"]
    names = subprocess.check_output(listed, cwd=repository, text=True).split()
    texts = [(repository / name).read_bytes() for name in names]
    path.write_bytes(bytes(byte for text in texts for byte in text if 0 < byte < 128))
