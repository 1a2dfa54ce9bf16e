"""Measure tokens per second against the number of adapters in a batch.

The engines are the base model, PEFT, and lora_ext over the model's own weights and over a packed
copy of them. A batch of N rows has N different adapters, as for N simultaneous users. `make demo`
draws the first points of the curve; `make curve` (`python examples/serving_curve.py`) draws all
points.
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
from common import error_over_bound, interleaved
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from tqdm import tqdm
from training import ATTENTION, MLP

import lora_ext
from lora_ext.interop.smollm2 import load_smollm2

COUNTS = (1, 2, 4, 8, 16, 32, 64)
ENGINES = ("base, no adapters", "PEFT", "lora_ext", "lora_ext, base packed")
RANK = 16
UPDATE = 0.02  # factor of PEFT's random B: updates as large as after training
PROMPT, NEW_TOKENS = 8, 4  # tokens; short prompts, because decoding is measured
# Prompts begin like the texts that the model was trained on. After random first tokens, rounding
# errors may be a hundred times as large in every engine, and depend on the order of summation.
BEGINNING = "<|im_start|>user\n"


@dataclass(frozen=True)
class Curve:
    """Tokens per second of each engine, ``rates[engine][i]`` at ``counts[i]`` adapters."""

    counts: tuple[int, ...]
    rates: dict[str, list[float]]
    complaints: tuple[str, ...] = ()  # messages about wrong logits


def measure_curve(counts: Sequence[int] = COUNTS, rounds: int = 2, seed: int = 0) -> Curve:
    """Compare the logits of the engines and time them at each count.

    The adapters have random values, which do not change their cost.
    """
    torch.manual_seed(seed)
    plain, tokenizer = load_smollm2()
    begin = tokenizer(BEGINNING, add_special_tokens=False, return_tensors="pt").input_ids
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

    complaints: list[str] = []
    rates: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for count in tqdm(counts, desc="adapters", leave=False):
        some = names[:count]
        words = torch.randint(1000, 40000, (count, PROMPT - begin.shape[1]))
        ids = torch.cat([begin.expand(count, -1), words], 1)
        complaints += compare(ours, peers, ids, some)
        engines = [plain, peers, *ours]
        named = [{}, *[{"adapter_names": some}] * 3]
        calls = {
            name: functools.partial(generate, model, ids, **which)
            for name, model, which in zip(ENGINES, engines, named, strict=True)
        }
        times = interleaved(calls, rounds, warm_up=0)
        for engine, time in times.items():
            rates[engine].append(count * NEW_TOKENS / time.median)
    return Curve(tuple(counts), rates, tuple(complaints))


def serve(peers: Any, config: LoraConfig, names: Sequence[str], packed: bool) -> Any:
    """Load the base model and attach a pool with PEFT's adapters to it."""
    served, _ = load_smollm2()
    pool = lora_ext.AdapterPool(served, max_slots=len(names), max_rank=RANK)
    for name in names:
        pool.load(name, (config.to_dict(), get_peft_model_state_dict(peers, adapter_name=name)))
    return lora_ext.attach(served, pool, pack_base=packed)


@torch.inference_mode()
def generate(model: Any, ids: Tensor, **names: Any) -> None:
    """Generate a few tokens for every row."""
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length, **names)


@torch.inference_mode()
def compare(ours: Sequence[Any], peers: Any, ids: Tensor, names: list[str]) -> list[str]:
    """Compare the logits of ``ours`` for whole prompts, and for one token per row as in decoding.

    Returns:
        One message per case with wrong logits.
    """
    exact = exact_logits(peers, {"input_ids": ids}, names)
    complaints = []
    for engine, served in zip(ENGINES[2:], ours, strict=True):
        for length in (PROMPT, 1):
            given: dict[str, Any] = {"input_ids": ids[:, :length], "adapter_names": names}
            found, theirs = served(**given).logits, peers(**given).logits
            what = f"{engine}, {len(names)} adapters, {length} tokens per row"
            complaints += complain(what, found, theirs, exact[:, :length])
    return complaints


@torch.no_grad()
def exact_logits(peers: Any, batch: dict[str, Tensor], names: list[str]) -> Tensor:
    """Return PEFT's logits in float64, except for norms, which transformers computes in float32.

    To avoid a second copy, the weights are converted in place and back, which changes no bit.
    """
    try:
        return peers.double()(**batch, adapter_names=names).logits
    finally:
        peers.float()


def complain(what: str, ours: Tensor, peer: Tensor, exact: Tensor) -> list[str]:
    """Return a list with one message if logits are wrong, otherwise an empty list."""
    over = error_over_bound(ours, peer, exact)
    if over <= 1:
        return []
    error, theirs = ((found - exact).abs().max().item() for found in (ours, peer))
    return [
        f"{what}: largest error of a logit against float64: expected at most {error / over:.1e}, "
        f"found {error:.1e} (PEFT's error is {theirs:.1e}, the largest logit "
        f"{exact.abs().max():.1f}). Please report this with the whole output and that of "
        "`lora-ext doctor`."
    ]


def draw_curve(curve: Curve, path: Path) -> Path:
    """Draw the curve with both axes in powers of two.

    If the curve is a straight line, an additional row does not slow down the other rows.
    """
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
    axes.set_xlabel("rows of the batch, each with a different adapter")
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
    sys.exit("\n".join(found.complaints) or None)
