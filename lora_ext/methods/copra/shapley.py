"""Shapley values of the players of a game, for example the layers of a model."""

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

_MAX_EXACT_PLAYERS = 20  # 2^20 is about a million coalitions
# Largest number of groups for which "exact" is the default method, since each coalition costs a
# forward of the model.
_MAX_EXACT_GROUPS = 12
_ORDERS, _DRAWS, _LEVELS = 32, 4, 16  # defaults of orders, draws per level, and levels
# Largest number of tokens per forward on the CPU, enough to amortise reading the weights. Larger
# forwards spend more time on the allocation of activations: it took 1/4 of the time of one forward
# of SmolLM2 on 4096 tokens, and 1/20 of the time of 16 forwards on 256 tokens each.
_MAX_CPU_TOKENS = 1024

#: Function that returns the values of coalitions. Bit i of a coalition is set if it has player i.
Values = Callable[[Sequence[int]], list[float]]


class Shapley(NamedTuple):
    """Shapley value of each player, with its standard error.

    With the methods "exact" and "permutation", the values sum to v(all players) - v(no players), up
    to rounding.
    """

    values: Tensor  # (n,) float64
    standard_error: Tensor  # (n,) float64; 0 if exact, NaN for a single sample
    evaluations: int  # number of evaluated coalitions


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
    """Compute the Shapley values of a game of n players.

    ``phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S))``.

    Args:
        value_fn: v, function from a coalition to a finite number. The coalition is a bool tensor
            ``(n,)``, True for each player in it.
        n: Number of players.
        method: Algorithm. "exact" evaluates all 2^n coalitions. "permutation" adds the players one
            by one in random orders, and evaluates n + 1 coalitions per order. "owen" divides [0, 1]
            into ``levels`` intervals. At each midpoint q, it draws coalitions that include each
            player with probability q. For each draw it evaluates n + 1 coalitions: the drawn
            coalition, and for each player the same coalition with this player added or removed. The
            error of the midpoint rule is of the order of 1 / levels^2.
        samples: Number of orders of "permutation" (default 32), or of coalitions drawn per level of
            "owen" (default 4).
        generator: Random generator of the samples; default is torch's global one for the CPU.
        cache: Whether to evaluate each coalition only once. Use False for a noisy v.
        antithetic: Whether "permutation" also uses the reverse of each order, which doubles the
            number of orders.
        levels: Number of levels of "owen".

    Raises:
        ValueError: If n, samples or levels is below 1, the method is unknown, "exact" is used with
            more than 20 players, or a value is not finite.

    Source: Shapley 1953; Castro et al. 2009 for "permutation"; Owen 1972, Okhrati and Lipani 2021
    for "owen"; arXiv 2410.22911 for layers as players.
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
    """Compute the Shapley value of each group of layers for a utility, such as the accuracy.

    The model runs in evaluation mode and without gradients. Its modes and the masks are restored
    afterwards.

    Args:
        model: Model of the controller.
        controller: Controller whose groups of layers are the players.
        eval_fn: Function that returns the utility. ``eval_fn(model)`` returns a number such as the
            accuracy or the negative loss. With a batch, ``eval_fn(output, batch)`` returns a tensor
            ``(rows,)`` with the utility of each row of the model's output; v(S) is their mean.
        method: Algorithm, see :func:`shapley_values`; default is "exact" for at most 12 groups,
            otherwise "permutation".
        samples, generator, cache, antithetic, levels: As in :func:`shapley_values`.
        batch: Keyword arguments of the model. Tensors with the same number of rows as the first
            tensor are repeated for each coalition; all other values are passed unchanged.
        batched_coalitions: K, number of coalitions in one forward, each on a copy of the batch. The
            weights are read only once per forward. On the CPU, where larger forwards are not
            faster, a forward has at most 1024 tokens unless one copy of the batch has more.

    Raises:
        ValueError: If the controller's layers are not in ``model``; if ``batched_coalitions`` is
            below 1, or above 1 without a batch; if the batch has no tensors; if ``eval_fn`` does
            not return one number per row of the batch; or if :func:`shapley_values` raises it.

    Warns:
        UserWarning: If a layer cannot be switched row by row; coalitions are then evaluated one by
            one.
    """
    n, modules = len(controller.layers), set(model.modules())
    where = "layer_shapley"
    other = f"a {type(model).__name__} without the controller's layers"
    fits = modules.issuperset(chain(*controller.layers.layers))
    require(fits, where, "model", "the model of the controller", other)
    if method is None:
        method = "exact" if n <= _MAX_EXACT_GROUPS else "permutation"
    estimator = _estimator(n, method, samples, generator, antithetic, levels)
    count = batched_coalitions
    fits = count == 1 or (count > 1 and batch is not None)
    require(fits, where, "batched_coalitions", "1, or more with a batch", count)

    values = _Utilities(model, controller, eval_fn, batch)
    at_once = 1 if batch is None else _coalitions_at_once(values.first, count)
    with evaluating(model), torch.no_grad():
        return _run(estimator, n, values, cache, at_once)


def _coalitions_at_once(inputs: Tensor, most: int) -> int:
    """Return the number of copies of a batch to run in one forward, at most ``most``.

    On the CPU, the copies have at most 1024 tokens in total, unless a single copy has more.
    ``inputs`` are token ids ``(rows, ...)``, or features with one more dimension.
    """
    if inputs.device.type != "cpu":
        return most
    tokens = inputs.shape[:-1].numel() if inputs.is_floating_point() else inputs.numel()
    return min(most, max(1, _MAX_CPU_TOKENS // max(1, tokens)))


@dataclass(eq=False)
class _Utilities:
    """Function that returns the values of coalitions. With a batch, all coalitions of one call are
    evaluated in one forward."""

    model: nn.Module
    controller: CopraController
    eval_fn: Callable[..., Any]
    batch: dict[str, Any] | None
    row_by_row: bool = True  # set to False when a layer raises RowwiseError

    def __post_init__(self) -> None:
        batch = {"": torch.empty(0)} if self.batch is None else self.batch
        tensors = [v for v in batch.values() if isinstance(v, Tensor) and v.dim()]
        require(tensors, "layer_shapley", "batch", "a tensor with a batch dimension", sorted(batch))
        self.first, self.rows = tensors[0], len(tensors[0])

    def __call__(self, queried: Sequence[int]) -> list[float]:
        masks = [_mask(coalition, len(self.controller.layers)) for coalition in queried]
        if len(masks) > 1 and self.row_by_row:
            try:
                with coalitions(self.controller.layers, torch.stack(masks), self.rows):
                    return self._utilities(len(masks))
            except RowwiseError as error:
                self.row_by_row = False
                message = f"layer_shapley: {error}; coalitions are evaluated one by one"
                warnings.warn(message, stacklevel=6)
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
        expected = f"the utilities of the rows, of shape {(times * self.rows,)}"
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
    expected = f"at most {_MAX_EXACT_PLAYERS} players for method 'exact'"
    require(
        n <= _MAX_EXACT_PLAYERS, where, "n", expected, f"{n}; use 'permutation' or 'owen' instead"
    )
    return _exact(n)


def _run(estimator: _Estimator, n: int, values: Values, cache: bool, at_once: int) -> Shapley:
    queried = list(dict.fromkeys(estimator.coalitions)) if cache else list(estimator.coalitions)
    found: list[float] = []
    for start in range(0, len(queried), at_once):
        part = queried[start : start + at_once]
        for coalition, value in zip(part, values(part), strict=True):
            if not math.isfinite(value):
                players = _mask(coalition, n).nonzero().flatten().tolist()
                other = f"{value} for the coalition {players} of {n} players"
                raise ValueError(
                    f"shapley_values: value_fn: expected a finite number, found {other}"
                )
            found.append(value)
    if cache:
        known = dict(zip(queried, found, strict=True))
        found = [known[coalition] for coalition in estimator.coalitions]
    phi, error = estimator.combine(torch.tensor(found, dtype=torch.float64))
    return Shapley(phi, error, len(queried))


def _mask(coalition: int, n: int) -> Tensor:
    return torch.tensor([coalition >> i & 1 for i in range(n)], dtype=torch.bool)


# -------------------------------------------------------------------------------------------------
# Estimators


class _Estimator(NamedTuple):
    """Coalitions to evaluate, and the function that combines their values into Shapley values
    ``(n,)`` and standard errors ``(n,)``.

    All coalitions are listed before the first is evaluated, so that one forward can evaluate
    several of them.
    """

    coalitions: list[int]  # may contain duplicates
    combine: Callable[[Tensor], tuple[Tensor, Tensor]]  # argument: float64 values of `coalitions`


def _exact(n: int) -> _Estimator:
    """Return the estimator that evaluates the definition with all ``2^n`` coalitions; the standard
    error is 0."""

    def combine(v: Tensor) -> tuple[Tensor, Tensor]:
        number = torch.arange(2**n)
        sizes = sum((number >> i & 1 for i in range(n)), torch.zeros_like(number))
        # weight |S|! (n - |S| - 1)! / n! of a coalition S of the other players
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
    """Return the estimator that averages the gains of v when players join in random orders.

    A sample is one order, or with ``antithetic`` one order and its reverse.
    """
    drawn: list[list[int]] = []
    for _ in range(orders):
        order = torch.randperm(n, generator=generator).tolist()
        drawn += [order, order[::-1]] if antithetic else [order]
    # Each order has n + 1 coalitions: its first k players, for k from 0 to n.
    queried = [c for order in drawn for c in accumulate((1 << i for i in order), initial=0)]

    def combine(v: Tensor) -> tuple[Tensor, Tensor]:
        gains = v.view(len(drawn), n + 1).diff(dim=1)  # [i, k]: gain of the k-th player of order i
        by_player = torch.empty_like(gains).scatter_(1, torch.tensor(drawn), gains)
        samples = by_player.view(orders, -1, n).mean(1)
        return samples.mean(0), _error_of_mean(samples)

    return _Estimator(queried, combine)


def _owen(n: int, draws: int, levels: int, generator: torch.Generator | None) -> _Estimator:
    """Return the estimator that averages the gains of v over random coalitions, which include each
    player with probability q.

    ``phi_i`` is the integral of the mean gain over q in [0, 1], approximated by the mean over
    midpoints.
    """
    queried: list[int] = []
    inside: list[list[bool]] = []
    for level in range(levels):
        q = (level + 0.5) / levels
        for _ in range(draws):
            members = (torch.rand(n, generator=generator) < q).tolist()
            inside.append(members)
            coalition = sum(1 << i for i in range(n) if members[i])
            queried += [coalition, *(coalition ^ 1 << i for i in range(n))]

    def combine(v: Tensor) -> tuple[Tensor, Tensor]:
        table = v.view(levels * draws, n + 1)
        changes = table[:, 1:] - table[:, :1]  # changes of v if one player joins or leaves
        gains = torch.where(torch.tensor(inside), -changes, changes)
        if draws == 1:  # This overestimates the error, since levels also differ in q.
            return gains.mean(0), _error_of_mean(gains)
        by_level = gains.view(levels, draws, n)
        errors = torch.stack([_error_of_mean(level) for level in by_level])
        return gains.mean(0), errors.square().sum(0).sqrt() / levels

    return _Estimator(queried, combine)


def _error_of_mean(samples: Tensor) -> Tensor:
    """Return the standard errors ``(n,)`` of the mean of samples ``(samples, n)``; NaN for a single
    sample."""
    if len(samples) == 1:
        return torch.full_like(samples[0], math.nan)
    return samples.std(0) / math.sqrt(len(samples))
