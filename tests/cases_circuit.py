"""Inputs, error bounds and table row of the circuit scan."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from contract import Check, Op, Outputs, wide
from torch import Tensor

from lora_ext import ops, reference
from lora_ext.reference._circuit import KINDS, num_transitions

Inputs = dict[str, Any]
LEAVES = ("leaf", "prior", "trans")


@dataclass(frozen=True)
class Window:
    """Kind and sizes of one circuit: rows, positions, components, vocabulary."""

    kind: str
    rows: int
    n_token: int
    components: int
    vocab: int

    @property
    def matrices(self) -> int:
        return num_transitions(self.kind, self.n_token)

    def __str__(self) -> str:
        return f"{self.kind}-{self.rows}x{self.n_token}x{self.components}x{self.vocab}"


def window_of(kind: str, rows: int, n_token: int, components: int, vocab: int) -> Window:
    """Return the window; kind "ff" always has one component."""
    return Window(kind, rows, n_token, 1 if kind == "ff" else components, vocab)


def _windows(sizes: list[tuple[int, int, int, int]]) -> list[Window]:
    return [window_of(kind, *size) for kind in KINDS for size in sizes]


SMALL = _windows([(1, 1, 1, 1), (3, 2, 5, 7), (2, 3, 8, 16), (5, 5, 3, 33), (2, 8, 17, 24)])
MEDIUM = _windows([(0, 4, 3, 5), (3, 6, 33, 40), (2, 16, 32, 130), (1, 7, 70, 9)])
LARGE = [
    Window("hmm", 2, 3, 300, 20),
    Window("btree", 1, 37, 20, 11),
    Window("cp", 3, 4, 64, 5000),
    Window("hmm", 1, 2, 1030, 3),
]


def circuit_inputs(
    window: Window,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    scale: float = 2.0,
    params: torch.dtype | None = None,
    marginalised: bool = True,
    device: str = "cpu",
) -> Inputs:
    """Return random logits, tokens (some are -1), and upstream gradients of both results, prefix
    and conditional."""
    g = torch.Generator().manual_seed(seed)
    b, n, c, v = window.rows, window.n_token, window.components, window.vocab

    def normal(*shape: int, as_dtype: torch.dtype) -> Tensor:
        return (scale * torch.randn(shape, generator=g)).to(as_dtype)

    params = params or dtype
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    m = window.matrices
    inputs = {
        "leaf": normal(b, n, c, v, as_dtype=dtype),
        "prior": None if window.kind == "ff" else normal(b, c, as_dtype=params),
        "trans": normal(b, m, c, c, as_dtype=params) if m else None,
        "x": torch.randint(-1 if marginalised else 0, v, (b, n), generator=g),
        "dprefix": torch.randn(b, n, generator=g).to(acc),
        "dconditional": torch.randn(b, n, generator=g).to(acc),
    }
    inputs = {k: t.to(device) if isinstance(t, Tensor) else t for k, t in inputs.items()}
    return {"kind": window.kind, **inputs}


def _gradients(scan: reference.CircuitScan, i: Inputs, leaves: dict[str, Tensor]) -> Outputs:
    grads = torch.autograd.grad(
        (scan.prefix, scan.conditional),
        list(leaves.values()),
        (i["dprefix"], i["dconditional"]),
        allow_unused=True,
    )
    return {
        f"d{k}": torch.zeros_like(t) if g is None else g
        for (k, t), g in zip(leaves.items(), grads, strict=True)
    }


def run(i: Inputs, scan: Any = None) -> Outputs:
    """Return the three outputs, and the gradient of every leaf that is not None."""
    leaves = {k: i[k].detach().requires_grad_() for k in LEAVES if i[k] is not None}
    out = (scan or ops.circuit_scan)(i["kind"], *(leaves.get(k) for k in LEAVES), i["x"])
    return {**{k: t.detach() for k, t in out._asdict().items()}, **_gradients(out, i, leaves)}


def formula(inputs: Inputs) -> Outputs:
    return run(wide(inputs), reference.circuit_scan)


def bounds(inputs: Inputs, exact: Outputs) -> Outputs:
    """Return the largest |error| allowed for each entry; the inputs count as exact.

    The absolute error of the logarithm of a sum of positive terms equals the relative error of the
    terms. Each position adds a few roundings (u) of numbers as large as the logits and log p, so
    the error is at most ``(8 + K) (8 + |log p|) u``. The relative error of a posterior is the
    absolute error of its logarithm; on a GPU, exponentials below 2^-126 are 0. Gradients are sums
    of products of such probabilities. Their error is within ``64 K u`` of the sum of upstream
    gradients, before the last rounding.
    """
    u = 2.0**-53 if inputs["leaf"].dtype == torch.float64 else 2.0**-24
    n_token = inputs["leaf"].shape[1]
    weight = sum(inputs[k].double().cpu().abs().sum(1) for k in ("dprefix", "dconditional"))
    allowed = {}
    for name, value in exact.items():
        if name in ("prefix", "conditional"):
            finite = value.nan_to_num(neginf=0).abs()
            allowed[name] = u * (8 + n_token) * (8 + finite)
        elif name == "posterior":
            allowed[name] = u * (64 + n_token * (8 - 2 * value.clamp(min=1e-300).log())) * value
            allowed[name] += 1e-37
        else:
            dtype = inputs[name[1:]].dtype
            eps = torch.finfo(dtype).eps / 2
            eps = eps if eps > u else 0.0
            tiny = torch.finfo(dtype).smallest_normal * eps if eps else 0.0
            size = weight.view(-1, *[1] * (value.dim() - 1))
            allowed[name] = 1.02 * eps * value.abs() + tiny + u * 64 * n_token * size
    return allowed


def checks() -> Iterator[Check]:
    library = torch.ops.lora_ext
    for kind in KINDS:
        window = window_of(kind, 3, 5, 3, 6)
        i = circuit_inputs(window, torch.float32, seed=14)
        leaf = i["leaf"].requires_grad_()
        yield "circuit_leaf", (leaf, i["x"])
        e, norm = library.circuit_leaf(leaf.detach(), i["x"])
        yield "circuit_leaf_backward", (e, leaf.detach(), i["x"], norm)
        parts = [i[k].requires_grad_() if i[k] is not None else None for k in ("prior", "trans")]
        yield "circuit_scan", (kind, e.requires_grad_(), *parts)
        detached = (e.detach(), *(t.detach() if t is not None else None for t in parts))
        *_, states = library.circuit_scan(kind, *detached, True)
        given = (i["dprefix"], None, kind, *detached, states, True, True)
        yield "circuit_scan_backward", given


OPS = [
    Op(
        "circuit",
        circuit_inputs,
        run,
        formula,
        bounds,
        small=SMALL,
        medium=MEDIUM,
        large=LARGE,
        exact=False,
        replays=[Window("btree", 16, 8, 32, 320)],
        captured=lambda i: ops.circuit_scan(*(i[k] for k in ("kind", *LEAVES, "x")))._asdict(),
        checks=checks,
    )
]
