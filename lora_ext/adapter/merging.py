"""Functions that merge several adapters into one, by summing their updates or their factors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lora_ext._checks import choice, integer, number, require
from lora_ext.kinds import Factors

from ._config import BaseModels, longer_than
from ._low_rank import able_to_learn, check_matrices, rounded, truncated, wide, widest
from ._peft_files import AdapterSource
from ._value import LoraAdapter, same_values

MergeMode = Literal["delta", "factors", "delta_svd", "ties", "dare"]
Space = Literal["factors", "delta"]
Parts = list[tuple[float, Factors]]  # weight and factors of each adapter that has the module

#: Share of an update's values that each mode keeps by default, as in its paper.
DENSITIES: dict[str, float] = {"ties": 0.2, "dare": 0.1}


@torch.no_grad()
def merge_adapters(
    adapters: Sequence[LoraAdapter | AdapterSource],
    weights: Sequence[float],
    mode: MergeMode = "delta",
    rank: int | None = None,
    progress: Callable[[list[str]], Iterable[str]] = iter,
    *,
    density: float | None = None,
    seed: int = 0,
) -> LoraAdapter:
    """Merge several adapters of the same base model into one; warn if the base models differ.

    Adapter i has the weight ``w_i`` and, for a module, the update ``s_i B_i A_i``.

    ============= ======================================= ======================================
    mode          merged update                           its rank
    ============= ======================================= ======================================
    "delta"       ``sum_i w_i s_i B_i A_i``, exactly:     the sum of the ranks
                  the rows of all A and the columns of
                  all B are concatenated
    "delta_svd"   the best approximation of that sum      ``rank``, or the largest of the ranks
    "factors"     ``s (sum_i w_i B_i) (sum_i w_i A_i)``;  the common rank
                  if the scales differ, each B_i is
                  multiplied by ``s_i``, and s = 1
    "ties"        the smaller values of each update are   as "delta_svd": the best approximation
                  set to 0; then the mean of the values   is returned
                  that have the sign of their sum
    "dare"        ``sum_i w_i m_i s_i B_i A_i / d`` with  as "delta_svd"
                  random masks ``m_i`` that keep a
                  share d of the values
    ============= ======================================= ======================================

    Sums are computed in float64 on the CPU and rounded once, to the widest dtype of the adapters.
    Except with "factors", an adapter may lack modules that others have. Biases are summed like the
    updates. If a row of A and the corresponding column of B are both 0, the row is drawn at random,
    so that training can change it.

    Args:
        adapters: adapters, as values, folders, or (config, state dict). They are not changed.
        weights: weight of each adapter. A single adapter of weight 1 is returned unchanged.
        mode: mode of merging, see the table.
        rank: rank of the merged modules, only with "delta_svd", "ties" and "dare".
        progress: function that wraps the list of module names, as ``tqdm`` does.
        density: share d of an update's values that is kept, above 0 and at most 1, only with "ties"
            (the largest values, default 0.2) and "dare" (random values, default 0.1), as in the
            papers.
        seed: seed for the masks of "dare".

    Returns:
        the merged adapter. It has the configuration of the first adapter, with the full names of
        the modules.

    Raises:
        ValueError: If there is no adapter; if the number of weights is wrong, or a weight is not
            finite; if the shapes of a module differ; if modules or ranks differ with "factors"; if
            values are not finite; if the adapters have different weights of the base model; or if
            activated adapters have different invocations or are merged with ordinary adapters.
        NotImplementedError: If an adapter scales outputs or inputs (a magnitude, IA3); if it
            replaces weights of the base model (``modules_to_save``, trained biases); or if it
            adapts grouped convolutions.

    Source: CopRA (arXiv 2410.22911), "factors" and "delta"; TIES-Merging (arXiv 2306.01708); DARE
    (arXiv 2311.03099). "ties" applies weights as PEFT's ``ties_svd`` does, and is the same method.
    """
    where = "merge_adapters"
    if isinstance(adapters, str | os.PathLike | Mapping):
        raise TypeError(f"{where}: adapters: expected a list of adapters, found {adapters!r:.200}")
    values = {f"adapters[{i}]": LoraAdapter.of(each) for i, each in enumerate(adapters)}
    require(values, where, "adapters", "at least one", "none")
    weights = list(weights)
    expected = f"one for each of {len(values)} adapters"
    require(len(weights) == len(values), where, "weights", expected, len(weights))
    choice(where, "mode", mode, get_args(MergeMode))
    weights = [float(number(where, f"weights[{i}]", w)) for i, w in enumerate(weights)]
    if rank is not None:
        fits = mode not in ("delta", "factors")
        require(fits, where, "rank", f"None with mode={mode!r}", repr(rank))
        rank = integer(where, "rank", rank, 1, expected="a positive integer")
    if density is None:
        density = DENSITIES.get(mode)
    else:
        require(mode in DENSITIES, where, "density", f"None with mode={mode!r}", repr(density))
        density = number(where, "density", density, above=0, maximum=1)
    seed = integer(where, "seed", seed, 0, expected=("an int", "at least 0"))
    _check_bases(where, values)
    return _merged(where, values, weights, mode, rank, progress, density, seed)


@torch.no_grad()
def interpolate_adapters(
    first: LoraAdapter | AdapterSource,
    second: LoraAdapter | AdapterSource,
    lam: float,
    space: Space = "factors",
) -> LoraAdapter:
    """Return the point ``(1 - lam) first + lam second`` on the line through two adapters.

    With "factors", ``B`` and ``A`` are interpolated separately, so the update contains the cross
    terms ``B_1 A_2`` and ``B_2 A_1``. With "delta", the update is interpolated. See
    :func:`merge_adapters`.

    Args:
        first, second: adapters, as values, folders, or (config, state dict). With "factors", they
            must have equal modules and ranks.
        lam: position on the line, any finite number. 0 returns ``first`` unchanged, and 1 returns
            ``second``.
        space: "factors" to interpolate A and B, "delta" to interpolate the update.

    Raises:
        ValueError: If an argument is invalid, or the adapters cannot be merged.
        NotImplementedError: If an adapter has parts that :func:`merge_adapters` does not support.

    Source: CopRA (arXiv 2410.22911), linear mode connectivity.
    """
    where = "interpolate_adapters"
    choice(where, "space", space, get_args(Space))
    lam = float(number(where, "lam", lam))
    values = {"first": LoraAdapter.of(first), "second": LoraAdapter.of(second)}
    _check_bases(where, values)
    if lam in (0.0, 1.0):
        _check_shapes(where, values, equal=space == "factors")
        return values["second" if lam else "first"]
    return _merged(where, values, [1 - lam, lam], space, None)


def _thinned(parts: Parts, mode: MergeMode, density: float, masks: torch.Generator) -> Tensor:
    """Return the merged update of a module, ``(O, I)`` float64, according to TIES or DARE."""
    updates = torch.stack([f.scaling * wide(f.b) @ wide(f.a) for _, f in parts])
    weights = torch.tensor([w for w, _ in parts], dtype=torch.float64)[:, None, None]
    if mode == "dare":
        # One float32 mask per adapter, drawn as in PEFT.
        kept = torch.full(updates.shape[1:], density)
        drawn = [torch.bernoulli(kept, generator=masks) for _ in parts]
        return (weights * updates * torch.stack(drawn)).sum(0) / density
    flat = updates.flatten(1)
    count = int(density * flat.shape[1])
    largest = flat.abs().topk(count, dim=1).indices
    trimmed = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest))
    trimmed = trimmed.view_as(updates)
    sign = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)  # "elected" sign of TIES
    agree = trimmed.sign() == sign
    return (weights * trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def _merged(
    where: str,
    adapters: Mapping[str, LoraAdapter],
    weights: list[float],
    mode: MergeMode,
    rank: int | None,
    progress: Callable[[list[str]], Iterable[str]] = iter,
    density: float | None = None,
    seed: int = 0,
) -> LoraAdapter:
    """Return the weighted sum of adapters. Unless ``density`` is None, only this share of each
    update's values is kept."""
    adapters = _sized(where, adapters)
    values = list(adapters.values())
    first = values[0]
    whole = all(f.a.shape[0] <= (rank or math.inf) for f in first.modules.values())
    if weights == [1.0] and whole and density is None and not first.parts:
        return first
    _check_shapes(where, adapters, equal=mode == "factors")
    _check_sums(where, adapters)
    names = list(dict.fromkeys(name for value in values for name in value.modules))
    dtype = widest(*(t for v in values for f in v.modules.values() for t in (f.a, f.b)))
    has_bias = any(f.bias is not None for v in values for f in v.modules.values())
    modules: dict[str, Factors] = {}
    generator, masks = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    for name in progress(names):
        parts = [
            (w, value.modules[name])
            for w, value in zip(weights, values, strict=True)
            if name in value.modules
        ]
        a, b, bias, scaling = _summed(parts, stacked=mode != "factors")
        if density is not None:
            a, scaling = _thinned(parts, mode, density, masks), 1.0
            b = torch.eye(len(b), dtype=torch.float64)
            bias = _bias([w * f.scaling for w, f in parts], parts)
        if density is not None or mode == "delta_svd":
            kept = rank or max(f.a.shape[0] for _, f in parts)
            a, b, _ = truncated(a, b, kept, dtype)
        like = parts[0][1]
        a = rounded(a, like.a, dtype, f"{where}: {name}: a")
        b = rounded(b, like.b, dtype, f"{where}: {name}: b")
        modules[name] = Factors(
            able_to_learn(a, b, generator).unflatten(1, like.a.shape[1:]),
            b.reshape(*b.shape, *like.b.shape[2:]),
            scaling,
            rounded(bias, like.b, dtype, f"{where}: {name}: bias") if has_bias else None,
            embedding=like.embedding,
        )
    changes: dict[str, Any] = {}
    excluded = {value.config.exclude_modules for value in values}
    if excluded != {first.config.exclude_modules}:  # An adapter may exclude what another adapts.
        changes["exclude_modules"] = longer_than(modules)
    return first.with_modules(
        modules,
        base_weights={key: t for value in values for key, t in value.base_weights.items()},
        use_rslora=all(value.config.use_rslora for value in values),
        lora_bias=has_bias,
        fan_in_fan_out=any(value.config.fan_in_fan_out for value in values),
        **changes,
    )


