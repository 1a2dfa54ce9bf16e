"""Time PEFT's X-LoRA, Arrow and other adapter layers, with PEFT's code and with ours.

`python benchmarks/mixtures.py [--matrix layers pairs kinds] [--keep-memory] [--check] [--out F]`.
All times are processor times of one thread, measured in short turns in one process. Outputs and
gradients are compared with PEFT's, relative to float64, before they are timed. `base` is the base
product alone, and `dense` is the base product and one LoRA update of rank `top_k * 16`: the
arithmetic of the router's adapters without routing.

`--check` exits with 1 if our time above the base product is more than a fifth of PEFT's, or if a
ratio of PEFT's time to ours is below its target. The targets are ratios of an Intel Xeon with
AVX-512. On a processor whose arithmetic alone takes longer, 1.5 times the time of `dense` above the
base product is enough, and for a pair of adapters, the time of one adapter of twice the rank.

PEFT's Arrow allocates `(tokens, adapters, outputs)` several times per call, 25 MB each. If glibc
returns them to the system, the next call spends half of its time on page faults (`faults`, per
call). By default glibc always returns blocks above 32 MiB (here, more than 680 tokens); whether it
returns smaller blocks depends on what the process allocated before. Each router and top k therefore
has its own process with fixed limits: blocks of 4 MiB and more are returned, as for larger batches,
and smaller blocks are kept. The targets were set when glibc returned at least half of the blocks.
With `--keep-memory` all blocks are kept, PEFT's fastest state, in which Arrow misses its targets:
PEFT's forward takes 2.4 times as long as the base product alone.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import multiprocessing
import resource
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import peft
import torch
from common import Call, Timing, append_rows, error_over_bound, interleaved, machine_columns
from peft import ArrowConfig, LoraConfig, XLoraConfig, get_peft_model
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import Tensor, nn
from torch.nn import functional as F

import lora_ext
from lora_ext import ops
from lora_ext.interop.peft import report

IN, OUT, ADAPTERS, RANK, BATCH, LENGTH = 576, 1536, 8, 16, 4, 128  # a projection of SmolLM2-135M
PASSES = ("forward", "forward, dx, dw", "forward, dx, dw, dA, dB")
# Least ratio of PEFT's time to ours for each of PASSES.
TARGETS = {
    ("X-LoRA", 2): (2.0, 2.4, 2.2),
    ("X-LoRA", 8): (1.7, 2.1, 2.3),
    ("Arrow", 2): (3.8, 2.6, 2.6),
    ("Arrow", 8): (2.9, 2.5, 2.4),
}
# Kinds of adapters, with the least ratio for the forward, and for the forward with the gradients of
# x and of all parameters of the adapter.
KINDS: dict[str, tuple[Any, tuple[float, float]]] = {
    "LoRA, rank 16": (peft.LoraConfig(r=16), (0.85, 0.85)),
    "DoRA, rank 16": (peft.LoraConfig(r=16, use_dora=True), (0.85, 0.85)),
    "AdaLoRA, rank 16": (peft.AdaLoraConfig(init_r=16, total_step=9), (0.85, 0.85)),
    "VeRA, rank 256": (peft.VeraConfig(r=256), (0.85, 0.85)),
    "MiSS, rank 64": (peft.MissConfig(r=64), (0.85, 0.85)),
    "VB-LoRA, rank 4": (
        peft.VBLoRAConfig(r=4, num_vectors=256, vector_length=64),
        (0.85, 0.85),
    ),
    "LoHa, rank 8": (peft.LoHaConfig(r=8), (1.5, 1.6)),
    "LoKr, rank 8": (peft.LoKrConfig(r=8), (1.1, 1.2)),
    "TinyLoRA, rank 16": (peft.TinyLoraConfig(r=16, u=16), (0.85, 0.85)),
    "Uni-LoRA, rank 16": (peft.UniLoraConfig(r=16), (0.85, 0.85)),
    "DeLoRA, rank 16": (peft.DeloraConfig(r=16), (0.95, 0.85)),
    "GraLoRA, rank 32": (peft.GraloraConfig(r=32), (0.85, 0.85)),
    "IA3": (peft.IA3Config(feedforward_modules=[]), (0.85, 0.85)),
}
MOST_ABOVE_BASE = 0.2  # share of PEFT's time above the base product
MOST_OVER_DENSE = 1.5  # our time above the base product over that of `dense`
RATIOS = ("ratio", "above_base", "worst_error", "faults")
MOST_PAIR, MOST_SHARED_PAIR = 1.35, 1.5  # time over that of one adapter per row


class ProcessTime:
    """Call timed by the processor time of the process."""

    def __init__(self, call: Call):
        self.call = call
        self.faults: list[float] = []  # page faults per call, one entry per measurement

    def __call__(self) -> object:
        return self.call()

    def seconds(self, count: int) -> float:
        """Return the seconds of ``count`` calls, as in :class:`common.Remote`."""
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
        for _ in range(count):
            self.call()
        taken = time.process_time() - start
        found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        self.faults.append(found / count)
        return taken


def fix_allocator(keep: bool) -> None:
    """Make glibc keep freed blocks below 4 MiB, or all blocks; without glibc, do nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink
        mallopt(-4, 0) if keep else mallopt(-3, 4 << 20)  # M_MMAP_MAX, M_MMAP_THRESHOLD


