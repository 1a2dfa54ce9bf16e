"""Cases of `--matrix layers`: training steps of layers and of a SmolLM2-shaped model.

A step is forward, backward and AdamW (``fused=True`` for all). The peer is PEFT. Adapters that are
trained at once are compared with PEFT runs of one adapter each, one after another. Losses and
gradients are compared before timing.
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
from common import error_over_bound, interleaved, peak_bytes
from peft import LoraConfig, get_peft_model
from row import Row, timing_columns
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import lora_ext

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = [f"adapter{i}" for i in range(8)]
RANK = 16
# (in, out, rank, tokens)
LAYERS = ((576, 1536, 16, 1024), (2048, 2048, 16, 1024), (2048, 2048, 64, 1024))


# --- layers ---------------------------------------------------------------------------------------
def bench_layers(rounds: int) -> Iterator[Row]:
    """Yield the rows of forward and backward of one adapted layer, relative to the base layer and
    to PEFT."""
    for p in (0.0, 0.1):
        over_peft: list[float] = []
        over_base: list[float] = []
        kept: list[float] = []
        for wide, out, rank, rows in LAYERS:
            torch.manual_seed(0)
            base = nn.Linear(wide, out, bias=False).requires_grad_(False)
            theirs = _peft_layer(base, rank, p)
            ours = lora_ext.from_peft(copy.deepcopy(theirs))
            x = torch.randn(rows, wide, requires_grad=True)
            dy = torch.randn(rows, out)
            error = _check_layer(theirs, ours, x, dy)
            calls = {
                "base": _step_of(base, x, dy),
                "peft": _step_of(theirs, x, dy),
                "lora_ext": _step_of(ours, x, dy),
            }
            times = interleaved(calls, rounds)
            saved = {name: _saved_bytes(call) for name, call in calls.items()}
            for name, time in times.items():
                yield Row(
                    "layers",
                    f"layer {wide}x{out}, dropout {p}",
                    name,
                    tokens=rows,
                    adapters="" if name == "base" else 1,
                    in_features=wide,
                    out_features=out,
                    rank=rank,
                    **timing_columns(time, "ms"),
                    mbytes=saved[name] / 1e6,
                    over_base=time.over(times["base"]),
                    over_peft=times["peft"].over(time),
                    worst_error=error if name == "lora_ext" else "",
                )
            over_peft.append(times["peft"].over(times["lora_ext"]))
            over_base.append(times["lora_ext"].over(times["base"]))
            kept.append(saved["lora_ext"] / saved["peft"])
        case = f"layers, dropout {p}"
        mean = statistics.geometric_mean(over_peft)
        yield Row(
            "layers", f"{case}, geometric mean", "lora_ext", unit="x", median=mean, over_peft=mean
        )
        worst = max(over_base)
        yield Row("layers", f"{case}, worst", "lora_ext", unit="x", median=worst, over_base=worst)
        ratio = max(kept)
        yield Row("layers", f"{case}, kept for backward", "lora_ext", unit="x", median=ratio)


def bench_many(rounds: int, rows: int = 16, adapters: int = 16) -> Iterator[Row]:
    """Yield the rows of 16 adapters with 16 tokens each: lora_ext makes one call for all adapters,
    PEFT 16 calls."""
    wide, out = 576, 1536
    torch.manual_seed(0)
    base = nn.Linear(wide, out, bias=False).requires_grad_(False)
    single = [_peft_layer(base, RANK, 0.0) for _ in range(adapters)]
    together = _peft_layer(base, RANK, 0.0, adapters)
    names = [f"adapter{i}" for i in range(adapters)]
    pairs = [
        (getattr(together, factor)[name].weight, getattr(layer, factor)["adapter0"].weight)
        for name, layer in zip(names, single, strict=True)
        for factor in ("lora_A", "lora_B")
    ]
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(other)
    lora_ext.from_peft(together)
    x = torch.randn(adapters, rows, wide, requires_grad=True)
    dy = torch.randn(adapters, rows, out)
    parts = [part.detach().requires_grad_() for part in x]

    def ours() -> None:
        together.zero_grad()
        x.grad = None
        together(x, adapter_names=names).backward(dy)

    def theirs() -> None:
        for layer, part, gradient in zip(single, parts, dy, strict=True):
            layer.zero_grad()
            part.grad = None
            layer(part).backward(gradient)

    ours()
    own = [mine.grad for mine, _ in pairs]
    for i, layer in enumerate(single):
        _, *peer = _results(layer, layer, parts[i], dy[i])
        wide = copy.deepcopy(layer).double()
        _, *exact = _results(wide, wide, parts[i].double(), dy[i])
        for each in zip(own[2 * i : 2 * i + 2], peer, exact, strict=True):
            _check(*each, "gradient of an adapter")
    times = interleaved({"peft": theirs, "lora_ext": ours}, rounds, min_seconds=0.05)
    for name, time in times.items():
        yield Row(
            "layers",
            "16 adapters x 16 tokens",
            name,
            tokens=rows * adapters,
            adapters=adapters,
            in_features=wide,
            out_features=out,
            rank=RANK,
            **timing_columns(time, "ms"),
            over_peft=times["peft"].over(time),
        )


def bench_modalities(rounds: int, samples: int = 12, length: int = 64) -> Iterator[Row]:
    """Yield the rows of a vision layer on a mixed batch, computed by one call or by one call per
    sample.

    Of every three samples, the first is half image, with the vision adapter of rank 64, and half
    text, with an adapter of rank 16. The second sample is text with the adapter of rank 16, the
    third is text of the base model.
    """
    wide, out, rank = 576, 1536, 64
    torch.manual_seed(0)
    base = nn.Linear(wide, out, bias=False).requires_grad_(False)
    layer = lora_ext.nn.VoraLinear.from_linear(base, rank, "vision")
    layer.add_adapter("text", RANK, RANK, init_lora_weights=False)
    layer.set_adapter(["default", "text"])
    nn.init.normal_(layer.B, std=0.1)
    mask = torch.zeros(samples, length, dtype=torch.bool)
    mask[::3, : length // 2] = True
    names = [None if i % 3 == 2 else "text" for i in range(samples)]
    ids = torch.tensor([-1 if name is None else 1 for name in names])[:, None]
    ids = torch.where(mask, 0, ids)  # Calls per sample get slices of these.
    each = [(slice(i, i + 1), ids[i].clone()) for i in range(samples)]
    x = torch.randn(samples, length, wide)
    dy = torch.randn(samples, length, out)

    def together() -> Tensor:
        return layer(x)

    def alone(x: Tensor = x, layer: nn.Module = layer) -> Tensor:
        return torch.cat([layer(x[i], adapter_ids=own) for i, own in each])

    def step(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            layer.zero_grad()
            forward().backward(dy)

        return run

    with lora_ext.adapters(names), lora_ext.nn.modality(mask):
        wide = copy.deepcopy(layer).double()
        found = [_results(layer, layer, x, dy), _results(layer, alone, x, dy)]
        found.append(_results(wide, functools.partial(alone, layer=wide), x.double(), dy))
        error = max(_check(*each, "modalities") for each in zip(*found, strict=True))
        for way, calls in (
            ("forward", {"per sample": alone, "lora_ext": together}),
            ("forward and backward", {"per sample": step(alone), "lora_ext": step(together)}),
        ):
            with torch.set_grad_enabled(way != "forward"):
                times = interleaved(calls, rounds, min_seconds=0.05)
            for name, time in times.items():
                yield Row(
                    "layers",
                    f"mixed modalities, {samples} samples x {length} tokens, {way}",
                    name,
                    tokens=samples * length,
                    adapters=2,
                    in_features=wide,
                    out_features=out,
                    rank=rank,
                    **timing_columns(time, "ms"),
                    over_base=time.over(times["per sample"]),
                    worst_error=error if name == "lora_ext" else "",
                )


def _peft_layer(base: nn.Linear, rank: int, p: float, adapters: int = 1) -> Any:
    """Return PEFT's layer around ``base``, with random trainable factors."""
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=p, target_modules=["0"], init_lora_weights=False
    )
    names = [f"adapter{i}" for i in range(adapters)]
    model: Any = get_peft_model(nn.Sequential(base), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.set_requires_grad(names)
    return model.base_model.model[0].train()


def _factors(layer: Any) -> list[nn.Parameter]:
    return [p for key, p in layer.named_parameters() if "lora_" in key]


def _step_of(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    def step() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(dy)

    return step


def _check_layer(theirs: Any, ours: Any, x: Tensor, dy: Tensor) -> float:
    """Return the largest error of results and gradients. Dropout is disabled, since masks would
    differ."""
    wide, x64 = copy.deepcopy(theirs).double(), x.detach().double().requires_grad_()
    found: list[list[Tensor]] = []
    for layer, rows in ((ours, x), (theirs, x), (wide, x64)):
        layer.eval()
        rows.grad = None
        found.append(_results(layer, layer, rows, dy))
        assert rows.grad is not None
        found[-1].append(rows.grad.clone())
        layer.train()
    return max(_check(*each, "layer") for each in zip(*found, strict=True))


def _results(
    layer: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor
) -> list[Tensor]:
    """Return ``forward(x)`` and the gradients of the layer's factors."""
    layer.zero_grad()
    y = forward(x)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(p.grad.clone() for p in _factors(layer) if p.grad is not None)]


def _check(ours: Tensor, peer: Tensor, exact: Tensor, what: str) -> float:
    """Return the largest error, divided by its bound; exit if this is above 1."""
    worst = error_over_bound(ours, peer, exact)
    if not worst <= 1:
        raise SystemExit(f"lora_layers: {what}: expected error / bound <= 1, found {worst:.3g}")
    return worst


def _saved_bytes(step: Callable[[], None]) -> int:
    """Return the bytes that autograd saves for the backward; each storage is counted once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(kept.values())


# --- models ---------------------------------------------------------------------------------------
def bench_models(rounds: int, layers: int = 30) -> Iterator[Row]:
    """Yield the rows of eight adapters trained at once, and of eight PEFT runs with one optimizer
    each."""
    base = base_model(layers)
    alone = {name: with_adapters(base, [name]) for name in NAMES}
    together = lora_ext.from_peft(with_adapters(base, NAMES))
    together.set_requires_grad(NAMES)
    state = dict(together.named_parameters())
    with torch.no_grad():
        for model in alone.values():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    state[key].copy_(parameter)
    wide = copy.deepcopy(base).double()
    exact = {name: with_adapters(wide, [name]) for name in NAMES}
    for name, model in exact.items():
        model.load_state_dict(alone[name].state_dict())
    runs = [
        (models, {name: optimizer_of(model, name) for name, model in models.items()})
        for models in (alone, exact)
    ]
    shared = {name: optimizer_of(together, name) for name in NAMES}
    for length in (16, 64):
        ids = torch.randint(0, 49152, (len(NAMES), length), generator=torch.manual_seed(1))

        def eight_runs(of: Any = runs[0], ids: Tensor = ids) -> list[float]:
            models, optimizers = of
            return [
                _model_step(models[name], ids[i : i + 1], None, [optimizers[name]])[0]
                for i, name in enumerate(NAMES)
            ]

        def at_once(ids: Tensor = ids) -> list[float]:
            return _model_step(together, ids, NAMES, list(shared.values()))

        steps = (at_once, eight_runs, functools.partial(eight_runs, runs[1]))
        losses = [torch.tensor([step() for step in steps], dtype=torch.float64) for _ in range(2)]
        worst = max(_check(*each, "losses") for each in losses)
        gc.collect()
        times = interleaved({"peft": eight_runs, "lora_ext": at_once}, rounds, warm_up=0)
        for name, time in times.items():
            yield Row(
                "layers",
                f"step of 8 adapters x {length} tokens",
                name,
                tokens=len(NAMES) * length,
                adapters=len(NAMES),
                rank=RANK,
                **timing_columns(time, "ms"),
                over_peft=times["peft"].over(time),
                worst_error=worst if name == "lora_ext" else "",
            )


def bench_memory(layers: int = 30) -> Iterator[Row]:
    """Yield rows with the peak bytes of a step of one adapter on 4 x 64 tokens, and with the bytes
    saved by autograd."""
    base = base_model(layers)
    ids = torch.randint(0, 49152, (4, 64), generator=torch.manual_seed(2))
    for p in (0.0, 0.1):
        found: dict[str, tuple[int, int]] = {}
        for name in ("peft", "lora_ext"):
            model = with_adapters(base, NAMES[:1], p)
            if name == "lora_ext":
                lora_ext.from_peft(model)
            optimizer = optimizer_of(model, NAMES[0])

            def step(model: Any = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
                _model_step(model, ids, None, [optimizer])

            for _ in range(2):
                step()  # creates the optimizer's state and the buffers that layers share
            found[name] = peak_bytes(step), _saved_bytes(step)
        for what, index in (("peak", 0), ("kept for backward", 1)):
            for name, nbytes in found.items():
                yield Row(
                    "layers",
                    f"step of one adapter, dropout {p}, {what}",
                    name,
                    tokens=ids.numel(),
                    adapters=1,
                    rank=RANK,
                    unit="x",
                    median=nbytes[index] / found["peft"][index],
                    mbytes=nbytes[index] / 1e6,
                )


def base_model(layers: int) -> LlamaForCausalLM:
    """Return a frozen model of SmolLM2's shape with random weights."""
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
    return LlamaForCausalLM(config).requires_grad_(False)


def with_adapters(
    base: nn.Module, names: list[str], p: float = 0.0, modules: list[str] = MODULES
) -> Any:
    """Return a PEFT model that shares the base weights."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=p, target_modules=modules)
    shared = {id(p): p for p in base.parameters()}
    model: Any = get_peft_model(copy.deepcopy(base, shared), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.train()


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """Return AdamW for one adapter's parameters."""
    own = [p for key, p in model.named_parameters() if f".{name}." in key]
    return torch.optim.AdamW(own, lr=1e-4, fused=True)


def _model_step(
    model: Any, ids: Tensor, names: list[str] | None, optimizers: list[torch.optim.Optimizer]
) -> list[float]:
    extra = {} if names is None else {"adapter_names": names}
    logits = model(input_ids=ids, **extra).logits[:, :-1]
    each = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    losses = each.view(len(ids), -1).mean(1)
    losses.sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return losses.tolist()
