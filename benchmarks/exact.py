"""Measure the cost of batch-invariant results: `python benchmarks/exact.py [--check]`.

The first cases are attention alone: `ops.row_attention` and torch's, on causal prompts of SmolLM2's
shape. The other cases are SmolLM2-135M, plain and exact, with shared weights: a prefill of 512
tokens, a decode step of 1 and of 8 rows over 512 tokens, and a training step, forward and backward
of 4 x 128 tokens with an adapter of rank 16. A ratio is the time of the exact model over that of
the plain model, as the median of the rounds of one run. Before timing, the results of both are
compared.

`--check` prints the target of each ratio, and exits with 1 if one is missed; `--tiny` uses a small
random model; `--dtype bfloat16` uses 16 bits. The machine must be idle; the number of threads is
torch's default.
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
from common import Call, error_over_bound, interleaved
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import lora_ext
from lora_ext import nn, ops


class Sizes(NamedTuple):
    """Lengths of a prompt, of a training row, and of the prompts for attention alone."""

    prompt: int = 512
    train: int = 128
    attention: tuple[int, ...] = (128, 512, 1024)


class Ratio(NamedTuple):
    """Result of one comparison: time of exact over plain, and its upper limit."""

    case: str
    plain_ms: float
    over: float
    most: float


def tiny_model() -> Any:
    """Return a random Llama of two layers."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, **heads)
    return LlamaForCausalLM(config)


def pair(model: Any, rank: int = 0) -> dict[str, Any]:
    """Return the plain model, an exact model with the same weights, and a copy in float64.

    If ``rank`` is not 0, each model has an adapter.
    """
    model = model.eval().requires_grad_(False)
    if rank:
        model = nn.wrap(model, lora_ext.LoraConfig(r=rank))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    other = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    wide = copy.deepcopy(model).double()
    return {"plain": model.eval(), "exact": lora_ext.exact(other.eval()), "float64": wide.eval()}


def cache_name(model: Any) -> str:
    """Return the name of the cache argument, which transformers has renamed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def prefill(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def decode(model: Any, ids: Tensor, cache: DynamicCache) -> Tensor:
    """Run a decode step on the last token of each row; the cache is unchanged afterwards."""
    with torch.no_grad():
        logits = model(ids[:, -1:], **{cache_name(model): cache}).logits
    cache.crop(-1)
    return logits


def train(model: Any, ids: Tensor) -> Tensor:
    found = model(ids, labels=ids, use_cache=False)
    found.loss.backward()
    model.zero_grad(set_to_none=True)
    return found.logits.detach()


Case = tuple[str, dict[str, Call], float]  # name, calls, target


def draw(model: Any, rows: int, tokens: int) -> Tensor:
    g = torch.Generator().manual_seed(rows)
    return torch.randint(model.config.vocab_size, (rows, tokens), generator=g)


def serving(models: dict[str, Any], sizes: Sizes) -> Iterator[Case]:
    """Yield the cases of serving: a prefill, and decode steps of 1 and 8 rows."""
    ids = draw(models["plain"], 1, sizes.prompt)
    calls: dict[str, Call] = {k: lambda m=m: prefill(m, ids) for k, m in models.items()}
    yield f"prefill of {sizes.prompt}", calls, 1.5
    for rows in (1, 8):
        ids, calls = draw(models["plain"], rows, sizes.prompt + 1), {}
        for kind, model in models.items():
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(ids[:, :-1], **{cache_name(model): cache}, logits_to_keep=1)
            calls[kind] = lambda m=model, ids=ids, c=cache: decode(m, ids, c)
        yield f"decode step, {rows} x 1 over {sizes.prompt}", calls, 1.1


def training(models: dict[str, Any], sizes: Sizes) -> Iterator[Case]:
    ids = draw(models["plain"], 4, sizes.train)
    calls: dict[str, Call] = {k: lambda m=m: train(m, ids) for k, m in models.items()}
    yield f"training step, 4 x {sizes.train}", calls, 1.5


def attention(dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """Yield the cases of attention alone, with SmolLM2's nine query heads and three key heads."""
    for tokens in sizes.attention:
        g = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(1, tokens, heads, 64, generator=g).to(dtype).transpose(1, 2)
            for heads in (9, 3, 3)
        )
        plain = functools.partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        calls: dict[str, Call] = {
            "plain": functools.partial(plain, q, k, v),
            "exact": functools.partial(ops.row_attention, q, k, v, causal=True),
            "float64": functools.partial(plain, q.double(), k.double(), v.double()),
        }
        yield f"attention alone, causal, {tokens}", calls, 2.0


def measure(
    model: Any, rank: int, sizes: Sizes, rounds: int, min_seconds: float
) -> Iterator[Ratio]:
    """Check the results of each case, then yield its ratio. This adds an adapter to ``model``.

    Raises:
        SystemExit: If the results of a case differ.
    """

    def cases() -> Iterator[Case]:
        yield from attention(model.dtype, sizes)
        yield from serving(pair(model), sizes)
        yield from training(pair(model, rank), sizes)

    for case, calls, most in cases():
        worst = error_over_bound(*(calls[kind]() for kind in ("exact", "plain", "float64")))  # pyright: ignore[reportArgumentType]
        if not worst <= 1:
            raise SystemExit(f"exact: {case}: the error is {worst:.3g} times its bound")
        del calls["float64"]
        times = interleaved(calls, rounds, min_seconds)
        over = times["exact"].over(times["plain"])
        yield Ratio(case, 1e3 * times["plain"].median, over, most)


def main() -> None:
    parser = argparse.ArgumentParser(description="cost of batch-invariant results")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="use a small random model")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    args = parser.parse_args()
    if args.tiny:
        model, sizes, rank = tiny_model(), Sizes(24, 8, (16,)), 2
    else:
        from lora_ext.interop.smollm2 import load_smollm2

        model, sizes, rank = load_smollm2()[0], Sizes(), 16
    model, missed = model.to(getattr(torch, args.dtype)), 0
    print(f"{args.dtype}, {torch.get_num_threads()} threads: exact over plain")
    for found in measure(model, rank, sizes, args.rounds, min_seconds=0.0 if args.tiny else 0.2):
        bad = found.over > found.most
        missed += bad
        target = f" (target {found.most}{', missed' if bad else ''})" if args.check else ""
        print(f"{found.case:36} {found.over:5.2f}{target}, plain {found.plain_ms:.3g} ms")
    sys.exit(1 if args.check and missed else 0)


if __name__ == "__main__":
    main()