def routed(router: str, top_k: int) -> nn.Module:
    """Return a PEFT model of one linear layer with eight adapters and a router."""
    torch.manual_seed(0)
    names = [f"task_{i}" for i in range(ADAPTERS)]
    fields: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["0"]}
    base: Any = nn.Sequential(nn.Linear(IN, OUT))
    model: Any = get_peft_model(base, LoraConfig(**fields), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**fields))
    layer = model.base_model.model[0]
    with torch.no_grad():
        for name in names:
            layer.lora_B[name].weight.normal_(0, 0.05)
    if router == "Arrow":
        config = ArrowConfig(top_k=top_k, router_temperature=0.7)
        config.task_adapter_names, config.gks_adapter_names = names, []
        model.add_adapter("arrow_router", LoraConfig(arrow_config=config, **fields))
        layer.set_adapter("arrow_router")
    else:
        config = XLoraConfig(hidden_size=IN, adapters=dict.fromkeys(names, ""))
        config.top_k_lora = None if top_k == ADAPTERS else top_k
        layer.set_adapter(names)
        owner: Any = types.SimpleNamespace(disabled=False)
        layer.forward = XLoraLinearLayer(owner, layer, layer.forward, 1, config).forward
    return model.eval()


class Step:
    """Forward of a routed layer, with the gradients of one of :data:`PASSES`."""

    def __init__(self, model: Any, index: int):
        self.layer, self.index = model.base_model.model[0], index
        arrow = hasattr(self.layer, "lora_arrow")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(index == 2 and ".lora_" in name and "router" not in name)
        generator = torch.manual_seed(1)
        dtype = self.layer.base_layer.weight.dtype
        x, dy = (torch.randn(BATCH, LENGTH, n, generator=generator) for n in (IN, OUT))
        scalings = torch.rand(BATCH, LENGTH, 3, ADAPTERS, generator=generator)
        self.x, self.dy, self.scalings = (t.to(dtype) for t in (x, dy, scalings))
        self.given = {} if arrow else {"scalings": self.scalings}
        trained = [p for p in model.parameters() if p.requires_grad]
        self.wanted = [self.x, *self.given.values(), *trained]
        for t in self.wanted[: 2 - arrow] if index else ():
            t.requires_grad_()

    def __call__(self) -> list[Tensor]:
        with torch.set_grad_enabled(self.index > 0):
            y = self.layer(self.x, **self.given)
            return [y, *torch.autograd.grad(y, self.wanted, self.dy)] if self.index else [y]


def base_step(step: Step) -> Call:
    """Return a call that computes the base product of a step, and the gradient of x if the step
    computes it."""
    base = step.layer.base_layer

    def call() -> None:
        with torch.set_grad_enabled(step.index > 0):
            y = F.linear(step.x, base.weight, base.bias)
            if step.index:
                torch.autograd.grad(y, [step.x], step.dy)

    return call


def dense_step(step: Step, rank: int) -> Call:
    """Return a call that computes the base product and one LoRA update, with the gradients of a
    step."""
    base, grad = step.layer.base_layer, step.index == 2
    factors = [torch.randn(rank, IN) / IN**0.5, torch.randn(OUT, rank) / rank**0.5]
    a, b = (f.requires_grad_(grad) for f in factors)
    wanted = [step.x, a, b] if grad else [step.x]

    def call() -> None:
        with torch.set_grad_enabled(step.index > 0):
            y = F.linear(step.x, base.weight, base.bias) + F.linear(F.linear(step.x, a), b)
            if step.index:
                torch.autograd.grad(y, wanted, step.dy)

    return call


