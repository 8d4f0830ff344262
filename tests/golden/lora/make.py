"""Writes small PEFT folders of adapters, and the losses and logits that peft and transformers have with them.

    python tests/golden/lora/make.py

Made with Python 3.11.7, torch 2.15.0 (CPU), transformers 5.24.0, peft 0.21.2. Other versions may differ in
the last digits.

The models are those of ../decoders and ../gpt2_folder. Adapters begin with a B that is not zero, so that they count from
the first step. Text and split are those of ../decoders/make.py: the first 17 bytes are the only sequence to train on, the
last 17 the only one held out.

Files, for each case NAME:
- NAME/adapter_config.json, NAME/adapter_model.safetensors  as `save_pretrained` writes them
- cases.json    by NAME: base: the folder of the model; job: settings of the job; eval: mean cross-entropy of the held-out
                sequence in nats; logits: of its last position, all 256, merged: the same of the model with its adapters
                merged; steps: losses of five updates on the training sequence
"""

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
TEXT = b"The machines, far apart, train on."
SEQ = 16
STEPS = 5
DECODERS = "../decoders/"
ADAMW = {"train.optimizer": "adamw", "train.lr": 0.01, "train.weight_decay": 0.1, "train.clip": 0.5}
SGD = {"train.optimizer": "sgd", "train.lr": 0.5, "train.weight_decay": 0.0, "train.clip": 0.0}

# By name: the model, the adapters, and how they are trained.
CASES = {
    "gpt2": ("../gpt2_folder/hf", dict(r=3, lora_alpha=7, target_modules=["c_attn", "c_proj", "c_fc"]), ADAMW),
    "gpt2_attention": ("../gpt2_folder/hf", dict(r=2, lora_alpha=4, target_modules=["attn.c_proj"]), SGD),
    "llama": (DECODERS + "llama", dict(r=4, lora_alpha=8, target_modules="all-linear"), ADAMW),
    "mistral": (DECODERS + "mistral", dict(r=4, lora_alpha=4, use_rslora=True, target_modules=["o_proj"]), SGD),
    "qwen2": (DECODERS + "qwen2", dict(r=2, lora_alpha=4), SGD),
    "qwen3": (DECODERS + "qwen3", dict(r=4, lora_alpha=8, target_modules=["k_proj", "down_proj"]), ADAMW),
}


def base(folder):
    """The model without adapters."""
    return AutoModelForCausalLM.from_pretrained(HERE / folder, dtype=torch.float32, attn_implementation="eager").eval()


def loss(model, window):
    """Mean cross-entropy of the window's bytes but the first, each from those before it."""
    ids = torch.tensor([list(window)])
    return F.cross_entropy(model(input_ids=ids[:, :-1]).logits[0], ids[0, 1:])


def last(model, window):
    """Logits of the window's last position."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(window)])).logits[0, -1]
    return [round(x, 6) for x in logits.tolist()]


def trained(model, window, job):
    """Losses before each of five updates."""
    params = [value for value in model.parameters() if value.requires_grad]
    decay = job["train.weight_decay"]
    if job["train.optimizer"] == "adamw":
        optimizer = torch.optim.AdamW(params, lr=job["train.lr"], betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(params, lr=job["train.lr"])
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        step = loss(model, window)
        step.backward()
        if job["train.clip"] > 0:
            torch.nn.utils.clip_grad_norm_(params, job["train.clip"])
        optimizer.step()
        losses.append(step.item())
    return losses


def case(name, folder, settings, job):
    """Writes the adapters, and gives what is to be found with them."""
    torch.manual_seed(len(name))
    model = get_peft_model(base(folder), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.copy_(0.3 * torch.randn_like(value))
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    config = json.loads((out / "adapter_config.json").read_text())
    # The path of this machine.
    config["base_model_name_or_path"] = folder
    config["target_modules"] = sorted(config["target_modules"])
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    # What a user has is what was written.
    model = PeftModel.from_pretrained(base(folder), out, is_trainable=True).eval()
    train, held_out = TEXT[: SEQ + 1], TEXT[SEQ + 1 :]
    with torch.no_grad():
        found = {"base": folder, "job": job, "eval": loss(model, held_out).item()}
    found["logits"] = last(model, held_out[:-1])
    found["steps"] = trained(model, train, job)
    merged = PeftModel.from_pretrained(base(folder), out).merge_and_unload()
    found["merged"] = last(merged, held_out[:-1])
    return found


def main():
    torch.set_num_threads(1)
    found = {name: case(name, *of) for name, of in CASES.items()}
    (HERE / "cases.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
