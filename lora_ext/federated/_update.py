"""One reply of a client, and what of it is fit to be averaged."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lora_ext._checks import require

from ._plan import Client, LayerPlan, Pair

Upload = Literal["delta", "value"]
NanPolicy = Literal["drop_client", "drop_tensor", "raise"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_EXAMPLES = 2**53


@dataclass(frozen=True, eq=False)
class Update:
    """One reply, decoded. Nothing of it is trusted until :func:`aggregate` has looked at it.

    Attributes:
        client: a number or a name that is the client's alone.
        num_examples: how many examples it trained on, its weight in the mean.
        tensors: the planned layers under the names of the global state, A ``(r, I)`` and B
            ``(O, r)``: differences from the global values, or the new values.
        plan: what the server asked of it.
        loss: its training loss, which nothing here needs.
        failed: it says itself that it could not train.
    """

    client: Client
    num_examples: Any
    tensors: Mapping[str, Tensor]
    plan: LayerPlan
    loss: float = math.nan
    failed: bool = False


@dataclass(frozen=True)
class Rules:
    """What a reply is held against: the global state, and the settings of the round."""

    state: Mapping[str, Tensor]
    pairs: Sequence[Pair]
    shared: tuple[str, ...]
    upload: Upload
    weighted_by: str | None
    nan_policy: NanPolicy
    max_update_norm: float | None
    partial_ok: bool

    @functools.cached_property
    def axes(self) -> dict[str, int]:
        """Where each factor has its ranks: A in its rows, B in its columns."""
        return {key: axis for p in self.pairs for axis, key in enumerate((p.a, p.b))}

    @functools.cached_property
    def layers(self) -> dict[str, int]:
        """The layer of each factor."""
        return {key: p.layer for p in self.pairs for key in (p.a, p.b)}

    def head(self, key: str, rank: int) -> Tensor:
        """The part of a global tensor that a factor of a smaller rank covers, in float64."""
        value = self.state[key].detach().to("cpu", torch.float64)
        return value if key not in self.axes else value.narrow(self.axes[key], 0, rank)

    def rank(self, key: str, value: Tensor) -> int:
        """The rank of a factor; 0 of what is none."""
        return value.shape[self.axes[key]] if key in self.axes else 0


@dataclass(frozen=True)
class Reply:
    """A reply that was accepted."""

    client: Client
    weight: float
    tensors: Mapping[str, Tensor]
    factor: float  # by which its update is scaled down

    def value(self, key: str, rules: Rules) -> Tensor:
        """The client's own value of a tensor, in float64 on the CPU."""
        sent = self.tensors[key].detach().to("cpu", torch.float64)
        if rules.upload == "value" and self.factor == 1:
            return sent
        start = rules.head(key, rules.rank(key, sent))
        change = sent - start if rules.upload == "value" else sent
        return start + self.factor * change


class Rejected(ValueError):
    """Why a reply is not fit to be averaged."""


def accept(
    updates: Iterable[Update], rules: Rules
) -> tuple[list[Reply], dict[Client, str], dict[Client, float]]:
    """Sort replies into those that count, in the order of the clients, and the reasons of the rest;
    and tell by client the factor of an update that was too long. A value that is not finite is a
    ValueError with ``nan_policy="raise"``, and what is no :class:`Update` a TypeError."""
    by_client: dict[Client, list[Update]] = {}
    for update in updates:
        found, known = type(update).__name__, isinstance(update, Update)
        require(known, "aggregate", "updates", "Update values", found, TypeError)
        by_client.setdefault(update.client, []).append(update)
    replies: list[Reply] = []
    reasons: dict[Client, str] = {}
    # Numbers before names, which do not compare with them.
    for client in sorted(by_client, key=lambda client: (isinstance(client, str), client)):
        first, *others = by_client[client]
        try:
            for other in others:
                _need(same(first, other), "reply", "one, or equal ones", "two that differ")
            replies.append(_accepted(first, rules))
        except Rejected as error:
            reasons[client] = f"client {client}: {error}"
            if isinstance(error, _NotFinite) and rules.nan_policy == "raise":
                raise ValueError(f"aggregate: {reasons[client]}") from None
    return replies, reasons, {r.client: r.factor for r in replies if r.factor != 1}


class _NotFinite(Rejected):
    """A value that is NaN or infinite."""


def _need(holds: bool, name: str, expected: object, found: object) -> None:
    if not holds:
        raise Rejected(f"{name:.200}: expected {expected}, found {found!s:.200}")