def checked(case: str, ours: list[Tensor], peer: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest error, divided by its bound; exit if the quotient is above 1."""
    with torch.no_grad():
        worst = max(error_over_bound(*each) for each in zip(ours, peer, exact, strict=True))
    if not worst <= 1:
        raise SystemExit(f"mixtures: {case}: error is {worst:.2g} x its bound")
    return worst


def above_base(times: dict[str, Timing], provider: str) -> float:
    """Return the time of ``provider`` beyond that of the base product, divided by PEFT's."""
    rounds = (times[name].rounds for name in (provider, "peft", "base"))
    return statistics.median(
        max(one - base, 0.0) / max(peer - base, 1e-9)
        for one, peer, base in zip(*rounds, strict=True)
    )


def bench_layers(
    rounds: int, seconds: float, cases: Iterable[tuple[str, int]] = TARGETS
) -> Iterator[dict[str, Any]]:
    """Yield the rows of X-LoRA and Arrow layers."""
    for router, top_k in cases:
        theirs = routed(router, top_k)
        Step(theirs, 0)()  # PEFT computes the prototypes of Arrow in the first forward.
        ours = lora_ext.from_peft(copy.deepcopy(theirs))
        if report(ours).left:
            raise SystemExit(f"mixtures: {router}: PEFT computes {report(ours).left}")
        for index, (name, target) in enumerate(zip(PASSES, TARGETS[router, top_k], strict=True)):
            case = f"{router}, {top_k} of {ADAPTERS}, {name}"
            steps = {"lora_ext": Step(ours, index), "peft": Step(theirs, index)}
            exact = Step(copy.deepcopy(theirs).double(), index)()
            worst = checked(case, steps["lora_ext"](), steps["peft"](), exact)
            calls = {**steps, "base": base_step(steps["peft"])}
            calls["dense"] = dense_step(steps["peft"], top_k * RANK)
            timed = {n: ProcessTime(c) for n, c in calls.items()}
            times = interleaved(timed, rounds, seconds, warm_up=3)
            share, limit = (above_base(times, name) for name in ("lora_ext", "dense"))
            most = max(MOST_ABOVE_BASE, MOST_OVER_DENSE * limit)
            gain, over_base = (times["peft"].over(times[n]) for n in ("lora_ext", "base"))
            allowed = min(target, over_base / (1 + most * (over_base - 1)))
            missed = [f"{gain:.2f} of {allowed:.2f}"] if gain < allowed else []
            missed += [f"{share:.2f} of {most:.2f} above the base"] if share > most else []
            for provider, timing in times.items():
                found = {"ratio": gain, "above_base": share, "worst_error": worst}
                found["faults"] = statistics.median(timed[provider].faults)
                yield row("layers", case, provider, timing, target, found, missed)


def bench_kinds(rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the rows of layers with the adapters in ``KINDS``."""
    x, dy = torch.randn(BATCH * LENGTH, IN), torch.randn(BATCH * LENGTH, OUT)
    for kind, (config, targets) in KINDS.items():
        torch.manual_seed(0)
        config.target_modules = ["0"]
        theirs = get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), config).eval()  # pyright: ignore
        trained = [name for name, p in theirs.named_parameters() if p.requires_grad]
        with torch.no_grad():
            for name in trained:
                p = theirs.get_parameter(name)
                p.add_(torch.randn_like(p), alpha=0.05)
        ours = lora_ext.from_peft(copy.deepcopy(theirs))
        if not report(ours).taken:
            raise SystemExit(f"mixtures: {kind}: PEFT computes {report(ours).left}")
        for index, (name, target) in enumerate(
            zip(("forward", "all gradients"), targets, strict=True)
        ):
            case = f"{kind}, {name}"
            calls = {
                n: _pass(m, trained, x, dy, index)
                for n, m in (("lora_ext", ours), ("peft", theirs))
            }
            exact = _pass(copy.deepcopy(theirs).double(), trained, x.double(), dy.double(), index)
            worst = checked(case, calls["lora_ext"](), calls["peft"](), exact())
            times = interleaved({n: ProcessTime(c) for n, c in calls.items()}, rounds, seconds)
            gain = times["peft"].over(times["lora_ext"])
            missed = [f"{gain:.2f} of {target}"] if gain < target else []
            for provider, timing in times.items():
                found = {"ratio": gain, "worst_error": worst}
                yield row("kinds", case, provider, timing, target, found, missed)


def _pass(
    model: Any, names: list[str], x: Tensor, dy: Tensor, index: int
) -> Callable[[], list[Tensor]]:
    layer, wanted = model.base_model.model[0], [model.get_parameter(name) for name in names]
    x = x.clone().requires_grad_(index > 0)

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(index > 0):
            y = layer(x)
            return [y, *torch.autograd.grad(y, [x, *wanted], dy)] if index else [y]

    return call


def bench_pairs(rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the rows of pairs of adapters in a pool's pages, relative to one adapter per row."""
    rows, count = 64, 64
    torch.manual_seed(0)
    a, b = torch.randn(4 * count, 8, IN) / IN**0.5, torch.randn(4 * count, OUT, 8) / 4
    one = torch.full((count, 8), -1, dtype=torch.int32)
    one[:, :2] = torch.arange(2 * count, dtype=torch.int32).view(count, 2)
    pair, double = one.clone(), one.clone()
    pair[:, 2:4] = one.roll(1, 0)[:, :2]
    double[:, 2:4] = one[:, :2] + 2 * count
    x, weight = torch.randn(rows, IN), torch.randn(OUT, IN) / IN**0.5
    own, shared = torch.arange(rows, dtype=torch.int32), torch.full((rows,), 3, dtype=torch.int32)
    for name, ids, target, with_base in (
        ("own pair per row", own, MOST_PAIR, False),
        ("one pair for all rows, with the base product", shared, MOST_SHARED_PAIR, True),
    ):
        case, plan, y = f"{rows} rows, {name}", ops.lora_plan(ids, count), torch.zeros(rows, OUT)
        calls: dict[str, Call] = {}
        tables = {"one adapter": one, "a pair": pair, "twice the rank": double}
        for provider, table in tables.items():
            rest = x, a, b, ids, None, ((table >= 0).sum(1) * 8).int(), table, plan
            calls[provider] = functools.partial(_applied, weight if with_base else None, y, *rest)
        times = interleaved({n: ProcessTime(c) for n, c in calls.items()}, rounds, seconds)
        ratio, limit = (times[n].over(times["one adapter"]) for n in ("a pair", "twice the rank"))
        most = max(target, limit)
        missed = [f"{ratio:.2f} of at most {most:.2f}"] if ratio > most else []
        for provider, timing in times.items():
            yield row("pairs", case, provider, timing, target, {"ratio": ratio}, missed)


def _applied(weight: Tensor | None, y: Tensor, x: Tensor, *rest: Any) -> None:
    ops.lora_apply_(y if weight is None else F.linear(x, weight), x, *rest)


def row(
    matrix: str, case: str, provider: str, timing: Timing, target: float, found: dict[str, float],
    missed: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Return a row of the csv file; ``missed`` is printed and not written.

    ``ratio`` is PEFT's time over ours, or in ``pairs`` the time of a pair over that of one adapter.
    """
    return {
        **machine_columns(),
        "matrix": matrix,
        "case": case,
        "provider": provider,
        "unit": "ms",
        **{k: round(getattr(timing, k) * 1e3, 4) for k in ("median", "p20", "p80")},
        "target": target,
        **{k: round(found[k], 4) if k in found else "" for k in RATIOS},
        "missed": "; ".join(missed),
    }


MATRICES: dict[str, Callable[..., Iterator[dict[str, Any]]]]
MATRICES = {"layers": bench_layers, "pairs": bench_pairs, "kinds": bench_kinds}


def _listed(matrix: str, *given: Any) -> list[dict[str, Any]]:
    return list(MATRICES[matrix](*given))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matrix", nargs="+", choices=MATRICES, default=list(MATRICES))
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--seconds", type=float, default=0.02, help="duration of a measurement")
    parser.add_argument("--keep-memory", action="store_true", help="keep all freed blocks")
    parser.add_argument("--out", type=Path, help="csv file to which rows are appended")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    given = parser.parse_args()
    torch.set_num_threads(1)
    fix_allocator(given.keep_memory)
    missed, fork = set(), multiprocessing.get_context("fork")
    jobs = [*(("layers", ([case],)) for case in TARGETS), ("pairs", ()), ("kinds", ())]
    for name, rest in jobs:
        if name not in given.matrix:
            continue
        with ProcessPoolExecutor(1, fork) as process:
            rows = process.submit(_listed, name, given.rounds, given.seconds, *rest).result()
        for found in rows:
            why = found.pop("missed")
            print(
                f"{found['case']:46} {found['provider']:12} {found['median']:8.3f} ms  "
                f"ratio {found['ratio']:5.2f} (target {found['target']})  "
                f"above base {found['above_base']}  faults {found['faults']}",
                flush=True,
            )
            missed |= {f"{found['case']}: {why}"} if why else set()
            if given.out:
                append_rows(given.out, [found])
    for line in sorted(missed):
        print(f"missed: {line}")
    if given.check and missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