def _sized(where: str, adapters: Mapping[str, LoraAdapter]) -> dict[str, LoraAdapter]:
    """Return adapters with all factors; module sizes that one lacks are taken from the others."""
    sizes: dict[str, tuple[int, int]] = {}
    for label, value in adapters.items():
        value.refuse_scales(f"{where}: {label}")
        for name, f in value.modules.items() if value.complete else ():
            sizes[name] = f.a.shape[1], f.b.shape[0]
    return {label: value.with_sizes(sizes) for label, value in adapters.items()}


def _summed(parts: Parts, stacked: bool) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return A, B, the bias and the scale of the sum. The scale is the common scale of all parts,
    or 1 if their scales differ."""
    scaling = parts[0][1].scaling
    factors = [w for w, _ in parts]  # number by which each B is multiplied
    if any(f.scaling != scaling for _, f in parts):
        factors, scaling = [w * f.scaling for w, f in parts], 1.0
    b = [c * wide(f.b) for c, (_, f) in zip(factors, parts, strict=True)]
    bias = _bias(factors, parts)
    if stacked:
        return torch.cat([wide(f.a) for _, f in parts]), torch.cat(b, 1), bias, scaling
    a = [w * wide(f.a) for w, f in parts]
    return torch.stack(a).sum(0), torch.stack(b).sum(0), bias, scaling


def _bias(factors: list[float], parts: Parts) -> Tensor:
    total = torch.zeros(parts[0][1].b.shape[0], dtype=torch.float64)
    for factor, (_, module) in zip(factors, parts, strict=True):
        if module.bias is not None:
            total += factor * module.bias.detach().to("cpu", torch.float64)
    return total


def _check_bases(where: str, adapters: Mapping[str, LoraAdapter]) -> None:
    """Warn if the base models differ; raise if the adapters have different invocation tokens."""
    bases = BaseModels()
    (first, value), *_ = adapters.items()
    expected = f"{list(value.config.invocation)!r:.200}, as {first} has"
    for label, adapter in adapters.items():
        # ``stacklevel=4`` points at the caller of the public function, which torch.no_grad wraps.
        bases.meet(f"{where}: {label}", adapter.config.base_model, stacklevel=4)
        found, field = adapter.config.invocation, f"{label}: alora_invocation_tokens"
        require(found == value.config.invocation, where, field, expected, list(found))


def _check_shapes(where: str, adapters: Mapping[str, LoraAdapter], equal: bool) -> None:
    """Raise unless modules with the same name have the same shape. With ``equal``, they must also
    have the same rank, and all adapters must have the same modules."""
    (first, reference), *others = adapters.items()
    seen = {name: (first, factors) for name, factors in reference.modules.items()}
    for label, adapter in others:
        at = f"{where}: {label}"
        names = (*reference.modules, *adapter.modules)
        alone = [n for n in names if n not in reference.modules or n not in adapter.modules]
        if equal and alone:
            owner = first if alone[0] in reference.modules else label
            found = f"{alone[0]} only in {owner}"
            raise ValueError(f"{at}: expected the modules of {first}, found {found}")
        for name, factors in adapter.modules.items():
            origin, other = seen.setdefault(name, (label, factors))
            size = _size(factors)
            known = _size(other)
            require(size == known, at, name, f"{known} as in {origin}", size)
            rank, known = factors.a.shape[0], other.a.shape[0]
            fits = rank == known or not equal
            found = f"{rank} ('delta' can sum updates of different ranks)"
            require(fits, f"{at}: {name}", "rank", f"{known} as in {origin}", found)


def _size(factors: Factors) -> str:
    kind = "an embedding" if factors.embedding else "a layer"
    return f"{kind} with inputs {tuple(factors.a.shape[1:])} and {factors.b.shape[0]} outputs"


def _check_sums(where: str, adapters: Mapping[str, LoraAdapter]) -> None:
    """Raise for parts that cannot be summed: scales, replaced weights of the base model, and
    values that are not finite."""
    base: dict[str, tuple[str, Tensor]] = {}
    modules = (item for v in adapters.values() for item in v.modules.items())
    biased = next((name for name, f in modules if f.bias is not None), None)
    for label, adapter in adapters.items():
        at = f"{where}: {label}"
        for key in adapter.replacements:
            expected = "only factors, since other weights cannot be summed"
            found = "a weight that replaces the base model's (modules_to_save, a trained bias)"
            raise NotImplementedError(f"{at}: {key}: expected {expected}, found {found}")
        for name, factors in adapter.modules.items():
            kind = adapter.config.kind
            found = f"{kind.rescales}; merge this adapter into the base weight first"
            require(factors.sums, at, name, f"no {kind.title}", found, NotImplementedError)
            check_matrices(factors, f"{at}: {name}")
            fits = biased is None or not factors.embedding
            expected = "no lora_bias together with an adapted embedding, as in PEFT"
            require(fits, at, name, expected, f"one in {biased}", NotImplementedError)
        for key, weight in adapter.base_weights.items():
            other, known = base.setdefault(key, (label, weight))
            expected = f"the base model's weight as in {other}"
            require(same_values(known, weight), at, key, expected, "different values")
