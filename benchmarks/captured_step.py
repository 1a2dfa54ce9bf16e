"""Time a captured decode step of an 8B model's linear layers, relative to the base model's step.

    python benchmarks/captured_step.py                   on a GPU, bfloat16: Llama-3-8B's shapes
    python benchmarks/captured_step.py --tiny            smallest sizes, to check that it works

There is one graph for each number of adapters; the adapter names change between replays
(`lora_ext.capturable`). Attention is left out, because adapters do not change it. Before timing,
rows of a replay are compared with the same rows without a graph. If the GPU's memory cannot store
all 32 layers with their adapters, the model has fewer layers. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from typing import Any

import torch
from common import machine_columns
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

import lora_ext

RANK, ROUNDS = 16, 30
LAYERS, WIDTH, INNER = 32, 4096, 14336
SHARE = 0.8  # share of free memory for weights and adapters; graphs and activations use the rest


class Layer(nn.Module):
    def __init__(self, width: int, inner: int, **how: Any):
        super().__init__()
        self.width, self.kv = width, width // 4
        sizes = {"q": width, "k": self.kv, "v": self.kv, "o": width, "gate": inner, "up": inner}
        for name, out in sizes.items():
            setattr(self, f"{name}_proj", nn.Linear(width, out, bias=False, **how))
        self.down_proj = nn.Linear(inner, width, bias=False, **how)

    def forward(self, x: Tensor) -> Tensor:
        h = rms_norm(x, (self.width,))
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        x = x + self.o_proj(q + (k + v).repeat(1, 4))
        h = rms_norm(x, (self.width,))
        return x + self.down_proj(silu(self.gate_proj(h)) * self.up_proj(h))


def make(layers: int, width: int, inner: int, **how: Any) -> nn.Sequential:
    """Build the model directly on its device and in its dtype, without an intermediate copy."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(width, inner, **how) for _ in range(layers)))
    return model.eval().requires_grad_(False)


def depth(free: int, slots: int) -> int:
    """Return how many bfloat16 layers with ``slots`` adapters fit in ``SHARE`` of ``free`` bytes,
    at most ``LAYERS``."""
    linear = [m for m in Layer(WIDTH, INNER, device="meta").modules() if isinstance(m, nn.Linear)]
    ranks = slots * RANK
    numbers = sum(m.weight.numel() + ranks * (m.in_features + m.out_features) for m in linear)
    return min(LAYERS, int(SHARE * free) // (2 * numbers))


def adapter(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and factors of an adapter on all linear layers."""
    state: dict[str, Tensor] = {}
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            names.append(name.rpartition(".")[2])
            stem = f"base_model.model.{name}.lora_"
            state[f"{stem}A.weight"] = torch.randn(RANK, module.in_features, dtype=dtype) / 64
            state[f"{stem}B.weight"] = torch.randn(module.out_features, RANK, dtype=dtype) / 64
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": sorted(set(names)),
    }
    return config, state


def captured(run: Any) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def timed(replay: Any) -> float:
    """Return the median time of a replay in milliseconds."""
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, even without a GPU")
    parser.add_argument("--rows", type=int, default=64, help="rows of the step")
    args = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    if not gpu and not args.tiny:
        raise SystemExit("captured_step: expected a GPU, found none that torch can use; see --tiny")
    device = torch.device("cuda" if gpu else "cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    if args.tiny:
        model = make(2, 64, 128, device=device, dtype=dtype)
    else:
        free, _ = torch.cuda.mem_get_info()
        if not (layers := depth(free, args.rows)):
            raise SystemExit(f"captured_step: expected free memory for a layer, found {free} bytes")
        print(f"{layers} of {LAYERS} layers")
        model = make(layers, WIDTH, INNER, device=device, dtype=dtype)
    x = torch.randn(args.rows, model[0].width, dtype=dtype).to(device)
    with torch.no_grad():
        base = timed(captured(lambda: model(x)).replay) if gpu else None
        config, state = adapter(model, dtype)
        pool = lora_ext.AdapterPool(model, max_slots=args.rows, max_rank=RANK)
        for i in range(args.rows):
            pool.load(f"a{i}", ({**config, "lora_alpha": 8 * (1 + i % 5)}, state))
        attached: Any = lora_ext.attach(model, pool, fuse_siblings=True)
        step = lora_ext.capturable(pool, args.rows)
        for adapters in (1, 16, args.rows):
            row(attached, pool, step, x, min(adapters, args.rows), base)
    print(machine_columns(device.type))
    return 0


def row(model: Any, pool: Any, step: Any, x: Tensor, adapters: int, base: float | None) -> None:
    """Check three rows of the step, then print its milliseconds, the base model's, and their
    ratio."""
    turns, rows, y = itertools.count(), len(x), torch.empty_like(x)
    graph: Any = None

    def run() -> None:
        y.copy_(model(x))

    def replay() -> int:
        turn = next(turns)
        with step, lora_ext.adapters(names_of(turn, adapters, rows), pool=pool):
            graph.replay() if graph else run()
        return turn

    if base is not None:
        with step, lora_ext.adapters(names_of(0, adapters, rows), pool=pool):
            graph = captured(run)
    last = names_of(replay(), adapters, rows)
    for i in (0, rows // 2, rows - 1):
        with lora_ext.adapters(last[i], pool=pool):
            alone = model(x[i : i + 1])
        off = float((y[i : i + 1] - alone).norm() / alone.norm())
        if not off <= 0.03:
            raise SystemExit(f"captured_step: row {i}: expected an error <= 0.03, found {off:.3g}")
    if base is None:
        print(f"{rows} rows, {adapters} adapters: correct; nothing is timed without a GPU")
        return
    took = timed(replay)
    print(f"{rows} rows, {adapters} adapters: {took:.3f} ms, base {base:.3f}, {took / base:.2f} x")


def names_of(turn: int, adapters: int, rows: int) -> list[str | None]:
    """Return the adapter of each row in replay ``turn``."""
    return [f"a{(turn + i % adapters) % rows}" for i in range(rows)]


if __name__ == "__main__":
    sys.exit(main())
