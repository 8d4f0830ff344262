"""Loads adapters that `fusionllm export` wrote in peft, and prints what they score.

    python tests/golden/lora/check.py MODEL ADAPTERS [MERGED]

MODEL is the Hugging Face folder that the adapters are of, MERGED what `fusionllm export --merge` wrote. Prints the mean
cross-entropy of the held-out sequence of make.py's text by the adapters as they are, merged by peft, and by MERGED.
"""

import sys

import torch
from make import SEQ, TEXT, loss
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main():
    folder, adapters, *merged = sys.argv[1:]
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        model = PeftModel.from_pretrained(load(folder), adapters).eval()
        print("adapters", loss(model, TEXT[SEQ + 1 :]).item())
        print("merged by peft", loss(model.merge_and_unload(), TEXT[SEQ + 1 :]).item())
        for path in merged:
            print("merged", loss(load(path).eval(), TEXT[SEQ + 1 :]).item())


if __name__ == "__main__":
    main()
