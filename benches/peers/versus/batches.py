"""The token windows that FusionLLM trains and evaluates on, drawn anew in Python: byte tokenizer, one ASCII file.

The windows of a step come from ChaCha8 seeded by a hash of the job's seed and the step, as in
crates/fusionllm-compnode/src/data.rs and the crates rand and rand_chacha 0.10.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from versus.setting import Setting

MASK32 = 0xFFFF_FFFF
MASK64 = 0xFFFF_FFFF_FFFF_FFFF
QUARTERS = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
            (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]  # fmt: skip


class Batches:
    """Micro-batches of inputs and labels, i64 [B, S]; the label of a position is the token after it."""

    def __init__(self, setting: Setting) -> None:
        text = setting.corpus.read_bytes()
        held_out = math.ceil(len(text) * setting.recipe.eval_fraction)
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.train_tokens, self.eval_tokens = tokens[: len(text) - held_out], tokens[len(text) - held_out :]
        self.setting = setting

    def train(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The global batch of a step, counted from 0."""
        shape = self.setting.shape
        words = chacha8_words(batch_seed(self.setting.recipe.seed, step))
        last = len(self.train_tokens) - shape.seq - 1
        return self._windows(self.train_tokens, [below(last + 1, words) for _ in range(shape.batch)])

    def eval(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The evaluation, in global batches."""
        shape = self.setting.shape
        count = shape.rows * self.setting.recipe.eval_batches
        last = len(self.eval_tokens) - shape.seq - 1
        starts = [last * i // max(count - 1, 1) for i in range(count)]
        groups = [starts[i : i + shape.batch] for i in range(0, count, shape.batch)]
        return [self._windows(self.eval_tokens, group) for group in groups]

    def _windows(self, tokens: torch.Tensor, starts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        seq = self.setting.shape.seq
        inputs = torch.stack([tokens[s : s + seq] for s in starts])
        labels = torch.stack([tokens[s + 1 : s + 1 + seq] for s in starts])
        return inputs, labels


def batch_seed(seed: int, step: int) -> int:
    """The 64-bit FNV-1a hash that FusionLLM seeds the draws of a step with."""
    state = 0xCBF2_9CE4_8422_2325
    parts = [seed.to_bytes(8, "little")]
    for part in (b"batch", step.to_bytes(8, "little")):
        parts += [part, len(part).to_bytes(8, "little")]
    for byte in b"".join(parts):
        state = (state ^ byte) * 0x0100_0000_01B3 & MASK64
    return state


def pcg32(state: int) -> tuple[int, int]:
    """The next state and word of the generator that spreads a 64-bit seed over a ChaCha key."""
    state = (state * 0x5851_F42D_4C95_7F2D + 0xA176_54E4_6FBE_17F3) & MASK64
    shifted = (((state >> 18) ^ state) >> 27) & MASK32
    turn = state >> 59
    return state, (shifted >> turn | shifted << (-turn & 31)) & MASK32


def chacha8_words(seed: int) -> Iterator[int]:
    """The 32-bit words of `ChaCha8Rng::seed_from_u64(seed)`."""
    key = []
    for _ in range(8):
        seed, word = pcg32(seed)
        key.append(word)
    constants = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574]
    block = 0
    while True:
        start = constants + key + [block & MASK32, block >> 32, 0, 0]
        state = list(start)
        for _ in range(4):
            for quarter in QUARTERS:
                quarter_round(state, *quarter)
        yield from ((a + b) & MASK32 for a, b in zip(state, start, strict=True))
        block += 1


def quarter_round(state: list[int], a: int, b: int, c: int, d: int) -> None:
    """ChaCha's mixing of four words."""
    for into, other, changed, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        state[into] = (state[into] + state[other]) & MASK32
        word = state[changed] ^ state[into]
        state[changed] = (word << turn | word >> (32 - turn)) & MASK32


def below(count: int, words: Iterator[int]) -> int:
    """A uniform integer below `count`, drawn as the crate rand does (Canon's method, one correction)."""
    product = next(words) * count
    result, low = product >> 32, product & MASK32
    if low > -count & MASK32:
        result += low + (next(words) * count >> 32) > MASK32
    return result
