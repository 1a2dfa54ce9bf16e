"""Divergence of SmolLM2's distribution of the next token with weights of 8 and 4 bits.

The distributions are compared with those of the float model, on text that the float model samples.
All linear layers are rounded, including the head; the embedding is not. The package ``gguf`` rounds
to its own formats. The weights of SmolLM2-135M come from a file of blocks Q4_1 (4 bits with a
minimum for 32 inputs), which Q4_1 can therefore store almost without a change.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from mtpc_samples import VERBS, question
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext import ops
from lora_ext.nn import pack_linears, unpack_linears

THINGS = ("the sea", "the moon", "the winter", "the desert", "the internet", "the heart")
ANSWERS, ANSWER_TOKENS = 8, 250  # 2,000 tokens
GROUPS = 32, 64, 128  # 128 does not divide the width of 576: rounded() pads it
#: Type of GGUF and bits per weight; a block of 32 has a float16 scale and, for Q4_1, a minimum.
GGUF_TYPES = {"Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5.0}


class Accuracy(NamedTuple):
    """Row of results/packed_accuracy.csv; means over the tokens of the answers."""

    format: str
    bits_per_weight: float
    tokens: int
    kl: float  # divergence of the rounded from the float model's distribution, in nats
    same_token: float  # share of tokens for which the most probable token is the same


def rounded(weight: Tensor, bits: int, group: int, minimum: bool) -> Tensor:
    """Return ``weight (O, I)`` as rounded by ``ops.pack_weight``."""
    wide = F.pad(weight, (0, -weight.shape[1] % group))
    packed = ops.pack_weight(wide, bits=bits, group=group, minimum=minimum)
    return ops.unpack_weight(packed, *wide.shape)[:, : weight.shape[1]]


def rounded_by_gguf(weight: Tensor, name: str) -> Tensor:
    """Return ``weight (O, I)`` as rounded to a type of GGUF by the package ``gguf``."""
    gguf: Any = importlib.import_module("gguf")
    kind = gguf.GGMLQuantizationType[name]
    codes = gguf.quants.quantize(weight.numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(codes, kind))


class Rounding(NamedTuple):
    """Format of a weight."""

    bits_per_weight: float
    round: Callable[[Tensor], Tensor]


def formats() -> dict[str, tuple[Rounding, Rounding]]:
    """Return the formats of the layers and of the head, by name."""
    each: dict[str, Rounding] = {}
    for bits, minimum in ((8, False), (4, False), (4, True)):
        for group in GROUPS:
            name = f"{bits} bits{', minimum' * minimum}, group {group}"
            how = {"bits": bits, "group": group, "minimum": minimum}
            size = bits + (32 if minimum else 16) / group
            each[name] = Rounding(size, functools.partial(rounded, **how))
    for name, size in GGUF_TYPES.items():
        each[f"GGUF {name}"] = Rounding(size, functools.partial(rounded_by_gguf, name=name))
    found = {name: (rounding, rounding) for name, rounding in each.items()}
    for group in GROUPS[:2]:
        own, eight = (each[f"{bits} bits, group {group}"] for bits in (4, 8))
        found[f"4 bits, group {group}; head 8 bits"] = own, eight
    found["GGUF Q4_0; head Q8_0"] = each["GGUF Q4_0"], each["GGUF Q8_0"]
    return found


def answers(model: Any, tokenizer: Any) -> tuple[Tensor, int]:
    """Return questions with sampled answers ``(B, T)``, and the number of tokens of a question."""
    asked = [question(tokenizer, verb, thing) for verb in VERBS for thing in THINGS]
    prompts = torch.stack([ids for ids in asked if len(ids) == len(asked[0])][:ANSWERS])
    torch.manual_seed(0)
    how: dict[str, Any] = {"max_new_tokens": ANSWER_TOKENS, "min_new_tokens": ANSWER_TOKENS}
    mask = torch.ones_like(prompts)
    ids = model.generate(
        prompts, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **how
    )
    return ids, prompts.shape[1]


@torch.no_grad()
def bench_accuracy(model: Any, tokenizer: Any) -> Iterator[Accuracy]:
    """Yield the accuracy of each format for a float32 model, and change its weights."""
    ids, start = answers(model, tokenizer)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), False)  # untied
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    weights = [layer.weight.clone() for layer in layers]
    exact = [_log_probabilities(model, row, start) for row in ids]

    def compared(name: str, size: float) -> Accuracy:
        kl, same = 0.0, 0
        for row, expected in zip(ids, exact, strict=True):
            found = _log_probabilities(model, row, start)
            kl += float(F.kl_div(found, expected, reduction="sum", log_target=True))
            same += int((found.argmax(-1) == expected.argmax(-1)).sum())
        count = sum(map(len, exact))
        return Accuracy(name, size, count, kl / count, same / count)

    for name, (of_layers, of_head) in formats().items():
        size = 0.0
        for layer, weight in zip(layers, weights, strict=True):
            own = of_head if layer is model.lm_head else of_layers
            layer.weight.copy_(own.round(weight))
            size += own.bits_per_weight * weight.numel()
        yield compared(name, size / sum(w.numel() for w in weights))
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.copy_(weight)
    for bits in (8, 4):
        pack_linears(model, bits=bits, group=64, activations="int8")
        yield compared(f"{bits} bits, group 64, int8 activations", bits + 0.25)
        unpack_linears(model)


def _log_probabilities(model: Any, row: Tensor, start: int) -> Tensor:
    """Return the log-probabilities ``(N, V)`` of the next token before each of the N answer
    tokens."""
    logits = model(row[None], logits_to_keep=len(row) - start + 1).logits[0, :-1]
    return logits.float().log_softmax(-1)
