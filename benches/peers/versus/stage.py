"""One stage of the same GPT-2 under torch.distributed.pipelining: Schedule1F1B over gloo, eager, on the CPU.

    python -m versus.stage SETTING.json --rank R --log STEPS.jsonl [--wire bf16]

MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME say where the others are. The last stage writes one JSON line a step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from versus.batches import Batches
from versus.setting import Setting, Shape

PATIENCE = datetime.timedelta(minutes=10)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then the MLP, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width, eps=1e-5)
        self.c_attn = nn.Linear(width, 3 * width)
        self.attn_proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width, eps=1e-5)
        self.c_fc = nn.Linear(width, 4 * width)
        self.mlp_proj = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, seq, width = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(rows, seq, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attn_proj(mixed.transpose(1, 2).reshape(rows, seq, width))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class Part(nn.Module):
    """The blocks of one stage; the embedding with the first, the final norm and the tied head with the last."""

    def __init__(self, setting: Setting, rank: int, wire: torch.dtype) -> None:
        super().__init__()
        shape = setting.shape
        self.first, self.last, self.wire = rank == 0, rank == setting.stages - 1, wire
        if self.first or self.last:
            self.wte = nn.Embedding(shape.vocab, shape.width)
        if self.first:
            self.wpe = nn.Embedding(shape.seq, shape.width)
        if self.last:
            self.ln_f = nn.LayerNorm(shape.width, eps=1e-5)
        self.blocks = nn.ModuleDict({str(b): Block(shape.width, shape.heads) for b in setting.blocks(rank)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wte(x) + self.wpe.weight if self.first else x.float()
        for block in self.blocks.values():
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight) if self.last else x.to(self.wire)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Takes its parameters from a Hugging Face folder."""
        with safe_open(folder / "model.safetensors", "pt") as weights:
            for name, param in self.named_parameters():
                value = weights.get_tensor(hugging_face_key(name))
                is_linear = param.dim() == 2 and name.startswith("blocks.")
                param.copy_(value.T if is_linear else value)


def hugging_face_key(name: str) -> str:
    """The key of one of `Part`'s parameters."""
    for ours, theirs in (("c_attn", "attn.c_attn"), ("attn_proj", "attn.c_proj"), ("c_fc", "mlp.c_fc"),
                         ("mlp_proj", "mlp.c_proj"), ("blocks", "h")):  # fmt: skip
        name = name.replace(f"{ours}.", f"{theirs}.")
    return f"transformer.{name}"


def adamw(part: Part, setting: Setting) -> torch.optim.AdamW:
    """PyTorch's AdamW; matrices and tables decay, biases and norms do not."""
    recipe = setting.recipe
    params = list(part.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, eps=recipe.epsilon)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of a micro-batch."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Trainer:
    """One rank's share of the training."""

    def __init__(self, setting: Setting, rank: int, wire: torch.dtype) -> None:
        self.setting, self.rank, self.last = setting, rank, rank == setting.stages - 1
        self.part = Part(setting, rank, wire)
        self.part.load(setting.model)
        self.optimizer = adamw(self.part, setting)
        stage = PipelineStage(self.part, rank, setting.stages, torch.device("cpu"))
        self.schedule = Schedule1F1B(stage, setting.shape.micro_batches, cross_entropy)
        self.holders = dist.new_group([0, setting.stages - 1]) if setting.stages > 1 else None
        self.batches = Batches(setting)
        self.eval_batches = self.batches.eval()

    def run(self, do: Callable[..., object], inputs: torch.Tensor, labels: torch.Tensor) -> float:
        """One batch through the pipeline by `do`; its mean loss on the last rank, elsewhere 0."""
        losses: list[torch.Tensor] = []
        if self.setting.stages == 1:
            do(inputs, target=labels, losses=losses)
        elif self.rank == 0:
            do(inputs)
        elif self.last:
            do(target=labels, losses=losses)
        else:
            do()
        return sum(loss.item() for loss in losses) / max(len(losses), 1)

    def step(self, step: int) -> float:
        """One update; its training loss."""
        loss = self.run(self.schedule.step, *self.batches.train(step))
        if self.holders and (self.rank == 0 or self.last):
            dist.all_reduce(self.part.wte.weight.grad, group=self.holders)
        for group in self.optimizer.param_groups:
            group["lr"] = self.setting.recipe.lr_at(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def evaluate(self) -> float:
        """Mean loss of the evaluation."""
        losses = [self.run(self.schedule.eval, *batch) for batch in self.eval_batches]
        return sum(losses) / len(losses)

    def train(self, log: Path | None) -> None:
        """All steps; each is a line of the log."""
        setting = self.setting
        for step in range(setting.steps):
            began = time.perf_counter()
            loss = self.step(step)
            line = {"step": step + 1, "step_s": time.perf_counter() - began, "loss": loss}
            if (step + 1) % setting.eval_every == 0 or step + 1 == setting.steps:
                line["eval_loss"] = self.evaluate()
            if self.last and log:
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")


def check(shape: Shape, eval_batches: int) -> None:
    """Refuses what the schedule cannot cut evenly."""
    if eval_batches % shape.micro_batches:
        raise SystemExit(f"eval_batches {eval_batches} must divide by micro_batches {shape.micro_batches}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("setting", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--wire", choices=["f32", "bf16"], default="f32", help="form of what crosses a boundary")
    args = parser.parse_args()
    setting = Setting.load(args.setting)
    check(setting.shape, setting.recipe.eval_batches)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=args.rank, world_size=setting.stages, timeout=PATIENCE)
    wire = torch.bfloat16 if args.wire == "bf16" else torch.float32
    Trainer(setting, args.rank, wire).train(args.log)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
