"""Shapley values: what each layer is worth in the game of all of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext._checks import integer, require
from lora_ext._torch import evaluating

from .coalitions import RowwiseError, coalitions
from .controller import CopraController

Method = Literal["exact", "permutation", "owen"]

_MOST_EXACT = 20  # players: a million coalitions
_MOST_EXACT_LAYERS = 12  # by default, where a coalition is a forward of a model
_ORDERS, _DRAWS, _LEVELS = 32, 4, 16  # samples by default
# By then each weight is read for enough tokens. Beyond, activations are fresh memory every time: in
# one forward of SmolLM2 on 4096 tokens that was a quarter of the time, in 16 on 256 a twentieth.
_MOST_TOKENS = 1024

#: Values of coalitions, each of which is a number whose bits are its players.
Values = Callable[[Sequence[int]], list[float]]


class Shapley(NamedTuple):
    """What each player is worth.

    The values add up to v(all) - v(none), to rounding, with the methods "exact" and "permutation".
    """

    values: Tensor  # (n,) float64
    standard_error: Tensor  # (n,) float64: 0 if exact, NaN if a single sample says nothing of it
    evaluations: int  # coalitions whose value was asked for


def shapley_values(
    value_fn: Callable[[Tensor], float],
    n: int,
    method: Method = "exact",
    samples: int | None = None,
    generator: torch.Generator | None = None,
    *,
    cache: bool = True,
    antithetic: bool = False,
    levels: int = _LEVELS,
) -> Shapley:
    """Shapley values of a game of n players.

    ``phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S))``.

    Args:
        value_fn: v, a finite number for each bool tensor ``(n,)``, True for who takes part.
        n: players.
        method: "exact" asks for all 2^n coalitions. "permutation" lets the players join in random
            orders, n + 1 coalitions each. "owen" draws players with probability q at ``levels``
            midpoints q of [0, 1], and asks for each player with and without: n + 1 coalitions
            each. The midpoints leave an error of the order of 1 / levels^2.
        samples: orders (default 32), or drawn coalitions a level (default 4).
        generator: of the samples; default is torch's, on the CPU.
        cache: ask for each coalition once. Without, every time: for a v that is noisy.
        antithetic: take each order reversed too, so that ``samples`` orders become twice as many.
        levels: of "owen".

    Returns:
        :class:`Shapley`.

    Raises:
        ValueError: n, samples or levels below 1, another method, "exact" for more than 20 players,
            or a value that is not finite, with its coalition.

    Source: Shapley 1953; Castro et al. 2009 for orders; Owen 1972, Okhrati and Lipani 2021 for
    levels; arXiv 2410.22911 for layers as players.
    """
    estimator = _estimator(n, method, samples, generator, antithetic, levels)

    def values(coalitions: Sequence[int]) -> list[float]:
        return [float(value_fn(_mask(coalition, n))) for coalition in coalitions]

    return _run(estimator, n, values, cache, 1)


def layer_shapley(
    model: nn.Module,
    controller: CopraController,
    eval_fn: Callable[..., Any],
    method: Method | None = None,
    samples: int | None = None,
    generator: torch.Generator | None = None,
    *,
    batch: dict[str, Any] | None = None,
    batched_coalitions: int = 1,
    cache: bool = True,
    antithetic: bool = False,
    levels: int = _LEVELS,
) -> Shapley:
    """Shapley values of the groups of a controller: what each adds to a utility of the model.

    The model computes in evaluation mode and without gradients; modes and masks are afterwards as
    they were.

    Args:
        model: the controller's.
        controller: its groups are the players.
        eval_fn: ``eval_fn(model)`` is the utility, a number: accuracy, or a loss with its sign
            turned. Given a batch, ``eval_fn(output, batch)`` is the utility of each row of
            what the model makes of it, ``(rows,)``; v(S) is their mean.
        method: default is "exact" up to 12 groups, else "permutation".
        samples, generator, cache, antithetic, levels: as :func:`shapley_values`.
        batch: keyword arguments of the model. Tensors with as many rows as the first are repeated
            for each coalition, everything else is handed on.
        batched_coalitions: K, coalitions in one forward, each of which has its own copy of the
            batch's rows. The weights are read once for all of them. On the CPU a forward takes
            fewer where they would have more than 1024 tokens: from there on nothing is gained.

    Returns:
        :class:`Shapley`.

    Raises:
        ValueError: another model than the controller's; what :func:`shapley_values` refuses;
            ``batched_coalitions`` below 1, or above it without a batch; a batch without tensors; an
            ``eval_fn`` that returns something else than a number a row.

    Warns:
        UserWarning: a layer cannot be switched row by row, naming it. Coalitions are then evaluated
            one by one.
    """
    n, modules = len(controller.layers), set(model.modules())
    where = "layer_shapley"
    other = f"a {type(model).__name__} without its layers"
    fits = modules.issuperset(chain(*controller.layers.layers))
    require(fits, where, "model", "the controller's", other)
    if method is None:
        method = "exact" if n <= _MOST_EXACT_LAYERS else "permutation"
    estimator = _estimator(n, method, samples, generator, antithetic, levels)
    count = batched_coalitions
    fits = count == 1 or (count > 1 and batch is not None)
    require(fits, where, "batched_coalitions", "at least 1, and 1 without a batch", count)

    values = _Utilities(model, controller, eval_fn, batch)
    at_once = 1 if batch is None else _coalitions_at_once(values.first, count)
    with evaluating(model), torch.no_grad():
        return _run(estimator, n, values, cache, at_once)


def _coalitions_at_once(inputs: Tensor, most: int) -> int:
    """Return how many copies of a batch a forward has: at most ``most``; on the CPU fewer, but one,
    where they have more than 1024 tokens. Inputs are token numbers ``(rows, ...)``, or features."""
    if inputs.device.type != "cpu":
        return most
    tokens = inputs.shape[:-1].numel() if inputs.is_floating_point() else inputs.numel()
    return min(most, max(1, _MOST_TOKENS // max(1, tokens)))


@dataclass(eq=False)
class _Utilities:
    """Values of coalitions; on a batch, all that are asked for at once in one forward."""

    model: nn.Module
    controller: CopraController
    eval_fn: Callable[..., Any]
    batch: dict[str, Any] | None
    row_by_row: bool = True  # until a layer refuses

    def __post_init__(self) -> None:
        batch = {"": torch.empty(0)} if self.batch is None else self.batch
        tensors = [v for v in batch.values() if isinstance(v, Tensor) and v.dim()]
        require(tensors, "layer_shapley", "batch", "tensors with rows", sorted(batch))
        self.first, self.rows = tensors[0], len(tensors[0])

    def __call__(self, asked: Sequence[int]) -> list[float]:
        masks = [_mask(coalition, len(self.controller.layers)) for coalition in asked]
        if len(masks) > 1 and self.row_by_row:
            try:
                with coalitions(self.controller.layers, torch.stack(masks), self.rows):
                    return self._utilities(len(masks))
            except RowwiseError as error:
                self.row_by_row = False
                told = f"layer_shapley: {error}; coalitions are evaluated one by one"
                warnings.warn(told, stacklevel=6)
        found: list[float] = []
        for mask in masks:
            with self.controller.coalition(mask):
                found += self._utilities(1)
        return found

    def _utilities(self, times: int) -> list[float]:
        if self.batch is None:
            return [float(self.eval_fn(self.model))]
        batch = dict(self.batch)
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.dim() and value.shape[0] == self.rows:
                batch[name] = value.repeat(times, *[1] * (value.dim() - 1))
        found = self.eval_fn(self.model(**batch), batch)
        shape = tuple(found.shape) if isinstance(found, Tensor) else found
        expected = f"the utility of each row, of shape {(times * self.rows,)}"
        require(shape == (times * self.rows,), "layer_shapley", "eval_fn", expected, shape)
        return found.double().view(times, self.rows).mean(1).tolist()


def _estimator(
    n: int,
    method: Method,
    samples: int | None,
    generator: torch.Generator | None,
    antithetic: bool,
    levels: int,
) -> _Estimator:
    where = "shapley_values"
    for name, value in (("n", n), ("samples", samples), ("levels", levels)):
        if value is not None:
            integer(where, name, value, 1)
    if method == "permutation":
        return _permutation(n, samples or _ORDERS, antithetic, generator)
    if method == "owen":
        return _owen(n, samples or _DRAWS, levels, generator)
    require(method == "exact", where, "method", "'exact', 'permutation' or 'owen'", repr(method))
    expected = f"at most {_MOST_EXACT} players for method 'exact'"
    require(n <= _MOST_EXACT, where, "n", expected, f"{n}; 'permutation' and 'owen' take samples")
    return _exact(n)


def _run(estimator: _Estimator, n: int, values: Values, cache: bool, at_once: int) -> Shapley:
    asked = list(dict.fromkeys(estimator.coalitions)) if cache else list(estimator.coalitions)
    found: list[float] = []
    for start in range(0, len(asked), at_once):
        part = asked[start : start + at_once]
        for coalition, value in zip(part, values(part), strict=True):
            if not math.isfinite(value):
                players = _mask(coalition, n).nonzero().flatten().tolist()
                other = f"{value} for the coalition {players} of {n} players"
                raise ValueError(
                    f"shapley_values: value_fn: expected a finite number, found {other}"
                )
            found.append(value)
    if cache:
        known = dict(zip(asked, found, strict=True))
        found = [known[coalition] for coalition in estimator.coalitions]
    phi, error = estimator.combine(torch.tensor(found, dtype=torch.float64))
    return Shapley(phi, error, len(asked))


def _mask(coalition: int, n: int) -> Tensor:
    return torch.tensor([coalition >> i & 1 for i in range(n)], dtype=torch.bool)


# -------------------------------------------------------------------------------------------------
# Estimators


class _Estimator(NamedTuple):
    """Coalitions to ask for, and the values ``(n,)`` and standard errors ``(n,)`` that follow.

    A coalition is a number whose bit i says whether player i takes part. No estimator looks at a
    value before it has named all coalitions, so that these can be evaluated many at a time.
    """

    coalitions: list[int]  # may come more than once
    combine: Callable[[Tensor], tuple[Tensor, Tensor]]  # of their values, float64, in order


def _exact(n: int) -> _Estimator:
    """All ``2^n`` coalitions, by the definition: each player's weighted mean gain over those of
    the others. The standard error is 0."""

    def combine(v: Tensor) -> tuple[Tensor, Tensor]:
        number = torch.arange(2**n)
        sizes = sum((number >> i & 1 for i in range(n)), torch.zeros_like(number))
        # |S|! (n - |S| - 1)! / n! of a coalition of the others
        weights = [1 / (n * math.comb(n - 1, size)) for size in range(n)]
        weight = torch.tensor([*weights, 0.0], dtype=torch.float64)[sizes]
        phi = torch.zeros(n, dtype=torch.float64)
        for i in range(n):
            without = number[(number >> i & 1) == 0]
            phi[i] = (weight[without] * (v[without | 1 << i] - v[without])).sum()
        return phi, torch.zeros_like(phi)

    return _Estimator(list(range(2**n)), combine)


def _permutation(
    n: int, orders: int, antithetic: bool, generator: torch.Generator | None
) -> _Estimator:
    """Gains along random orders of joining; a sample is an order, or one and its reverse."""
    drawn: list[list[int]] = []
    for _ in range(orders):
        order = torch.randperm(n, generator=generator).tolist()
        drawn += [order, order[::-1]] if antithetic else [order]
    # The coalitions along an order, from the empty to the full one.
    asked = [c for order in drawn for c in accumulate((1 << i for i in order), initial=0)]

    def combine(v: Tensor) -> tuple[Tensor, Tensor]:
        gains = v.view(len(drawn), n + 1).diff(dim=1)  # by place in the order
        by_player = torch.empty_like(gains).scatter_(1, torch.tensor(drawn), gains)
        samples = by_player.view(orders, -1, n).mean(1)
        return samples.mean(0), _error_of_mean(samples)

    return _Estimator(asked, combine)


def _owen(n: int, draws: int, levels: int, generator: torch.Generator | None) -> _Estimator:
    """Gains over random coalitions of the others, by the probability q of each of them.

    ``phi_i`` is the integral over q in [0, 1] of the mean gain, here the mean over midpoints.
    """
    asked: list[int] = []
    inside: list[list[bool]] = []
    for level in range(levels):
        q = (level + 0.5) / levels
        for _ in range(draws):
            members = (torch.rand(n, generator=generator) < q).tolist()
            inside.append(members)
            coalition = sum(1 << i for i in range(n) if members[i])
            asked += [coalition, *(coalition ^ 1 << i for i in range(n))]

    def combine(v: Tensor) -> tuple[Tensor, Tensor]:
        table = v.view(levels * draws, n + 1)
        changes = table[:, 1:] - table[:, :1]  # by the player's coming, or by its going
        gains = torch.where(torch.tensor(inside), -changes, changes)
        if draws == 1:  # between the levels, which is more than within them
            return gains.mean(0), _error_of_mean(gains)
        by_level = gains.view(levels, draws, n)
        errors = torch.stack([_error_of_mean(level) for level in by_level])
        return gains.mean(0), errors.square().sum(0).sqrt() / levels

    return _Estimator(asked, combine)


def _error_of_mean(samples: Tensor) -> Tensor:
    """``(n,)`` standard errors of the mean of ``(samples, n)``; NaN of a single one."""
    if len(samples) == 1:
        return torch.full_like(samples[0], math.nan)
    return samples.std(0) / math.sqrt(len(samples))
