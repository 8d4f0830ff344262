"""Writes conversations, the folders of small models with chat templates, and what transformers makes of them.

    python tests/golden/chat/make.py

Made with Python 3.11.7, torch 2.11.0 (CPU), transformers 5.24.0. Other versions may differ in the last digits.

Every folder has a byte-level BPE with some merges and the special tokens of its style, and a template in the manner of:
- chatml    Qwen: a default system message, no beginning of a text; in tokenizer_config.json
- llama3    Llama 3: headers, trimmed contents, `<|begin_of_text|>`; in chat_template.jinja
- mistral   Mistral: `[INST]`, roles that must alternate, the system message in the first question; in tokenizer_config.json
- marked    ChatML whose answers are enclosed in {% generation %}; in chat_template.jinja

chatml also has a Llama (config.json, model.safetensors): width 16, feed-forward 24, 2 layers, 4 heads of queries and 2 of
keys, f32.

- data.jsonl    the conversations, in all forms that a row may have
- cases.json    `tokens`, by folder: for each conversation its ids and which of them are of an answer. Where the template
                does not say that, it is what a rendering with the answer has more than one up to it with
                add_generation_prompt. `steps`: losses of five updates with SGD (lr 0.1) of the model in chatml, on four
                conversations a step in the order of the file, `eval`: its loss on those held out before that, both as
                F.cross_entropy with ignore_index over the whole batch. Sequences have 96 tokens, what has no answer among
                them is left out; the last fifth of the file by bytes is held out
"""

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama import LlamaConfig

HERE = Path(__file__).resolve().parent
SEQ, BATCH, STEPS, LR, HELD_OUT = 96, 4, 5, 0.1, 0.2

ROWS = [
    {"messages": [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Is it far?"},
        {"role": "assistant", "content": "Far."},
    ]},
    {"prompt": "Which machine trains the model?", "completion": "All of them, together."},
    {"messages": [
        {"role": "user", "content": "Hello, größe!"},
        {"role": "assistant", "content": "Hello. \U0001f600"},
        {"role": "user", "content": "  Count to three.\n"},
        {"role": "assistant", "content": "one, two, three"},
    ]},
    {"instruction": "Give the next word.", "input": "The machines, far", "output": "apart"},
    {"instruction": "Say nothing of it.", "output": "Nothing."},
    {
        "prompt": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}],
        "completion": [{"role": "assistant", "content": "D, which alone is learnt"}],
    },
    {"messages": [
        {"role": "user", "content": "What is a pipeline?"},
        {"role": "assistant", "content": "A line of machines: each holds a part of the model, and none holds all of it. " * 3},
    ]},
    {"prompt": "What is a pipeline, and what is it for? " * 4, "completion": "Too late for a sequence."},
    {"messages": [{"role": "user", "content": "{{ bos_token }} {% if x %}"}, {"role": "assistant", "content": "<b>&amp;</b>"}]},
    {"prompt": "Is the held-out part here?", "completion": "It is here, at the end of the file."},
    {"messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So that it fits."},
    ]},
]

CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{#- The system message, with the date. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"].strip() + eos_token}}
    {%- endif %}
{%- endfor %}
"""
MARKED = """{% for message in messages %}
    {% if message.role == 'assistant' %}
{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}

    {% else %}
{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
STYLES = {
    "chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
    ),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], dict(bos_token="<s>", eos_token="</s>")),
    "marked": (MARKED, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")),
}
IN_A_FILE = ["llama3", "marked"]


def conversation(row):
    """Messages of a row, and the number of the first whose answers are learnt."""
    if "messages" in row:
        return row["messages"], 0
    if "prompt" in row:
        side = lambda key, role: row[key] if isinstance(row[key], list) else [{"role": role, "content": row[key]}]
        prompt = side("prompt", "user")
        return prompt + side("completion", "assistant"), len(prompt)
    question = row["instruction"] + ("\n\n" + row["input"] if row.get("input") else "")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}], 1


def folder(name):
    """A folder with a tokenizer and a template."""
    template, special, named = STYLES[name]
    path = HERE / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([m["content"] for row in ROWS for m in conversation(row)[0]], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = template
    fast.save_pretrained(path, save_jinja_files=name in IN_A_FILE)
    fast = PreTrainedTokenizerFast.from_pretrained(path)
    assert fast.chat_template == template and (path / "chat_template.jinja").exists() == (name in IN_A_FILE)
    return fast


def tokens(fast, row, is_marked):
    """Ids of a conversation, and which of them are of an answer that is learnt."""
    messages, first = conversation(row)
    if is_marked:
        found = fast.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        learnt = list(found["assistant_masks"])
        if first:
            asked = len(fast.apply_chat_template(messages[:first], return_dict=True)["input_ids"])
            learnt = [0] * asked + learnt[asked:]
        return list(found["input_ids"]), learnt
    text = fast.apply_chat_template(messages, tokenize=False)
    encoded = fast(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"] == fast.apply_chat_template(messages, return_dict=True)["input_ids"]
    answer = [0] * len(encoded["input_ids"])
    for at in range(first, len(messages)):
        if messages[at]["role"] != "assistant":
            continue
        before = fast.apply_chat_template(messages[:at], tokenize=False, add_generation_prompt=True)
        after = fast.apply_chat_template(messages[: at + 1], tokenize=False)
        assert text.startswith(after) and after.startswith(before)
        for i, (start, end) in enumerate(encoded["offset_mapping"]):
            if start < len(after) and end > len(before):
                answer[i] = 1
    return encoded["input_ids"], answer


def batch(samples):
    """Ids, padded to a sequence, and the target of each position, -100 where there is none."""
    ids = torch.zeros(len(samples), SEQ, dtype=torch.long)
    targets = torch.full((len(samples), SEQ), -100)
    for row, (of, answer) in enumerate(samples):
        for at, (token, is_answer) in enumerate(list(zip(of, answer))[:SEQ]):
            ids[row, at] = token
            if at > 0 and is_answer:
                targets[row, at - 1] = token
    return ids, targets


def loss(model, samples):
    ids, targets = batch(samples)
    return F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def trained(vocab, train, held_out):
    """Writes the model, and gives what is found with it."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config._attn_implementation = "eager"
    path = HERE / "chatml"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        found = {"eval": loss(model, held_out).item(), "steps": []}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(STEPS):
        optimizer.zero_grad()
        of_step = loss(model, [train[(BATCH * step + i) % len(train)] for i in range(BATCH)])
        of_step.backward()
        optimizer.step()
        found["steps"].append(of_step.item())
    return found


def main():
    torch.set_num_threads(1)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]
    (HERE / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    found = {"tokens": {}}
    for name in STYLES:
        fast = folder(name)
        pairs = [tokens(fast, row, name == "marked") for row in ROWS]
        found["tokens"][name] = [{"ids": ids, "answer": answer} for ids, answer in pairs]
        if name == "chatml":
            sizes = [len(line.encode()) for line in lines]
            ends = [sum(sizes[: i + 1]) / sum(sizes) for i in range(len(sizes))]
            learnt = [(pair, end) for pair, end in zip(pairs, ends) if any(pair[1][1:SEQ])]
            train = [pair for pair, end in learnt if end <= 1 - HELD_OUT]
            held_out = [pair for pair, end in learnt if end > 1 - HELD_OUT]
            found |= trained(len(fast), train, held_out)
            found |= {"train_rows": len(train), "eval_rows": len(held_out)}
    (HERE / "cases.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
