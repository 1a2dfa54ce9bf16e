"""Time whole training steps, as in a user's loop: `python benchmarks/whole_steps.py`.

A step is forward, loss, backward and AdamW of a SmolLM2-shaped model. PEFT's model and ours share
the base's weights, and their losses are compared before timing. The row ``base`` is the same model
without adapters, with embeddings that require a gradient. Adapter layers add all their work to this
model. The time of PEFT divided by that of ``base`` is therefore an upper bound of the speedup of
any adapter layers over PEFT.

With a router, PEFT's X-LoRA or Arrow model of eight adapters chooses two adapters per token. X-LoRA
trains its router, Arrow its adapters.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import MIN_PEER_ERROR, ROOT, append_rows, error_over_bound, interleaved
from lora_layers import MODULES, RANK, base_model, optimizer_of, with_adapters
from peft import ArrowConfig, XLoraConfig, get_peft_model
from peft.tuners.lora.arrow import create_arrow_model
from row import Row, timing_columns
from torch import nn

import lora_ext

#: Least error of PEFT's loss as a share of the loss: one rounding to bfloat16. A loss is one
#: number, which a step with bfloat16 products may compute exactly by chance.
LEAST = {"float32": MIN_PEER_ERROR, "autocast": 2.0**-9}
TARGETS = {"q and v": ["q_proj", "v_proj"], "all linear": MODULES}
TOP_K = 2  # adapters per token of a router


@dataclass(frozen=True)
class Case:
    """Settings of the training steps to time."""

    targets: str
    adapters: int = 1
    dropout: float = 0.0
    dtype: str = "float32"
    onednn: bool = True
    rows: int = 4
    length: int = 128
    router: str = ""

    def __str__(self) -> str:
        adapters = f"{self.adapters} adapter" + "s" * (self.adapters > 1)
        adapters += f", {self.router} top {TOP_K}" * bool(self.router)
        library = "" if self.onednn else ", oneDNN off"
        return (
            f"step, {self.targets}, {adapters}, {self.rows} x {self.length} tokens, dropout "
            f"{self.dropout}, {self.dtype}{library}"
        )


CASES = [
    *(Case(t, onednn=o) for t in TARGETS for o in (True, False)),
    *(Case(t, dropout=0.1) for t in TARGETS),
    *(Case(t, dtype="autocast") for t in TARGETS),
    *(Case(t, adapters=8, rows=8, length=n) for t in TARGETS for n in (16, 64)),
    *(Case("all linear", adapters=8, router=router) for router in ("X-LoRA", "Arrow")),
]


class Steps:
    """Step of a case for each provider; PEFT makes one step per adapter."""

    def __init__(self, case: Case, layers: int):
        self.case = case
        self.ids = torch.randint(0, 49152, (case.rows, case.length), generator=torch.manual_seed(1))
        base = base_model(layers)
        names = [] if case.router else [f"adapter{i}" for i in range(case.adapters)]
        modules = TARGETS[case.targets]
        self.bare = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        self.models: dict[str, Any] = {}
        for way in ("peft", "exact", "lora_ext", "lora_ext, chunked loss"):
            own = copy.deepcopy(base).double() if way == "exact" else base
            if case.router:
                model = routed(own, case, modules)
            else:
                model = with_adapters(own, names, case.dropout, modules)
            model = model.double() if way == "exact" else model
            if self.models:
                model.load_state_dict(self.models["peft"].state_dict())
            if "lora_ext" in way:
                lora_ext.from_peft(model)
            if names:
                model.set_requires_grad(names)
            self.models[way] = model
        lora_ext.chunked_loss(model)
        self.names, self.share = names or [""], case.rows // max(1, len(names))
        self.optimizers = {
            way: [optimizer_of(model, n) for n in names] or [router_optimizer(model)]
            for way, model in self.models.items()
        }

    def calls(self) -> dict[str, Callable[[], float]]:
        """Return the calls by name, in the order of the rows of the table."""
        ours = {way: (lambda way=way: self._ours(way)) for way in self.models if "lora_ext" in way}
        return {"base": self._bare, "peft": lambda: self._peft("peft"), **ours}

    def exact(self) -> float:
        """Make PEFT's step in float64; return its loss."""
        return self._peft("exact")

    def _bare(self) -> float:
        embeddings = self.bare.get_input_embeddings()(self.ids).requires_grad_()
        return self._backward(self.bare, 1, inputs_embeds=embeddings)

    def _peft(self, way: str) -> float:
        total, model = 0.0, self.models[way]
        for i, name in enumerate(self.names):
            ids = self.ids[i * self.share : (i + 1) * self.share]
            if len(self.names) > 1:
                model.set_adapter(name)
            total += self._backward(model, 1, input_ids=ids)
            self._update(self.optimizers[way][i])
        return total / len(self.names)

    def _ours(self, way: str) -> float:
        extra = {}
        if len(self.names) > 1:
            extra["adapter_names"] = [n for n in self.names for _ in range(self.share)]
        loss = self._backward(self.models[way], len(self.names), input_ids=self.ids, **extra)
        for optimizer in self.optimizers[way]:
            self._update(optimizer)
        return loss

    def _backward(self, model: Any, times: int, **given: Any) -> float:
        """Run forward and backward; return the mean loss.

        The loss is multiplied by ``times``, the number of adapters, before the backward. Gradients
        are then those of the sum of the adapters' losses.
        """
        labels = given.get("input_ids", self.ids)
        autocast: Any = contextlib.nullcontext()
        if self.case.dtype == "autocast" and model is not self.models["exact"]:
            autocast = torch.autocast("cpu", torch.bfloat16)
        with autocast:
            loss = model(**given, labels=labels, use_cache=False).loss
        (loss * times).backward()
        return loss.item()

    @staticmethod
    def _update(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad()


def routed(base: nn.Module, case: Case, modules: list[str]) -> Any:
    """Return PEFT's model with the router of a case; it shares the base weights."""
    torch.manual_seed(1)
    shared = {id(p): p for p in base.parameters()}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that several adapters have one base model
        adapters = with_adapters(base, [f"adapter{i}" for i in range(case.adapters)], 0.0, modules)
        for key, parameter in adapters.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.02)
                parameter.data[:, 0] *= 8  # so that Arrow's power iteration converges
        adapters.save_pretrained(folder)
        folders = {str(i): f"{folder}/{name}" for i, name in enumerate(adapters.peft_config)}
        own: Any = copy.deepcopy(base, shared)
        if case.router == "Arrow":
            model: Any = create_arrow_model(own, [*folders.values()], ArrowConfig(top_k=TOP_K))
            for key, parameter in model.named_parameters():
                parameter.requires_grad_(".task_" in key)
            return model.train()
        own.config.use_cache = False
        config = XLoraConfig(hidden_size=own.config.hidden_size, adapters=folders)
        config.task_type, config.top_k_lora, config.xlora_dropout_p = "CAUSAL_LM", TOP_K, 0.0
        config.layerwise_scalings = True
        return get_peft_model(own, config).train()


