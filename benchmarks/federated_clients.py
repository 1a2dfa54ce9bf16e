"""Time many clients in one batch: `python benchmarks/federated_clients.py --check`.

In a round, each client makes STEPS AdamW steps from the global adapter. Four ways to train are
compared: all clients in one batch (lora_ext), one client after another with our layers (loop) or
PEFT's (peft), and torch.func.vmap over stacked factors with one AdamW over the stacks (vmap). All
use torch's fused AdamW. Models are four square layers with ranks 4 to 8, and a tiny Llama. The
Llama's clients also train at mixed depths, with and without the staircase. Before timing, each
provider's changes are compared with the loop's in float64. Rows are appended to
OUT/clients_<device>.csv.

`--check` requires that the loop takes at least 4 times as long as lora_ext for 32 clients x 16 rows
and d = 64, and at least as long for 32 x 64 and d = 256.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
import transformers
from common import ROOT, Call, append_rows, machine_columns, peak_bytes
from lora_ops import timer
from peft import LoraConfig, get_peft_model
from row import timing_columns
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext.adapter._peft_tensors import PREFIX
from lora_ext.federated import (
    BatchedClients,
    ClientSpec,
    LayerPlan,
    LoraLayerManager,
    plan_bytes,
)
from lora_ext.nn import LoraLinear, Swap

STEPS, RANK, RATE, VOCAB, TOKENS = 5, 8, 1e-2, 128, 16
BOUND = 1e-9  # error of the changes in float64; a change is about RATE
Changes = dict[int, dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """Number of clients, and of rows (sequences for a Llama) per step and client."""

    clients: int
    rows: int
    width: int
    llama: bool = False
    depths: bool = False  # client k trains the 1 + k % 4 layers nearest the output, not all four
    at_least: float = 0.0  # target for the loop's time over lora_ext's

    @property
    def name(self) -> str:
        kind = "Llama, " if self.llama else ""
        depth = ", depths 1 to 4" if self.depths else ""
        return f"{kind}{self.clients} clients x {self.rows}, d = {self.width}{depth}"


CASES = (
    Case(8, 16, 64),
    Case(32, 16, 64, at_least=4.0),
    Case(64, 16, 64),
    Case(32, 16, 256),
    Case(32, 64, 256, at_least=1.0),
    Case(16, 4, 64, llama=True),
    Case(16, 4, 64, llama=True, depths=True),
    Case(16, 4, 256, llama=True, depths=True),
)


class Squares(nn.Module):
    """Four square layers and a head."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(rows, width)`` to ``(rows, 10)``."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class Lean(nn.Module):
    """LoRA with as few torch operators as possible, for vmap."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor):
        super().__init__()
        self.base, self.a, self.b = base, nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., I)`` to ``(..., O)``; the scale is 1."""
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class Problem:
    """Case in one dtype: a base model, its adapters, the clients' data and plans."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str):
        torch.manual_seed(0)
        self.case = case
        self.base = self._base().to(device, dtype).eval().requires_grad_(False)
        ends = ("q_proj", "v_proj") if case.llama else ("layers.0", "layers.1", "layers.2")
        ends = ends if case.llama else (*ends, "layers.3")
        self.targets = [name for name, _ in self.base.named_modules() if name.endswith(ends)]
        self.ours = self._sharing()
        settings = {"r": RANK, "lora_alpha": RANK, "init_lora_weights": False}
        layers = {n: LoraLinear(self.ours.get_submodule(n), **settings) for n in self.targets}
        Swap(self.ours, dict(layers), "federated_clients")
        self.state = LoraLayerManager(self.ours).state_slice()
        self.specs = [
            ClientSpec(k, [self._batch(dtype, device) for _ in range(STEPS)], RATE)
            for k in range(case.clients)
        ]
        lowest = [4 - (1 + k % 4) if case.depths else 0 for k in range(case.clients)]
        ranks = [RANK if case.llama else 4 + k % 5 for k in range(case.clients)]
        self.plans = [
            LayerPlan(tuple(range(low, 4)), (rank,) * (4 - low))
            for low, rank in zip(lowest, ranks, strict=True)
        ]
        self.starts = [self._start(plan) for plan in self.plans]

    def providers(self) -> dict[str, Callable[[], Changes]]:
        """Return the calls by name; vmap does not support clients with different layers."""
        case = self.case
        found: dict[str, Callable[[], Changes]] = {"lora_ext": self._batched(True)}
        if case.depths:
            found["no staircase"] = self._batched(False)
        found["loop"] = partial(self._loop, self.ours)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=self.targets)
        found["peft"] = partial(self._loop, get_peft_model(self._sharing(), config).eval())
        if not case.depths:
            found["vmap"] = self._vmap()
        return found

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Compute the loss of one client."""
        if not self.case.llama:
            return F.cross_entropy(model(batch[0]), batch[1])
        logits = model(batch["input_ids"], use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def _batched(self, staircase: bool) -> Callable[[], Changes]:
        batched = BatchedClients(self.ours, self.specs, staircase=staircase)

        def run() -> Changes:
            found = batched.run_round(self.plans, self.state)
            return {u.client: dict(u.tensors) for u in found}

        return run

    def _loop(self, model: nn.Module) -> Changes:
        parameters = {
            PREFIX + name.removeprefix(PREFIX).replace(".default.", "."): p
            for name, p in model.named_parameters()
            if ".lora_" in name
        }
        found: Changes = {}
        for spec, start, plan in zip(self.specs, self.starts, self.plans, strict=True):
            with torch.no_grad():
                torch._foreach_copy_([*parameters.values()], [start[key] for key in parameters])
            names = [k for k in parameters if any(f".layers.{i}." in k for i in plan.layers)]
            for key, p in parameters.items():
                p.requires_grad_(key in names)
                p.grad = None
            trained = [parameters[key] for key in names]
            optimizer = torch.optim.AdamW(trained, spec.lr, weight_decay=0.0, fused=True)
            for batch in spec.batches:
                optimizer.zero_grad()
                self.loss(model, batch).backward()
                optimizer.step()
            changes = torch._foreach_sub([p.detach() for p in trained], [start[k] for k in names])
            found[spec.client] = dict(zip(names, changes, strict=True))
        return found

    def _vmap(self) -> Callable[[], Changes]:
        model, modules = self._sharing(), {}
        if self.case.llama and self.base.dtype == torch.float32:
            # The CPU's fused attention has no batching rule, so vmap would loop over the clients.
            # Eager attention has a float32 softmax, so float64 is checked with fused attention.
            model.set_attn_implementation("eager")
        for name in self.targets:
            factors = (self.state[f"{PREFIX}{name}.lora_{f}.weight"] for f in "AB")
            base: Any = model.get_submodule(name)
            modules[name] = Lean(base, *(f.to(base.weight.device) for f in factors))
        Swap(model, modules, "federated_clients")
        keys = {f"{n}.{f}": f"{PREFIX}{n}.lora_{f.upper()}.weight" for n in modules for f in "ab"}
        steps = [self._stacked([s.batches[i] for s in self.specs]) for i in range(STEPS)]

        def loss(own: dict[str, Tensor], batch: Any) -> Tensor:
            call = partial(torch.func.functional_call, model, own)
            return self.loss(lambda *args, **options: call(args, options), batch)

        gradients = torch.func.vmap(torch.func.grad_and_value(loss))

        def run() -> Changes:
            start = {n: torch.stack([s[key] for s in self.starts]) for n, key in keys.items()}
            own = {name: t.clone() for name, t in start.items()}
            optimizer = torch.optim.AdamW([*own.values()], RATE, weight_decay=0.0, fused=True)
            for batch in steps:
                found, _ = gradients(own, batch)
                for name, t in own.items():
                    t.grad = found[name]
                optimizer.step()
            ends = {keys[n]: (t - start[n]).unbind() for n, t in own.items()}
            return {k: {n: t[k] for n, t in ends.items()} for k in range(self.case.clients)}

        return run

    def _base(self) -> nn.Module:
        if not self.case.llama:
            return Squares(self.case.width)
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=self.case.width,
            intermediate_size=2 * self.case.width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        return transformers.LlamaForCausalLM(config)

    def _sharing(self) -> nn.Module:
        """Copy the model; the copy shares the base weights."""
        return copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})

    def _batch(self, dtype: torch.dtype, device: str) -> Any:
        rows = self.case.rows
        if self.case.llama:
            ids = torch.randint(VOCAB, (rows, TOKENS)).to(device)
            return {"input_ids": ids, "labels": ids}
        x = torch.randn(rows, self.case.width, dtype=torch.float64)
        return x.to(device, dtype), torch.randint(10, (rows,)).to(device)

    def _stacked(self, batches: list[Any]) -> Any:
        if self.case.llama:
            return {name: torch.stack([b[name] for b in batches]) for name in batches[0]}
        return tuple(torch.stack(parts) for parts in zip(*batches, strict=True))

    def _start(self, plan: LayerPlan) -> dict[str, Tensor]:
        """Return the global adapter, with entries beyond the client's rank set to zero."""
        found = {key: t.clone().to(self.device) for key, t in self.state.items()}
        for key, t in found.items():
            layer = next((i for i in plan.layers if f".layers.{i}." in key), None)
            if layer is not None:
                rank = plan.rank_of(layer, RANK)
                (t[rank:] if ".lora_A." in key else t[:, rank:]).zero_()
        return found

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.base.parameters()).device