def _accepted(update: Update, rules: Rules) -> Reply:
    _need(not update.failed, "reply", "a trained update", "one that says it failed")
    plan: Any = update.plan
    _need(isinstance(plan, LayerPlan), "plan", "a LayerPlan", type(plan).__name__)
    known = sorted(set(rules.layers.values()))
    for layer in plan.layers:
        _need(layer in known, "plan.layers", f"layers of {known}", layer)
    weight = weight_of(update.num_examples)
    tensors = _checked(update.tensors, plan, rules)
    for pair in rules.pairs:
        present = [key for key in (pair.a, pair.b) if key in tensors]
        for key in (pair.a, pair.b):
            if present and key not in present:
                _need(False, key, f"it beside {present[0]}", "none")
            if pair.layer in plan.layers and not rules.partial_ok:
                _need(key in present, key, "a tensor of the plan", "none")
    for key in rules.shared:
        _need(key in tensors or rules.partial_ok, key, "a tensor of every client", "none")
    tensors = _finite(tensors, rules)
    _need(bool(tensors), "tensors", "at least one that can be averaged", "none")
    factor = _clip_factor(tensors, rules)
    reply = Reply(update.client, weight if rules.weighted_by is not None else 1.0, tensors, factor)
    for key in tensors:
        dtype = rules.state[key].dtype
        holds = bool(reply.value(key, rules).to(dtype).isfinite().all())
        _need(holds, key, f"values that {dtype} can hold", "larger ones")
    return reply


def weight_of(examples: Any) -> float:
    """The number of examples of a reply as its weight; :class:`Rejected` where it is none."""
    expected = f"a number above 0, up to {_MOST_EXAMPLES}"
    real = isinstance(examples, numbers.Real) and not isinstance(examples, bool | np.bool_)
    _need(real, "num-examples", expected, type(examples).__name__)
    found = float(min(max(examples, -1e300), 1e300))  # an integer may be too large for a float
    _need(0 < found <= _MOST_EXAMPLES, "num-examples", expected, found)
    return found


def _checked(tensors: Any, plan: LayerPlan, rules: Rules) -> dict[str, Tensor]:
    """The tensors of a reply in the order of the global state, none of them read yet."""
    _need(isinstance(tensors, Mapping), "tensors", "a mapping", type(tensors).__name__)
    for key, value in tensors.items():
        known = isinstance(key, str) and (key in rules.layers or key in rules.shared)
        _need(known, str(key), "a name of the global state's", "none that it has")
        if key in rules.layers:
            planned = rules.layers[key] in plan.layers
            _need(planned, key, f"one of layers {plan.layers}", f"layer {rules.layers[key]}")
        _need(isinstance(value, Tensor), key, "a tensor", type(value).__name__)
        found = "a nested one" if value.is_nested else value.layout
        dense = value.layout == torch.strided and not (value.is_meta or value.is_nested)
        _need(dense, key, "a dense tensor", "one on meta" if value.is_meta else found)
        _need(value.dtype in _DTYPES, key, f"one of {_DTYPES}", value.dtype)
        shape = list(rules.state[key].shape)
        if key in rules.axes:
            full = shape[rules.axes[key]]
            rank = plan.rank_of(rules.layers[key], full)
            _need(rank <= full, f"{key}: plan.ranks", f"at most {full}", rank)
            shape[rules.axes[key]] = rank
        _need(list(value.shape) == shape, key, f"shape {shape}", f"shape {list(value.shape)}")
    return {key: tensors[key] for key in rules.state if key in tensors}


def _finite(tensors: dict[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    bad = {key: int((~value.isfinite()).sum()) for key, value in tensors.items()}
    for key, count in bad.items():
        if count and rules.nan_policy != "drop_tensor":
            raise _NotFinite(f"{key}: expected finite values, found {count} that are not")
    return {key: value for key, value in tensors.items() if not bad[key]}


def _clip_factor(tensors: dict[str, Tensor], rules: Rules) -> float:
    """1, or what brings the norm of the whole update down to the bound."""
    if rules.max_update_norm is None:
        return 1.0
    changes: list[np.ndarray] = []
    for key, value in tensors.items():
        change = value.detach().to("cpu", torch.float64)
        if rules.upload == "value":
            change = change - rules.head(key, rules.rank(key, value))
        changes.append(change.contiguous().numpy().ravel())
    largest = max(float(np.abs(c).max(initial=0.0)) for c in changes)
    _need(math.isfinite(largest), "norm", "a finite number", largest)
    if largest == 0:
        return 1.0
    # numpy sums on one thread: the same bits on every machine of one kind. Divided by the largest,
    # no square overflows.
    norm = largest * math.sqrt(sum(float(np.square(c / largest).sum()) for c in changes))
    return min(1.0, rules.max_update_norm / norm)


def same(first: Update, second: Update) -> bool:
    """Whether two replies of one client say the same, bit for bit."""
    if (first.plan, first.failed) != (second.plan, second.failed):
        return False
    if _spelled(first.num_examples, first.loss) != _spelled(second.num_examples, second.loss):
        return False
    ours, theirs = first.tensors, second.tensors
    if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
        return False
    return ours.keys() == theirs.keys() and all(_equal(ours[k], theirs[k]) for k in ours)


def _spelled(*values: Any) -> list[str]:
    """What values say; Python spells no integer of over 4300 digits in tens."""
    return [hex(value) if type(value) is int else repr(value) for value in values]


def _equal(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    if any(t.layout != torch.strided or t.is_meta or t.is_nested for t in (first, second)):
        return False
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if not first.numel():
        return True
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (first, second)]
    return torch.equal(*bits)  # a NaN equals itself
