"""Writes small Hugging Face folders of decoders, and the losses and logits that transformers has with them.

    python tests/golden/decoders/make.py

Made with Python 3.11.7, torch 2.11.0 (CPU), transformers 5.24.0. Other versions may differ in the last digits.

Every model has vocab 256 (bytes), width 16, feed-forward 24, 2 layers, 4 heads of queries and 2 of keys, f32. Weights are
drawn wider than at Hugging Face's initialisation, so that attention and gates leave their linear range.

Text: 34 bytes. With `data.eval_fraction = 0.5` and `data.seq_len = 16` the first 17 are the only sequence to train on,
and the last 17 the only one held out.

Files, for each case NAME:
- NAME/config.json, NAME/model.safetensors  as `save_pretrained` writes them
- cases.json    by NAME: train, eval: mean cross-entropy in nats over 16 predictions; logits: of the first prediction of
                the held-out sequence's last position, all 256; steps: losses of five updates with SGD (lr 0.1) on the
                training sequence
- text.txt      the text
"""

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

HERE = Path(__file__).resolve().parent
TEXT = b"The machines, far apart, train on."
SEQ = 16
STEPS = 5
LR = 0.1

COMMON = dict(
    vocab_size=256,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


def rope(kind, **more):
    """Settings of rotary positions."""
    return dict(rope_type=kind, rope_theta=100.0, **more)


CASES = {
    "llama": LlamaConfig(**COMMON),
    "llama_tied_biased": LlamaConfig(
        **COMMON, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, hidden_act="gelu_pytorch_tanh"
    ),
    "llama_linear": LlamaConfig(**COMMON, rope_parameters=rope("linear", factor=4.0)),
    "llama_dynamic": LlamaConfig(**COMMON, rope_parameters=rope("dynamic", factor=4.0)),
    "llama_llama3": LlamaConfig(
        **COMMON,
        rope_parameters=rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama_yarn": LlamaConfig(
        **COMMON, rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16)
    ),
    "mistral": MistralConfig(**COMMON, head_dim=8, sliding_window=16),
    "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON, head_dim=8, attention_bias=True),
}


def loss(model, window):
    """Mean cross-entropy of the window's bytes but the first, each from those before it."""
    ids = torch.tensor([list(window)])
    logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits[0], ids[0, 1:])


def trained(model, window):
    """Losses before each of five updates."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        step = loss(model, window)
        step.backward()
        optimizer.step()
        losses.append(step.item())
    return losses


def case(name, config):
    """Writes the folder, and gives what is to be found with it."""
    torch.manual_seed(len(name))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, value in model.named_parameters():
            # Norms and biases that are all ones and zeros would hide mistakes.
            if "norm" in key:
                value.add_(0.3 * torch.randn_like(value))
            elif key.endswith("bias"):
                value.copy_(0.3 * torch.randn_like(value))
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    # What a user has is what was written.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    train, held_out = TEXT[: SEQ + 1], TEXT[SEQ + 1 :]
    with torch.no_grad():
        found = {"train": loss(model, train).item(), "eval": loss(model, held_out).item()}
        logits = model(input_ids=torch.tensor([list(held_out[:-1])])).logits[0, -1]
    found["logits"] = [round(x, 6) for x in logits.tolist()]
    found["steps"] = trained(model, train)
    return found


def main():
    torch.set_num_threads(1)
    assert len(TEXT) == 2 * (SEQ + 1)
    (HERE / "text.txt").write_bytes(TEXT)
    found = {name: case(name, config) for name, config in CASES.items()}
    (HERE / "cases.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
