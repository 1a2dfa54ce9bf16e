"""Time the depth mix (a weighted sum of normed hidden states) and chains of torch ops.

The peers compute k norms, k products and k - 1 sums: "chain" with the norm as transformers writes
it, "rms_norm" with torch's. There are several sets of hidden states, used in turn, with at least
256 MiB in total, so that each call reads its set from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from common import Timing, copy_call
from lora_ops import COLD_BYTES, timer
from row import Row, timing_columns
from torch import Tensor

from lora_ext import ops, reference

DEPTHS, WIDTH, TOKENS, EPS = 3, 4096, 512, 1e-6
Mix = Callable[[list[Tensor], list[Tensor], Tensor], Tensor]


@dataclass
class Problem:
    """Sets of hidden states, and the arguments that are mixed with each of them."""

    hiddens: list[list[Tensor]]
    gammas: list[Tensor]
    weights: Tensor
    up: Tensor

    @classmethod
    def make(cls, device: str, dtype: torch.dtype) -> Problem:
        g = torch.Generator(device).manual_seed(0)

        def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*size, generator=g, device=device).to(dtype).requires_grad_()

        count = max(2, COLD_BYTES // (DEPTHS * TOKENS * WIDTH * dtype.itemsize))
        return cls(
            [[normal(TOKENS, WIDTH) for _ in range(DEPTHS)] for _ in range(count)],
            [normal(WIDTH) for _ in range(DEPTHS)],
            normal(TOKENS, DEPTHS, dtype=torch.float32),
            normal(TOKENS, WIDTH).detach(),
        )

    def nbytes(self, way: str) -> int:
        """Return the compulsory traffic of one set.

        The forward reads k states and writes 1; the backward reads k + 1 and writes k.
        """
        states = DEPTHS + 1 if way == "forward" else 3 * DEPTHS + 2
        return states * self.up.nbytes


def lora_ext(hiddens: list[Tensor], gammas: list[Tensor], weights: Tensor) -> Tensor:
    return ops.depth_mix(hiddens, gammas, weights, EPS)


def chain(hiddens: list[Tensor], gammas: list[Tensor], weights: Tensor) -> Tensor:
    """Compute norms in float32 and round them, as LlamaRMSNorm does."""

    def normed(h: Tensor, gamma: Tensor) -> Tensor:
        wide = h.float()
        return gamma * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(h.dtype)

    return _mixed([normed(h, gamma) for h, gamma in zip(hiddens, gammas, strict=True)], weights)


def rms_norm(hiddens: list[Tensor], gammas: list[Tensor], weights: Tensor) -> Tensor:
    """Compute the same mix as ``chain``, with torch's norm."""
    norms = [
        torch.nn.functional.rms_norm(h, (h.shape[-1],), gamma, EPS)
        for h, gamma in zip(hiddens, gammas, strict=True)
    ]
    return _mixed(norms, weights)


PROVIDERS: dict[str, Mix] = {"lora_ext": lora_ext, "chain": chain, "rms_norm": rms_norm}


def forward(p: Problem, mix: Mix) -> None:
    """Mix every set without gradients."""
    with torch.no_grad():
        for hiddens in p.hiddens:
            mix(hiddens, p.gammas, p.weights)


def both_ways(p: Problem, mix: Mix) -> None:
    """Mix every set and compute the gradients of all arguments."""
    with torch.inference_mode(False), torch.enable_grad():
        for hiddens in p.hiddens:
            u = mix(hiddens, p.gammas, p.weights)
            torch.autograd.grad(u, [*hiddens, *p.gammas, p.weights], p.up)


WAYS = {"forward": forward, "forward and backward": both_ways}


def bench_mix(device: str, rounds: int) -> Iterator[Row]:
    """Yield the rows of all implementations, without and with the backward, and of a copy. All are
    timed in the same rounds."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    copy, copied = copy_call(device=device)
    with torch.inference_mode(False):
        p = Problem.make(device, dtype)
    errors = {name: check(p, mix, name) for name, mix in PROVIDERS.items()}
    for way, run in WAYS.items():
        calls: dict[str, Callable[[], object]] = {"copy": copy}
        for name, mix in PROVIDERS.items():
            calls[name] = lambda run=run, mix=mix: run(p, mix)
        times = timer(device)(calls, rounds)
        for name in PROVIDERS:
            one = Timing.of([t / len(p.hiddens) for t in times[name].rounds])
            yield Row(
                "mix",
                case=f"mix of {DEPTHS}, width {WIDTH}, {TOKENS} tokens: {way}",
                provider=name,
                dtype=str(dtype).removeprefix("torch."),
                tokens=TOKENS,
                in_features=WIDTH,
                **timing_columns(one),
                mbytes=p.nbytes(way) / 1e6,
                gbytes_per_s=p.nbytes(way) / one.median / 1e9,
                of_copy=times["copy"].over(one) * p.nbytes(way) / copied,
                worst_error=errors[name],
            )


def check(p: Problem, mix: Mix, name: str) -> float:
    """Return the largest error of the mix and the gradients, divided by its bound, for some rows.

    The bound is a multiple of the largest value. It covers float32 sums of a row and over the rows,
    and for 16-bit types the roundings of a norm, of its product and of each sum.
    """
    rows = 8
    worst = 0.0
    with torch.inference_mode(False), torch.enable_grad():
        hiddens = [h[:rows].detach().requires_grad_() for h in p.hiddens[0]]
        inputs = [*hiddens, *p.gammas, p.weights[:rows].detach().requires_grad_()]
        wide = [t.detach().double().requires_grad_() for t in inputs]

        def results(mix: Mix, tensors: list[Tensor], up: Tensor) -> list[Tensor]:
            u = mix(tensors[:DEPTHS], tensors[DEPTHS : 2 * DEPTHS], tensors[-1])
            return [u.detach(), *torch.autograd.grad(u, tensors, up)]

        found = results(mix, inputs, p.up[:rows])
        exact = results(
            lambda h, gammas, w: reference.depth_mix(h, gammas, w, EPS),
            wide,
            p.up[:rows].double(),
        )
    unit = torch.finfo(p.up.dtype).eps / 2
    near = (WIDTH + 32) * 2.0**-24 + (8 * DEPTHS * unit if p.up.dtype != torch.float32 else 0)
    for mine, formula in zip(found, exact, strict=True):
        error = (mine.double() - formula).abs().max() / (near * formula.abs().max())
        worst = max(worst, error.item())
    if not worst <= 1:
        raise SystemExit(f"bench_lora: {name}: result is off by {worst:.3g} times its bound")
    return worst


def _mixed(norms: list[Tensor], weights: Tensor) -> Tensor:
    weights = weights.to(norms[0].dtype)
    mixed = weights[:, 0, None] * norms[0]
    for e, n in enumerate(norms[1:], 1):
        mixed = mixed + weights[:, e, None] * n
    return mixed
