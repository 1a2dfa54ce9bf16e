"""Arguments of mixes of normed hidden states, and helpers for tests of their laws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from backends import Backend
from contract import Check, Op, Outputs
from torch import Tensor

from lora_ext import ops

Shape = tuple[tuple[int, ...], int, int]  # leading dimensions (...), width d, number of depths k

SMALL: list[Shape] = [
    ((1,), 1, 1), ((1,), 3, 2), ((5,), 8, 3), ((2, 3), 33, 4), ((19,), 24, 2), ((4,), 64, 8),
    ((1,), 200, 3), ((0,), 16, 3), ((), 16, 2), ((33,), 40, 3),
]  # fmt: skip
LARGE: list[Shape] = [
    ((40,), 257, 3), ((2, 17), 576, 3), ((5,), 4096, 3), ((3,), 8200, 2), ((3,), 16392, 1),
    ((4200,), 8, 2), ((6,), 1024, 8),
]  # fmt: skip
POWERS: list[Shape] = [((1,), 1, 1), ((5,), 8, 3), ((2, 9), 64, 8), ((35,), 32, 2), ((3,), 1024, 4)]
NORMS = ["rms", "layer"]
norms = pytest.mark.parametrize("norm", NORMS)


@dataclass(frozen=True)
class Mix:
    """Arguments of one call; ``router`` and ``bias`` replace ``weights`` if they are given."""

    hiddens: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor] | None
    weights: Tensor
    router: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6
    norm: str = "rms"

    def run(self, library: Any = ops) -> tuple[Tensor, ...]:
        rest = (self.eps, self.betas, self.norm)
        if self.router is None:
            return (library.depth_mix(self.hiddens, self.gammas, self.weights, *rest),)
        return library.depth_mix_routed(self.hiddens, self.gammas, self.router, self.bias, *rest)

    def map(self, change: Callable[[Tensor], Tensor]) -> Mix:
        def of(value: Any) -> Any:
            if isinstance(value, list):
                return [change(t) for t in value]
            return change(value) if isinstance(value, Tensor) else value

        return replace(self, **{f.name: of(getattr(self, f.name)) for f in fields(self)})

    def tensors(self) -> list[Tensor]:
        """Return all differentiable arguments, in their order."""
        last = [self.weights] if self.router is None else [self.router, self.bias]
        return [*self.hiddens, *self.gammas, *(self.betas or []), *last]  # type: ignore[list-item]

    def wide(self) -> Mix:
        return self.map(lambda t: t.detach().cpu().double())


def make(
    shape: Shape,
    dtype: torch.dtype,
    backend: Backend | None = None,
    *,
    norm: str = "rms",
    scales: torch.dtype | None = None,
    betas: bool = True,
    routed: bool = False,
    exact: bool = False,
) -> Mix:
    """Return random arguments. If ``exact``, the entries of each row are plus and minus the same
    power of two, which makes its norm exact."""
    lead, width, depths = shape
    g = torch.Generator().manual_seed(width + 31 * depths + 7 * len(lead))
    sums = torch.float64 if dtype == torch.float64 else torch.float32

    def numbers(*size: int, dtype: torch.dtype | None = None, spread: float = 1.0) -> Tensor:
        if exact:
            return torch.randint(-2, 3, size, generator=g).to(dtype or scales or sums)
        values = torch.randn(size, generator=g, dtype=torch.float64) * spread
        return values.to(dtype or scales or sums)

    hiddens = []
    for e in range(depths):
        if exact:  # Half of the signs are minus, so the mean is zero.
            signs = torch.rand((*lead, width), generator=g).argsort(-1) * 2 < width
            size = 2.0 ** torch.randint(-1, 2, (*lead, 1), generator=g)
            hiddens.append(torch.where(signs, size, -size).to(dtype))
        else:
            hiddens.append((numbers(*lead, width, dtype=torch.float64) * (1 + e) + e).to(dtype))
    weights = torch.randint(0, 3, (*lead, depths), generator=g).to(sums) / 2
    mix = Mix(
        hiddens,
        [numbers(width) for _ in range(depths)],
        [numbers(width) for _ in range(depths)] if betas else None,
        weights if exact else torch.randn((*lead, depths), generator=g).to(sums),
        eps=0.0 if exact else 1e-6,
        norm=norm,
    )
    if routed:
        spread = 0.0 if exact else width**-0.5
        router = numbers(depths, width, spread=spread) * (0 if exact else 1)
        mix = replace(mix, router=router, bias=numbers(depths) * (0 if exact else 1))
    return mix.map(lambda t: t.to(backend.device)) if backend else mix


def shapes_of(backend: Backend) -> list[Shape]:
    return SMALL if backend.small else SMALL + LARGE


def scale_dtypes(dtype: torch.dtype) -> list[torch.dtype]:
    """Return the dtypes allowed for gammas: the hidden states' dtype, and float32 for 16 bits."""
    return [dtype] if dtype in (torch.float32, torch.float64) else [dtype, torch.float32]


