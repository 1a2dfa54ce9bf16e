"""Time adapters on routed experts: `python benchmarks/experts.py`.

The model is a mixture of experts like Qwen3-MoE, with random weights and adapters on both matrices
of all experts. "decode" is one token per row and "prefill" several tokens per row; each row has a
different adapter. Three models are compared: one that is attached to a pool (lora_ext), one without
adapters (base), and PEFT's, which has one adapter per batch and processes the rows of each adapter
separately (peft). "train" is forward and backward of a batch of several adapters: a model of
from_peft given names (lora_ext), and PEFT, one adapter after another (peft). In the cases "one",
all rows have the same adapter, so PEFT has no loop. Results are compared before timing. Rows are
appended to OUT/experts_<device>.csv; "peak" is the peak memory.
"""

from __future__ import annotations

import argparse
import copy
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
import transformers
from common import ROOT, append_rows, error_over_bound, machine_columns, peak_bytes
from lora_ops import timer
from peft import LoraConfig, get_peft_model
from row import timing_columns
from torch import Tensor, nn

import lora_ext

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
VOCAB = 256


@dataclass(frozen=True)
class Case:
    """Number of rows and of tokens per row; rows use the adapters in turn."""

    kind: str
    rows: int
    tokens: int
    adapters: int
    rank: int = 16
    width: int = 1024
    inner: int = 512
    experts: int = 32
    choices: int = 4
    layers: int = 2

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.rows} rows x {self.tokens}, {self.adapters} adapters"


CASES = (
    Case("decode", 16, 1, 16),
    Case("prefill", 8, 64, 8),
    Case("train", 8, 32, 4),
    Case("train, one", 8, 32, 1),
)


class Problem:
    """Base model, and its adapters in a pool, in PEFT and in from_peft."""

    def __init__(self, case: Case, device: str):
        torch.manual_seed(0)
        self.case = case
        self.base = self._base().to(device).eval().requires_grad_(False)
        self.names = [f"adapter{i}" for i in range(case.adapters)]
        self.of_row = [self.names[i % case.adapters] for i in range(case.rows)]
        self.ids = torch.randint(VOCAB, (case.rows, case.tokens), device=device)
        self.peft: Any = self._peft()
        self.ours: Any = copy.deepcopy(self.peft, self._shared(self.peft))
        lora_ext.from_peft(self.ours).set_requires_grad(self.names)
        self.attached: Any = copy.deepcopy(self.base, self._shared(self.base))
        if not self.trains:
            pool = lora_ext.AdapterPool(self.attached, case.adapters, case.rank, targets=TARGETS)
            for name in self.names:
                pool.load(name, self.peft, adapter_name=name)
            lora_ext.attach(self.attached, pool)

    @property
    def trains(self) -> bool:
        """True if the case computes gradients."""
        return self.case.kind.startswith("train")

    def providers(self) -> dict[str, Callable[[], Tensor]]:
        """Return calls by name; they return logits ``(rows, tokens, V)`` or the flat gradients."""
        if self.trains:
            return {
                "lora_ext": partial(self._step, self.ours, [None]),
                "peft": self._by_peft(self.peft),
            }
        return {"lora_ext": self._served, "base": self._without, "peft": self._by_peft(self.peft)}

    def exact(self) -> Tensor:
        """Return PEFT's result in float64."""
        wide = copy.deepcopy(self.peft).double()
        wide.set_experts_implementation("eager")  # torch's grouped products do not support float64
        return self._by_peft(wide)()

    def _by_peft(self, model: Any) -> Callable[[], Tensor]:
        return partial(self._step, model, self.names) if self.trains else partial(self._loop, model)

    @torch.no_grad()
    def _served(self) -> Tensor:
        return self.attached(self.ids, adapter_names=self.of_row, use_cache=False).logits

    @torch.no_grad()
    def _without(self) -> Tensor:
        return self.base(self.ids, use_cache=False).logits

    @torch.no_grad()
    def _loop(self, model: Any) -> Tensor:
        logits: list[Any] = [None] * self.case.rows
        for index, name in enumerate(self.names):
            model.set_adapter(name)
            own = slice(index, None, len(self.names))
            logits[own] = model(self.ids[own], use_cache=False).logits
        return torch.stack(logits)

    def _step(self, model: Any, names: list[str | None]) -> Tensor:
        parameters = {n: p for n, p in model.named_parameters() if "lora_" in n}
        for parameter in parameters.values():
            parameter.grad = None
        for index, name in enumerate(names):
            if name is None:
                ids, options = self.ids, {"adapter_names": self.of_row}
            else:
                model.set_adapter(name)
                ids, options = self.ids[index :: len(names)], {}
            logits = model(input_ids=ids, use_cache=False, **options).logits
            logits.logsumexp(-1).sum().backward()
        return torch.cat([p.grad.flatten() for p in parameters.values()])

    def _base(self) -> nn.Module:
        case = self.case
        config = transformers.Qwen3MoeConfig(
            vocab_size=VOCAB,
            hidden_size=case.width,
            moe_intermediate_size=case.inner,
            num_experts=case.experts,
            num_experts_per_tok=case.choices,
            num_hidden_layers=case.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
        return transformers.Qwen3MoeForCausalLM(config)

    def _peft(self) -> Any:
        model: Any = copy.deepcopy(self.base, self._shared(self.base))
        for name in self.names:
            config = LoraConfig(
                r=self.case.rank,
                target_modules=[],
                target_parameters=TARGETS,
                init_lora_weights=False,
            )
            if name == self.names[0]:
                model = get_peft_model(model, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        return model.eval()

    def _shared(self, model: nn.Module) -> dict[int, Any]:
        """Return a memo for deepcopy that shares the weights of the base."""
        return {id(p): p for n, p in model.named_parameters() if "lora_" not in n}


def check(problem: Problem) -> float:
    """Return the largest error of lora_ext's result, divided by its bound."""
    found = {name: run() for name, run in problem.providers().items()}
    worst = error_over_bound(found["lora_ext"], found["peft"], problem.exact())
    if not worst <= 1:
        raise SystemExit(f"experts: {problem.case.name}: off by {worst:.3g} times the bound")
    return worst


def measure(case: Case, device: str, rounds: int) -> Iterator[dict[str, object]]:
    problem = Problem(case, device)
    error = check(problem)
    calls = problem.providers()
    times = timer(device)(calls, rounds)
    for name, time in times.items():
        yield {
            **machine_columns(device),
            "case": case.name,
            "provider": name,
            **timing_columns(time, "ms"),
            "over_lora_ext": time.over(times["lora_ext"]),
            "peak_mb": peak_bytes(calls[name]) / 1e6 if device == "cpu" else "",
            "worst_error": error,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # deprecated names
    path = args.out / f"experts_{args.device}.csv"
    print(f"{torch.get_num_threads()} threads, {os.cpu_count()} CPUs")
    for case in CASES:
        for row in measure(case, args.device, args.rounds):
            append_rows(path, [row])
            print(
                f"{row['case']:40} {row['provider']:10} {row['median']:9.1f} {row['unit']}"
                f" {row['over_lora_ext']:7.2f} of lora_ext, peak {row['peak_mb']:7.1f} MB"
            )
    print(path)


if __name__ == "__main__":
    main()
