"""Writes a small Hugging Face folder of a GPT-2, and the losses that transformers has with it.

    python tests/golden/gpt2_folder/make.py

Made with Python 3.11.7, torch 2.15.0 (CPU), transformers 5.24.0. Other versions may differ in the last digits.

Model: GPT2LMHeadModel, vocab 256 (bytes), positions 32, width 16, 2 layers, 2 heads, no dropout, f32. Weights are
drawn wider than at Hugging Face's initialisation, so that attention and GELU leave their linear range.

Text: 34 bytes. With `data.eval_fraction = 0.5` and `data.seq_len = 16` the first 17 are the only sequence to train on,
and the last 17 the only one held out.

Files, beside this one:
- hf/config.json, hf/model.safetensors  as `save_pretrained` writes them
- text.txt                              the text
- losses.json                           train, eval: mean cross-entropy in nats over 16 predictions
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).resolve().parent
TEXT = b"The machines, far apart, train on."
SEQ = 16


def make_model():
    """The small GPT-2, in f32."""
    config = GPT2Config(
        vocab_size=256,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval()


def loss(model, window):
    """Mean cross-entropy of the window's bytes but the first, each from those before it."""
    ids = torch.tensor([list(window)])
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits[0], ids[0, 1:]).item()


def main():
    torch.set_num_threads(1)
    model = make_model()
    model.save_pretrained(HERE / "hf")
    (HERE / "hf" / "generation_config.json").unlink(missing_ok=True)
    # What a user has is what was written.
    model = GPT2LMHeadModel.from_pretrained(HERE / "hf", dtype=torch.float32, attn_implementation="eager").eval()
    assert len(TEXT) == 2 * (SEQ + 1)
    (HERE / "text.txt").write_bytes(TEXT)
    losses = {"train": loss(model, TEXT[: SEQ + 1]), "eval": loss(model, TEXT[SEQ + 1 :])}
    (HERE / "losses.json").write_text(json.dumps(losses, indent=2) + "\n")


if __name__ == "__main__":
    main()