def router_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW for the parameters that require a gradient."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)


def bench_steps(cases: list[Case], rounds: int, layers: int = 30) -> Iterator[Row]:
    """Yield the rows of every case, checked and timed."""
    for case in cases:
        with _onednn(case.onednn):
            steps = Steps(case, layers)
            calls = steps.calls()
            worst = _check(case, calls, steps.exact) if not case.dropout else ""
            times = interleaved(calls, rounds)
        for name, time in times.items():
            yield Row(
                "steps",
                str(case),
                name,
                dtype=case.dtype,
                tokens=case.rows * case.length,
                adapters="" if name == "base" else case.adapters,
                rank="" if name == "base" else RANK,
                **timing_columns(time, "ms"),
                over_base=time.over(times["base"]),
                over_peft=times["peft"].over(time),
                worst_error=worst if name == "lora_ext" else "",
            )


def _check(case: Case, calls: dict[str, Callable[[], float]], exact: Callable[[], float]) -> float:
    """Return the largest error of the losses of two steps, divided by its bound. The second loss
    depends on the gradients of the first step."""
    steps = {name: call for name, call in calls.items() if name != "base"} | {"exact": exact}
    losses = {
        name: torch.tensor([step(), step()], dtype=torch.float64) for name, step in steps.items()
    }
    peer, right = losses.pop("peft"), losses.pop("exact")
    worst = max(error_over_bound(own, peer, right, LEAST[case.dtype]) for own in losses.values())
    if not worst <= 1:
        raise SystemExit(f"whole_steps: {case}: losses are off by {worst:.3g} times their bound")
    return worst


@contextlib.contextmanager
def _onednn(enabled: bool) -> Iterator[None]:
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = enabled
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [case for case in CASES if args.only in str(case)]
    for row in bench_steps(cases, args.rounds, args.layers):
        append_rows(args.out / "lora_cpu.csv", [row.columns("cpu")])
        over = f"{row.over_base:5.2f} of base, {row.over_peft:5.2f} x PEFT"
        print(f"{row.case:75} {row.provider:24} {row.median:8.1f} {row.unit}  {over}", flush=True)


if __name__ == "__main__":
    main()