def check(case: Case, device: str) -> dict[str, float]:
    """Return the largest difference of each way to train from the loop in float64, divided by the
    bound."""
    problem = Problem(case, torch.float64, device)
    results = {name: run() for name, run in problem.providers().items()}
    worst = {}
    for name, found in results.items():
        differences = []
        for client, plan in enumerate(problem.plans):
            for key, expected in results["loop"][client].items():
                rank = plan.ranks[0] if plan.ranks else RANK
                head = (slice(rank),) if ".lora_A." in key else (slice(None), slice(rank))
                got = found[client][key][head]
                differences.append((got.cpu() - expected[head].cpu()).abs().max().item())
        worst[name] = max(differences) / BOUND
        if not worst[name] <= 1:
            raise SystemExit(
                f"federated_clients: {case.name}: {name}: changes are off by {worst[name]:.3g} "
                "times their bound"
            )
    return worst


def measure(case: Case, device: str, rounds: int) -> Iterator[dict[str, object]]:
    """Yield one row per way to train, and on the CPU also rows with the memory of lora_ext."""
    errors = check(case, device)
    problem = Problem(case, torch.float32, device)
    calls: dict[str, Call] = dict(problem.providers())
    times = timer(device)(calls, rounds)
    for name, time in times.items():
        yield {
            **machine_columns(device),
            "case": case.name,
            "provider": name,
            **timing_columns(time, "ms"),
            "over_lora_ext": time.over(times["lora_ext"]),
            "worst_error": errors[name],
        }
    if device != "cpu":
        return
    sent = [plan_bytes(problem.state, plan) for plan in problem.plans]
    memory = {
        "base": sum(p.nbytes for p in problem.base.parameters()),
        "mean of a client: factors, gradients, moments": 4 * sum(sent) / case.clients,
    }
    for name in ("lora_ext", "no staircase"):
        if name in calls:
            memory[f"peak of a round beyond the base, {name}"] = peak_bytes(calls[name])
    for name, nbytes in memory.items():
        row = dict.fromkeys(("p20", "p80", "over_lora_ext", "worst_error"), "")
        row |= {"unit": "MB", "case": case.name, "provider": f"memory: {name}"}
        columns = ("case", "provider", "unit", "median", "p20", "p80", "over_lora_ext")
        row["median"] = nbytes / 1e6
        yield {**machine_columns(device), **{c: row[c] for c in (*columns, "worst_error")}}


def main() -> None:
    """Measure, append and print rows; with --check, exit with 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # deprecated names
    path = args.out / f"clients_{args.device}.csv"
    print(f"{torch.get_num_threads()} threads, {os.cpu_count()} CPUs")
    missed = []
    for case in CASES:
        for row in measure(case, args.device, args.rounds):
            append_rows(path, [row])
            ratio = row["over_lora_ext"]
            note = "" if ratio == "" else f"{ratio:7.2f} of lora_ext"
            print(
                f"{row['case']:48} {row['provider']:32} {row['median']:9.2f} {row['unit']} {note}"
            )
            if row["provider"] == "loop" and ratio < case.at_least:
                missed.append(f"{case.name}: {ratio:.2f}, expected at least {case.at_least}")
    print(f"\n{path}", *(f"MISSED {each}" for each in missed), sep="\n")
    if args.check:
        sys.exit(bool(missed))


if __name__ == "__main__":
    main()
