"""Tokens per second against the number of adapters in a batch: base model, PEFT, lora_ext over the
model's own weights and over a packed copy of them.

A batch of N rows has N different adapters, as when N users are served at once. The demo draws it;
`python examples/serving_curve.py` does so alone.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import torch
from common import interleaved
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from tqdm import tqdm
from training import ATTENTION, MLP

import lora_ext
from lora_ext.interop.smollm2 import load_smollm2

COUNTS = (1, 2, 4, 8, 16, 32, 64)
ENGINES = ("base, no adapters", "PEFT", "lora_ext", "lora_ext, base packed")
RANK = 16
UPDATE = 0.02  # of PEFT's random B: as large as what training makes, so that the model stays one
PROMPT, NEW_TOKENS = 8, 4  # tokens: what is to be seen is the decoding
# Of the largest logit. PEFT's base products are ours bit for bit, so only the updates are rounded
# by themselves; those of a packed base are sums in an order of their own (docs/packed.md, "Bits").
# On the worst prompt that was met PEFT itself is 0.4 x 2^-13 away from float64, where it is 0.02 x
# as a rule, and a packed base 0.8 x on the other side.
LOGIT_BOUND, PACKED_BOUND = 2.0**-16, 2.0**-11


@dataclass(frozen=True)
class Curve:
    """Tokens per second of each engine, ``rates[engine][i]`` at ``counts[i]`` adapters."""

    counts: tuple[int, ...]
    rates: dict[str, list[float]]


def measure_curve(counts: Sequence[int] = COUNTS, rounds: int = 2, seed: int = 0) -> Curve:
    """Time the engines at each count; their logits are compared first.

    Adapters have random values: what they say is nonsense, what they cost is not.

    Raises:
        SystemExit: if lora_ext's logits are not PEFT's.
    """
    torch.manual_seed(seed)
    plain, _ = load_smollm2()
    names = [f"user{i}" for i in range(max(counts))]
    config = LoraConfig(r=RANK, target_modules=[*ATTENTION, *MLP], init_lora_weights=False)
    peers: Any = get_peft_model(load_smollm2()[0], config, adapter_name=names[0])
    for name in tqdm(names[1:], desc="PEFT's adapters", leave=False):
        peers.add_adapter(name, config)
    for key, value in peers.named_parameters():
        if ".lora_B." in key:
            value.data.mul_(UPDATE)
    peers.eval()
    ours = [serve(peers, config, names, packed) for packed in (False, True)]

    rates: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for count in tqdm(counts, desc="adapters", leave=False):
        some = names[:count]
        ids = torch.randint(1000, 40000, (count, PROMPT))
        for served, bound in zip(ours, (LOGIT_BOUND, PACKED_BOUND), strict=True):
            check(served, peers, ids, some, bound)
            check(served, peers, ids[:, :1], some, bound)  # as many rows as a step has
        engines = [plain, peers, *ours]
        named = [{}, *[{"adapter_names": some}] * 3]
        calls = {
            name: functools.partial(generate, model, ids, **which)
            for name, model, which in zip(ENGINES, engines, named, strict=True)
        }
        times = interleaved(calls, rounds, warm_up=0)
        for engine, time in times.items():
            rates[engine].append(count * NEW_TOKENS / time.median)
    return Curve(tuple(counts), rates)


def serve(peers: Any, config: LoraConfig, names: Sequence[str], packed: bool) -> Any:
    """A model with PEFT's adapters in a pool."""
    served, _ = load_smollm2()
    pool = lora_ext.AdapterPool(served, max_slots=len(names), max_rank=RANK)
    for name in names:
        pool.load(name, (config.to_dict(), get_peft_model_state_dict(peers, adapter_name=name)))
    return lora_ext.attach(served, pool, pack_base=packed)


@torch.inference_mode()
def generate(model: Any, ids: Tensor, **names: Any) -> None:
    """A few tokens for every row."""
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length, **names)


@torch.inference_mode()
def check(served: Any, peers: Any, ids: Tensor, names: list[str], bound: float) -> None:
    """Logits of both engines agree, up to a share of the largest."""
    ours = served(input_ids=ids, adapter_names=names).logits
    theirs = peers(input_ids=ids, adapter_names=names).logits
    difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if not difference <= bound * largest:
        raise SystemExit(
            f"serving_curve: largest logit difference to PEFT with {len(names)} adapters: expected "
            f"at most {bound * largest:.1e}, found {difference:.1e}"
        )


def draw_curve(curve: Curve, path: Path) -> Path:
    """Both axes in powers of two: a straight line serves each further user at no cost to others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    styles = (("#777777", "o"), ("#d98c3f", "s"), ("#2f6fc9", "D"), ("#3a9a6b", "^"))
    for (engine, rate), (colour, marker) in zip(curve.rates.items(), styles, strict=True):
        axes.plot(curve.counts, rate, color=colour, marker=marker, label=engine)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(curve.counts, [str(count) for count in curve.counts])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("rows of the batch, each with an adapter of its own")
    axes.set_ylabel("tokens per second, all rows")
    axes.set_title(
        f"SmolLM2-135M, rank {RANK} on all linear layers, {torch.get_num_threads()} CPU threads",
        fontsize="medium",
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    found = measure_curve()
    for engine, rate in found.rates.items():
        print(f"{engine:>22}: " + " ".join(f"{r:8.1f}" for r in rate))
    print(draw_curve(found, Path(__file__).resolve().parents[1] / "out/demo/serving_curve.png"))
