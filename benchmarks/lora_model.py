"""Cases of `--matrix model swap`: a random model of SmolLM2's shape with many adapters.

The model without adapters, PEFT with ``adapter_names``, and lora_ext share one set of base weights.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
import transformers
from common import Call, error_over_bound, interleaved
from peft import LoraConfig, get_peft_model
from row import Row, timing_columns
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lora_ext

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
NAMES = [f"adapter{i}" for i in range(16)]
CONTEXT = 32  # tokens in the KV cache of a decode step


@dataclass
class Engines:
    """Three models that share the base weights; two of them have the same adapters."""

    plain: Any
    peft: Any
    ours: Any
    pool: lora_ext.AdapterPool


def build(folder: Path, layers: int = 30) -> Engines:
    """Return engines with random weights; write the adapters to ``folder`` in PEFT's format."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # deprecated names
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    plain = LlamaForCausalLM(config).eval().requires_grad_(False)
    ours = _sharing_weights(plain)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=MODULES, init_lora_weights=False)
    peft = get_peft_model(_sharing_weights(plain), lora, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        peft.add_adapter(name, lora)
    peft.eval().requires_grad_(False)
    peft.save_pretrained(str(folder), selected_adapters=NAMES, save_embedding_layers=False)
    pages = len(NAMES) * RANK // 8
    pool = lora_ext.AdapterPool(
        ours, max_slots=len(NAMES), max_rank=RANK, pages=pages, targets=MODULES
    )
    for name in NAMES:
        pool.load(name, adapter_folder(folder, name))
    return Engines(plain, peft, lora_ext.attach(ours, pool), pool)


def adapter_folder(folder: Path, name: str) -> Path:
    """Return the folder in which PEFT saved the adapter."""
    return folder / name


def _sharing_weights(model: Any) -> Any:
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


class Step:
    """Forward of an engine: a prefill, or a decode step over a cache of CONTEXT tokens."""

    def __init__(self, model: Any, tokens: Tensor, names: list[str], engine: str, decode: bool):
        self.model, self.names, self.engine = model, names, engine
        self.cache = None
        self.tokens = tokens
        if decode:
            self.cache = self._forward(tokens[:, :CONTEXT], use_cache=True).past_key_values
            self.tokens = tokens[:, CONTEXT : CONTEXT + 1]

    def __call__(self) -> Tensor:
        """Return the logits of the last token of every row."""
        if self.cache is None:
            return self._forward(self.tokens, use_cache=True, logits_to_keep=1).logits
        logits = self._forward(self.tokens, past_key_values=self.cache, use_cache=True).logits
        self.cache.crop(-1)  # so that every call follows CONTEXT tokens
        return logits

    def _forward(self, tokens: Tensor, **options: Any) -> Any:
        if self.engine == "peft":
            options["adapter_names"] = self.names
        if self.engine == "lora_ext":
            with lora_ext.adapters(self.names):
                return self.model(tokens, **options)
        return self.model(tokens, **options)


@torch.inference_mode()
def bench_model(engines: Engines, rounds: int) -> Iterator[Row]:
    """Yield the rows of decode steps with 16 and 8 adapters, and of a prefill with 8. Each row of a
    batch has a different adapter."""
    models = {"base": engines.plain, "peft": engines.peft, "lora_ext": engines.ours}
    cases = (
        ("decode", 16, CONTEXT + 1, rounds),
        ("decode", 8, CONTEXT + 1, rounds),
        ("prefill", 8, 128, max(3, rounds // 2)),
    )
    for kind, rows, length, count in cases:
        case = f"{kind} {rows} rows of {rows} adapters" + (" x 128" if kind == "prefill" else "")
        tokens = torch.randint(0, 49152, (rows, length), generator=torch.manual_seed(1))
        steps: dict[str, Call] = {
            name: Step(model, tokens, NAMES[:rows], name, kind == "decode")
            for name, model in models.items()
        }
        wide = Step(
            copy.deepcopy(engines.peft).double(), tokens, NAMES[:rows], "peft", kind == "decode"
        )
        error = check(case, {name: step() for name, step in steps.items()}, wide())
        del wide
        times = interleaved(steps, count)
        for name, time in times.items():
            yield Row(
                "model",
                case,
                name,
                tokens=rows * (1 if kind == "decode" else length),
                adapters="" if name == "base" else rows,
                rank="" if name == "base" else RANK,
                **timing_columns(time, "ms"),
                over_base=time.over(times["base"]),
                over_peft=times["peft"].over(time),
                worst_error=error if name == "lora_ext" else "",
            )


def check(case: str, logits: dict[str, Tensor], exact: Tensor) -> float:
    """Return the largest error of the logits, divided by its bound.

    Args:
        case: name of the case, for the message.
        logits: logits of each engine.
        exact: PEFT's logits in float64.

    Raises:
        SystemExit: If the error is above its bound, or if the adapter of a row changes the logits
            too little.
    """
    worst = error_over_bound(logits["lora_ext"], logits["peft"], exact)
    effect = min(map(error_over_bound, logits["base"], logits["peft"], exact))
    if not worst <= 1 or not effect > 10:
        raise SystemExit(
            f"bench_lora: {case}: expected logits within their bound of PEFT's in float64, and the "
            "base model's at least 10 times the bound away in every row, found "
            f"{worst:.3g} and {effect:.3g} times the bound"
        )
    return worst


def bench_memory(engines: Engines) -> Iterator[Row]:
    """Yield rows with the bytes of the pool, and with the bytes of the pages that its adapters
    need."""
    pages = 0
    for module in engines.plain.modules():
        if isinstance(module, torch.nn.Linear) and module is not engines.plain.lm_head:
            width = module.in_features + module.out_features
            pages += len(NAMES) * RANK * width * module.weight.itemsize
    stats = engines.pool.stats()
    common = {"adapters": len(NAMES), "rank": RANK, "unit": "bytes"}
    yield Row("ops", "pool", "lora_ext", median=engines.pool.nbytes(), **common)
    yield Row("ops", "pool's pages", "arithmetic", median=pages, **common)
    yield Row("ops", "pool's tables", "lora_ext", median=stats["table_bytes"], **common)


def bench_swap(folder: Path, engines: Engines, rounds: int) -> Iterator[Row]:
    """Yield rows with the times to load an adapter into a slot, from a file and from the host
    cache."""
    pool = lora_ext.AdapterPool(engines.plain, max_slots=1, max_rank=RANK, targets=MODULES)
    first, second = NAMES[:2]
    paths = {name: adapter_folder(folder, name) for name in (first, second)}

    def load() -> None:
        if first in pool:
            pool.unload(first)
        pool.load(first, paths[first])

    def swap() -> None:
        for name in (second, first):
            with pool.acquire([name]):
                pass

    times = interleaved({"load from file": load}, rounds)
    before = _probe(pool)
    pool.load(second, paths[second])  # evicts the first; later swaps alternate between them
    times |= interleaved({"two swaps with the host cache": swap}, rounds)
    swap()
    if not torch.equal(after := _probe(pool), before):
        change = (after - before).abs().max()
        raise SystemExit(f"bench_lora: swap: the host cache changed an adapter by {change:.3g}")
    for case, time in times.items():
        yield Row("swap", case, "lora_ext", adapters=1, rank=RANK, **timing_columns(time, "ms"))


def _probe(pool: lora_ext.AdapterPool) -> Tensor:
    """Return the update of slot 0 on a row of ones in the last module."""
    slab = list(pool.modules.values())[-1]
    assert slab.a_pages is not None and slab.b_pages is not None
    x, ids = torch.ones(1, slab.in_features), torch.zeros(1, dtype=torch.int32)
    pages = slab.a_pages, slab.b_pages
    return lora_ext.ops.lora_apply(x, *pages, ids, slab.scale, slab.ranks, slab.page_table)


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Create a folder for PEFT's files."""
    return tempfile.TemporaryDirectory(prefix="lora_ext_bench_")
