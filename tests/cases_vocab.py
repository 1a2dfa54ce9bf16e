"""Inputs and table row of the losses that process the vocabulary in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from contract import Check, Op, Outputs
from torch import Tensor

from lora_ext import ops, reference

# Largest relative errors. Sums of d products of order one are accumulated in float32. In 16 bits,
# the rounding of logits, weights and gradients has a relative error of 2^-12 (float16) or 2^-9
# (bfloat16).
BOUNDS = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 6e-3,
    torch.bfloat16: 4e-2,
}


@dataclass(frozen=True)
class Case:
    rows: int
    wide: int
    vocab: int
    chunk: int
    hiddens: int = 3
    bias: bool = False
    softcap: float | None = None
    tau: float = 1.0
    some: bool = True  # whether some rows are ignored
    frozen: bool = False

    def __str__(self) -> str:
        notes = [name for name in ("bias", "some", "frozen") if getattr(self, name)]
        notes += [f"cap{self.softcap}"] * (self.softcap is not None)
        sizes = f"N{self.rows}-d{self.wide}-V{self.vocab}-chunk{self.chunk}-k{self.hiddens}"
        return "-".join([sizes, f"tau{self.tau}", *notes])


SMALL = [
    Case(0, 4, 5, 3),
    Case(1, 1, 1, 1, hiddens=2, some=False),
    Case(3, 8, 17, 1, frozen=True),
    Case(5, 16, 40, 7, bias=True, tau=2.0),
    Case(5, 16, 40, 40, bias=True, tau=0.5, frozen=True),
    Case(4, 9, 33, 38, hiddens=1),
    Case(4, 16, 24, 8, softcap=1.5, frozen=True),
    Case(4, 16, 24, 16, hiddens=4, softcap=1.5, bias=True, tau=3.0, some=False),
]
LARGE = [
    Case(40, 64, 1000, 256, hiddens=2, bias=True, frozen=True),
    Case(33, 72, 4099, 1031, tau=2.0),
    Case(17, 40, 9000, 8192, softcap=2.0, frozen=True),
    Case(200, 48, 2500, 1250, hiddens=2, bias=True),
]


class Layer:
    """Hidden states, which are autograd leaves, and the output layer of a case."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str, exact: bool = False) -> None:
        g = torch.Generator().manual_seed(case.rows + 7 * case.vocab + case.chunk)

        def numbers(*size: int) -> Tensor:
            values = torch.randn(*size, generator=g)
            values = (2 * values).round().clamp(-3, 3) if exact else values
            return values.to(dtype).to(device)

        self.case = case
        self.hiddens = [numbers(case.rows, case.wide) for _ in range(case.hiddens)]
        self.weight = numbers(case.vocab, case.wide) / (1 if exact else case.wide**0.5)
        self.bias = numbers(case.vocab) if case.bias else None
        self.labels = torch.randint(case.vocab, (case.rows,), generator=g)
        self.mask = torch.rand(case.rows, generator=g) > 0.3
        if case.some:
            self.labels[~self.mask] = -100
        self.labels, self.mask = self.labels.to(device), self.mask.to(device)
        for h in self.hiddens:
            h.requires_grad_()
        if not case.frozen:
            for t in (self.weight, self.bias):
                if t is not None:
                    t.requires_grad_()

    def wide(self) -> Layer:
        other = object.__new__(Layer)
        other.case = self.case
        other.hiddens = [_wide(h) for h in self.hiddens]
        other.weight, other.labels, other.mask = _wide(self.weight), self.labels.cpu(), self.mask
        other.bias = None if self.bias is None else _wide(self.bias)
        other.mask = self.mask.cpu()
        return other

    def leaves(self) -> list[Tensor]:
        found = [*self.hiddens, self.weight, *([] if self.bias is None else [self.bias])]
        return [t for t in found if t.requires_grad]

    def cross_entropy(self, how: Any, **chunk: int) -> Tensor:
        return how(self.hiddens[0], self.weight, self.bias, self.labels, **chunk,
                   softcap=self.case.softcap)  # fmt: skip

    def kl(self, how: Any, **chunk: int) -> Tensor:
        return how(self.hiddens, self.weight, self.bias, tau=self.case.tau, **chunk,
                   mask=self.mask if self.case.some else None,
                   softcap=self.case.softcap)  # fmt: skip


def _wide(t: Tensor) -> Tensor:
    return t.detach().cpu().double().requires_grad_(t.requires_grad)


def both(layer: Layer, loss: str, ours: bool) -> Tensor:
    names = {"cross_entropy": "chunked_cross_entropy", "kl": "chunked_kl"}
    how = getattr(ops if ours else reference, names[loss])
    chunk = {"chunk": layer.case.chunk} if ours else {}
    return getattr(layer, loss)(how, **chunk)


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(3 * loss, leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]


def close(got: Tensor, expected: Tensor, bound: float, what: str) -> None:
    gap = (got.detach().cpu().double() - expected.detach()).abs().max().item() if got.numel() else 0
    size = max(1.0, expected.abs().max().item()) if got.numel() else 1
    assert gap <= bound * size, f"{what}: error {gap:.3g}, values up to {size:.3g}"


def inputs(
    case: Case, dtype: torch.dtype, *, seed: int = 0, exact: bool = False, device: str = "cpu"
) -> Layer:
    return Layer(case, dtype, device, exact)


def run(layer: Layer, ours: bool = True) -> Outputs:
    found: Outputs = {}
    for loss in ("cross_entropy", "kl"):
        value = both(layer, loss, ours)
        found[loss] = value.detach()
        # A single hidden state serves only as the teacher, which has no gradient.
        if loss == "cross_entropy" or layer.case.hiddens > 1:
            grads = gradients(value, layer.leaves())
            found |= {f"{loss} gradient {n}": g for n, g in enumerate(grads)}
    return found


def formula(layer: Layer) -> Outputs:
    return run(layer.wide(), ours=False)


def bounds(layer: Layer, exact: Outputs) -> Outputs:
    near = BOUNDS[layer.weight.dtype]
    return {
        k: torch.full_like(t, near * max(1.0, t.abs().max().item() if t.numel() else 1.0))
        for k, t in exact.items()
    }


def checks() -> Iterator[Check]:
    for with_gradient in (False, True):
        layer = Layer(Case(5, 16, 40, 16, bias=True, frozen=with_gradient), torch.float32, "cpu")
        head, tail = (layer.weight, layer.bias), (torch.float32, with_gradient)
        given = (layer.hiddens[0], *head, layer.labels, 16, -100, 0.0, *tail)
        yield "vocab_cross_entropy", given
        together = torch.stack([h.detach() for h in layer.hiddens]).requires_grad_()
        yield "vocab_kl", (together, *head, layer.mask, 2.0, 16, 0.0, *tail)


# torch's matrix products are not bitwise equal to those of the formula, and their bits depend on
# the number of threads.
OPS = [
    Op(
        "vocab",
        inputs,
        run,
        formula,
        bounds,
        small=SMALL,
        medium=LARGE,
        exact=False,
        steady=False,
        threads=None,
        checks=checks,
    )
]
