"""Trains a GPT-2 shape in plain PyTorch, eager or compiled, and measures its speed.

Prints one JSON line: tokens_per_s is the tokens of a whole step over the median step time.
A step is all micro-batches' forward and backward passes and one AdamW update.
On a GPU nothing waits for a step: blocks of steps are timed, and the median block counts.
"""

import argparse
import contextlib
import json
import statistics
import time

BEGAN = time.perf_counter()

import torch
import torch.nn as nn
import torch.nn.functional as F

INIT_STD = 0.02


class Block(nn.Module):
    """A pre-norm transformer block: attention, then the MLP, each added to its input."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_out = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width, eps=1e-5)
        self.fc = nn.Linear(width, 4 * width)
        self.fc_out = nn.Linear(4 * width, width)

    def forward(self, x):
        batch, seq, width = x.shape
        qkv = self.qkv(self.ln_1(x)).view(batch, seq, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attn_out(mixed.transpose(1, 2).reshape(batch, seq, width))
        return x + self.fc_out(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    """GPT-2 with learned positions, no dropout and a head tied to the token embedding."""

    def __init__(self, layers, width, heads, vocab, seq):
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.wpe = nn.Embedding(seq, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width, eps=1e-5)
        self.apply(init_weights)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


def init_weights(module):
    """Normal weights of std 0.02 and zero biases, as GPT-2 starts."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def mean_loss(model, ids, labels):
    """The mean cross-entropy of the model's logits."""
    logits = model(ids)
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.reshape(-1))


def train_step(loss_of, optimizer, ids, labels, micro_batches, autocast):
    """One update over the batch, its gradient accumulated over the micro-batches; the last one's loss."""
    optimizer.zero_grad()
    for x, y in zip(ids.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
        with autocast():
            loss = loss_of(x, y)
        (loss / micro_batches).backward()
    optimizer.step()
    return loss.detach()


def make_step(args):
    """A function that makes one training step, in the precision and form that was asked for."""
    torch.set_float32_matmul_precision("highest" if args.precision == "f32" else "high")
    torch.manual_seed(0)
    model = Gpt2(args.layers, args.width, args.heads, args.vocab, args.seq).to(args.device)
    fused = {"fused": True} if on_gpu(args) else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, **fused)
    ids = torch.randint(args.vocab, (args.batch, args.seq)).to(args.device)
    labels = torch.randint(args.vocab, (args.batch, args.seq)).to(args.device)

    def loss_of(x, y):
        return mean_loss(model, x, y)

    if args.compile:
        loss_of = torch.compile(loss_of, mode=args.compile_mode)

    def autocast():
        if args.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16)

    return lambda: train_step(loss_of, optimizer, ids, labels, args.micro_batches, autocast)


def on_gpu(args):
    return args.device.startswith("cuda")


def timed(args, step, steps):
    """Seconds that so many steps take, with all of the device's work done, and the last loss."""
    start = time.perf_counter()
    for _ in range(steps):
        loss = step()
    if on_gpu(args):
        torch.cuda.synchronize()
    return time.perf_counter() - start, loss


def measure(args):
    """Trains, and gives the figures to print."""
    step = make_step(args)
    first_s, _ = timed(args, step, 1)
    until_first_s = time.perf_counter() - BEGAN
    if args.warmup > 1:
        timed(args, step, args.warmup - 1)

    block = args.block or (10 if on_gpu(args) else 1)
    times = []
    for done in range(0, args.steps, block):
        steps = min(block, args.steps - done)
        seconds, loss = timed(args, step, steps)
        times.append(seconds / steps)

    median = statistics.median(times)
    result = {
        "framework": "pytorch",
        "tokens_per_s": args.batch * args.seq / median,
        "step_s_median": median,
    }
    if on_gpu(args):
        result |= {
            "step_s_min": min(times),
            "step_s_max": max(times),
            "blocks": len(times),
            "first_step_s": first_s,
            "until_first_step_s": until_first_s,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
            "reserved_memory_bytes": torch.cuda.max_memory_reserved(),
            "loss": loss.item(),
            "precision": args.precision,
            "compile": args.compile_mode if args.compile else None,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(),
        }
    return result


def positive(text):
    """An integer of at least one, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--width", type=positive, default=768)
    parser.add_argument("--heads", type=positive, default=12)
    parser.add_argument("--vocab", type=positive, default=8192)
    parser.add_argument("--seq", type=positive, default=256, help="tokens a row")
    parser.add_argument("--batch", type=positive, default=4, help="rows a step, all micro-batches")
    parser.add_argument("--micro-batches", type=positive, default=1)
    parser.add_argument("--steps", type=positive, default=10, help="measured steps")
    parser.add_argument("--block", type=positive, help="steps timed together [default: 10 on a GPU, else 1]")
    parser.add_argument("--warmup", type=positive, default=2, help="steps before measuring")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--precision", choices=["f32", "tf32", "bf16"], default="f32", help="f32 is strict, bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="compile forward pass, loss and their gradient")
    parser.add_argument("--compile-mode", default="default", help="such as reduce-overhead, which replays CUDA graphs")
    args = parser.parse_args()
    if args.width % args.heads:
        parser.error(f"--width {args.width} must divide by --heads {args.heads}")
    if args.batch % args.micro_batches:
        parser.error(f"--batch {args.batch} must divide by --micro-batches {args.micro_batches}")
    return args


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    if on_gpu(args):
        torch.cuda.set_device(torch.device(args.device).index or 0)
    print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