def each(backend: Backend) -> Iterator[tuple[torch.dtype, torch.dtype]]:
    for dtype in backend.dtypes():
        for scales in scale_dtypes(dtype):
            yield dtype, scales


def gradients(
    mix: Mix, ups: Sequence[Tensor], library: Any = ops, *, copies: bool = True
) -> list[Tensor]:
    """Return the gradients of all arguments. The op gets copies of the arguments or, if ``copies``
    is False, the arguments themselves with their strides."""
    mix = mix.map(lambda t: (t.detach().clone() if copies else t.detach()).requires_grad_())
    return list(torch.autograd.grad(mix.run(library), mix.tensors(), list(ups)))


def upstream(mix: Mix, *, exact: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    found = []
    for t in mix.run():
        values = (
            torch.randint(-2, 3, t.shape, generator=g)
            if exact
            else torch.randn(t.shape, generator=g, dtype=torch.float64)
        )
        found.append(values.to(t.dtype).to(t.device))
    return found


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def inputs(
    shape: Shape, dtype: torch.dtype, *, seed: int = 0, exact: bool = False, device: str = "cpu",
    **how: Any,
) -> dict[str, Any]:  # fmt: skip
    mix = make(shape, dtype, exact=exact, **how).map(lambda t: t.to(device) * (1 + seed % 4))
    return {f.name: getattr(mix, f.name) for f in fields(mix)}


def run(i: dict[str, Any]) -> Outputs:
    """Return every result and, for fixed upstream gradients, the gradient of every argument."""
    mix = Mix(**i)
    found = [*mix.run(), *gradients(mix, upstream(mix))]
    return {str(n): t for n, t in enumerate(found)}


def checks() -> Iterator[Check]:
    forward = torch.ops.lora_ext.depth_mix_forward.default
    for dtype, norm, routed, need in (
        (torch.float32, "rms", False, True),
        (torch.float32, "rms", True, False),
        (torch.bfloat16, "layer", True, True),
        (torch.float64, "layer", False, False),
    ):
        mix = make(((2, 3), 24, 3), dtype, norm=norm, routed=routed)
        plain, mix = mix, mix.map(lambda t: t.clone().requires_grad_())
        head = (mix.hiddens, mix.gammas, mix.betas)
        last = (None, mix.router, mix.bias) if routed else (mix.weights, None, None)
        yield "depth_mix_forward", (*head, *last, mix.eps, norm)
        head = (plain.hiddens, plain.gammas, plain.betas)
        last = (None, plain.router, plain.bias) if routed else (plain.weights, None, None)
        _, chosen, rinv, mean = forward(*head, *last, mix.eps, norm)
        up = [t.detach() for t in upstream(plain)]
        weights = chosen if routed else plain.weights
        rest = (weights, plain.router, rinv, mean, need)
        yield "depth_mix_backward", (up[0], up[1] if routed else None, *head, *rest)


# Bounds and exact values depend on the norm: see test_contract_depth_mix.py.
OPS = [
    Op(
        "depth_mix",
        inputs,
        run,
        small=[((20,), 72, 3), ((2, 3), 33, 4)],
        medium=[((2, 17), 576, 3), ((4200,), 8, 2), ((100,), 257, 3)],
        variants=(({"routed": True}, {"routed": False, "norm": "layer"}),),
        replays=[((40,), 576, 3)],
        captured=lambda i: {str(n): t for n, t in enumerate(Mix(**i).run())},
        checks=checks,
    )
]
