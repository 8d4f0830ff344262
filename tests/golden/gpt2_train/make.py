"""Writes the golden training fixture of a small GPT-2, from Hugging Face's own model.

    python tests/golden/gpt2_train/make.py

Made with Python 3.11.7, torch 2.15.0 (CPU), transformers 5.23.0, safetensors 0.8.0.
The run is deterministic (one thread, fixed seeds); other versions may differ in the last digits.

Model: GPT2LMHeadModel, vocab 96, positions 32, width 32, 3 layers, 4 heads, no dropout,
gelu_new, tied embeddings, f32.

Training, 20 steps:
- A step takes 8 rows of 16 tokens as 4 micro-batches: rows 0-1, 2-3, 4-5, 6-7.
- A micro-batch's loss is the mean over its tokens of cross-entropy of logits[b, t] against
  labels[b, t] (no shift). Its gradient is scaled by 1/4 and summed; a step's loss is the
  mean of the 4 losses, taken before the update.
- Then the gradient is clipped to global norm 1.0 over all parameters, the tied weight counted
  once: factor min(1, 1.0 / (norm + 1e-6)). The norm recorded is the one before clipping.
- "adamw": betas (0.9, 0.95), eps 1e-8, weight decay 0.1 on parameters of two or more
  dimensions only (the embeddings included), lr of `learning_rate`.
- "sgd": momentum 0.9 (no dampening, no Nesterov), no decay, lr 0.1.
Both runs start at the same weights and see the same tokens.

Files, beside this one:
- weights.safetensors  the initial state dict, Hugging Face keys, without lm_head.weight
- tokens.safetensors   inputs, labels: i32 [20, 8, 16]
- logits.safetensors   logits: f32 [2, 16, 96], the initial model on inputs[0, 0:2]
- losses.json          adamw, sgd, adamw_grad_norm, sgd_grad_norm: 20 numbers each
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).resolve().parent
VOCAB = 96
STEPS, BATCH, SEQ = 20, 8, 16
MICRO_BATCHES = 4
CLIP = 1.0
PEAK_LR, MIN_LR, WARMUP = 1e-2, 1e-3, 5
SGD_LR = 0.1
NOISE = 0.1


def make_model():
    """The small GPT-2 at its Hugging Face initialisation, in training mode."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=32,
        n_embd=32,
        n_layer=3,
        n_head=4,
        activation_function="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).train()


def make_tokens():
    """Random inputs and the labels (3 * input + 1) % 96, a tenth of them replaced by noise."""
    generator = torch.Generator().manual_seed(1)
    shape = (STEPS, BATCH, SEQ)
    inputs = torch.randint(VOCAB, shape, generator=generator)
    noise = torch.randint(VOCAB, shape, generator=generator)
    noisy = torch.rand(shape, generator=generator) < NOISE
    labels = torch.where(noisy, noise, (3 * inputs + 1) % VOCAB)
    return inputs, labels


def learning_rate(step):
    """Linear warm-up over 5 steps, then cosine from the peak towards a tenth of it."""
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    progress = (step - WARMUP) / (STEPS - WARMUP)
    return MIN_LR + 0.5 * (PEAK_LR - MIN_LR) * (1 + math.cos(math.pi * progress))


def make_adamw(model):
    """AdamW with decay on the parameters of two or more dimensions."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), eps=1e-8)


def make_sgd(model):
    """SGD with momentum and without decay."""
    return torch.optim.SGD(model.parameters(), lr=SGD_LR, momentum=0.9)


def train(model, optimizer, schedule, inputs, labels):
    """Trains over all steps; returns each step's loss and gradient norm before clipping."""
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.zero_grad()
        total = 0.0
        micro_inputs = inputs[step].chunk(MICRO_BATCHES)
        micro_labels = labels[step].chunk(MICRO_BATCHES)
        for ids, targets in zip(micro_inputs, micro_labels, strict=True):
            logits = model(input_ids=ids).logits
            loss = F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
            (loss / MICRO_BATCHES).backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(total / MICRO_BATCHES)
        norms.append(norm.item())
    return losses, norms


def write_losses(path, series):
    """Writes the series as JSON, numbers to nine significant digits."""
    lines = [
        f'  "{name}": [{", ".join(f"{value:.9g}" for value in values)}]'
        for name, values in series.items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    inputs, labels = make_tokens()

    model = make_model()
    weights = {
        name: tensor.detach().clone().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    with torch.no_grad():
        logits = model(input_ids=inputs[0, :2]).logits.contiguous()

    adamw_losses, adamw_norms = train(model, make_adamw(model), learning_rate, inputs, labels)
    model.load_state_dict(weights, strict=False)
    sgd_losses, sgd_norms = train(model, make_sgd(model), lambda _: SGD_LR, inputs, labels)

    save_file(weights, HERE / "weights.safetensors", metadata={"format": "pt"})
    tokens = {"inputs": inputs.to(torch.int32), "labels": labels.to(torch.int32)}
    save_file(tokens, HERE / "tokens.safetensors")
    save_file({"logits": logits}, HERE / "logits.safetensors")
    write_losses(
        HERE / "losses.json",
        {
            "adamw": adamw_losses,
            "sgd": sgd_losses,
            "adamw_grad_norm": adamw_norms,
            "sgd_grad_norm": sgd_norms,
        },
    )


if __name__ == "__main__":
    main()
