"""Replies of clients, and the checks that a reply must pass before it is averaged.

Shape letters: r rank, I inputs and O outputs of a module.
"""

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

from lora_ext._checks import check_fields, choice, require, within

from ._plan import PATTERN, Client, LayerPlan, Pair

RankAgg = Literal["covered", "zero_pad", "fro", "svd", "stack"]
Upload = Literal["delta", "value"]
NanPolicy = Literal["drop_client", "drop_tensor", "raise"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_EXAMPLES = 2**53


@dataclass(frozen=True, eq=False)
class Update:
    """Decoded reply of a client, untrusted until :func:`aggregate` has checked it.

    Attributes:
        client: unique number or name of the client.
        num_examples: number of training examples, which is the client's weight in the mean.
        tensors: factors of the planned layers, A ``(r, I)`` and B ``(O, r)``, under the names of
            the global state. The values are differences from the global values, or new values.
        plan: the plan that the server sent.
        loss: training loss; not used by :func:`aggregate`.
        failed: whether the client reports that it could not train.
    """

    client: Client
    num_examples: Any
    tensors: Mapping[str, Tensor]
    plan: LayerPlan
    loss: float = math.nan
    failed: bool = False


@dataclass(frozen=True)
class Settings:
    """Checked keyword arguments of :func:`aggregate`."""

    rank_agg: RankAgg = "covered"
    upload: Upload = "delta"
    weighted_by: Literal["num-examples"] | None = "num-examples"
    server_lr: float = 1.0
    scaling: Any = 1.0
    nan_policy: NanPolicy = "drop_client"
    max_update_norm: float | None = None
    min_replies: int = 1
    partial_ok: Any = False
    pattern: str = PATTERN
    shared: Sequence[str] = ()

    def __post_init__(self) -> None:
        above = within(above=0, expected="a finite number above 0")
        weights = ("num-examples", None)
        table = {
            "weighted_by": functools.partial(choice, choices=weights),
            "server_lr": above,
            "max_update_norm": above,
            "min_replies": within(1),
        }
        check_fields(self, table, "aggregate")


@dataclass(frozen=True)
class Rules:
    """The global state and the settings that replies must fit."""

    state: Mapping[str, Tensor]
    pairs: Sequence[Pair]
    settings: Settings

    @functools.cached_property
    def axes(self) -> dict[str, int]:
        """Dimension of the rank in each factor, by the factor's name: 0 for A, 1 for B."""
        return {key: axis for p in self.pairs for axis, key in enumerate((p.a, p.b))}

    @functools.cached_property
    def layers(self) -> dict[str, int]:
        """Index of each factor's layer, by the factor's name."""
        return {key: p.layer for p in self.pairs for key in (p.a, p.b)}

    def head(self, key: str, rank: int) -> Tensor:
        """Return the first ``rank`` ranks of a global factor, in float64. A tensor that is not a
        factor is returned whole."""
        value = self.state[key].detach().to("cpu", torch.float64)
        return value if key not in self.axes else value.narrow(self.axes[key], 0, rank)

    def rank(self, key: str, value: Tensor) -> int:
        """Return the rank of a factor, or 0 for a tensor that is not a factor."""
        return value.shape[self.axes[key]] if key in self.axes else 0


@dataclass(frozen=True)
class Reply:
    """An accepted reply."""

    client: Client
    weight: float
    tensors: Mapping[str, Tensor]
    factor: float  # factor, at most 1, that limits the norm of the update

    def value(self, key: str, rules: Rules) -> Tensor:
        """Return the client's new value of a tensor, in float64 on the CPU."""
        sent = self.tensors[key].detach().to("cpu", torch.float64)
        is_value = rules.settings.upload == "value"
        if is_value and self.factor == 1:
            return sent
        start = rules.head(key, rules.rank(key, sent))
        change = sent - start if is_value else sent
        return start + self.factor * change


class Rejected(ValueError):
    """Raised for a reply that cannot be averaged; the message contains the reason."""


class _EndsRound(Rejected):
    """Raised for a value that is not finite if ``nan_policy="raise"``."""


def need(holds: bool, name: str, expected: object, found: object) -> None:
    """Raise :class:`Rejected` unless ``holds``."""
    if not holds:
        raise Rejected(f"{name:.200}: expected {expected}, found {found!s:.200}")


def once(updates: Iterable[Update]) -> tuple[list[Update], dict[Client, str]]:
    """Return one reply per client, sorted by client, and the reasons of rejections by client.

    If a client sent several replies, the replies must be bitwise equal, and count once.

    Raises:
        TypeError: If an element of ``updates`` is not an :class:`Update`.
    """
    by_client: dict[Client, list[Update]] = {}
    for update in updates:
        kind = type(update).__name__
        known = isinstance(update, Update)
        require(known, "aggregate", "updates", "Update values", kind, TypeError)
        by_client.setdefault(update.client, []).append(update)
    replies: list[Update] = []
    reasons: dict[Client, str] = {}
    # Integers are sorted before strings, since Python cannot compare the two types.
    for client in sorted(by_client, key=lambda client: (isinstance(client, str), client)):
        first, *others = by_client[client]
        if all(_same(first, other) for other in others):
            replies.append(first)
        else:
            expected = "one reply, or equal replies"
            reasons[client] = f"client {client}: reply: expected {expected}, found two that differ"
    return replies, reasons


def accept(updates: Iterable[Update], rules: Rules) -> tuple[list[Reply], dict[Client, str]]:
    """Check the replies of a round.

    Returns:
        the accepted replies, sorted by client, and the reason of each rejection by client.

    Raises:
        ValueError: If a value is not finite and ``nan_policy="raise"``.
        TypeError: If an element of ``updates`` is not an :class:`Update`.
    """
    replies: list[Reply] = []
    found, reasons = once(updates)
    for update in found:
        try:
            replies.append(_checked(update, rules))
        except Rejected as error:
            reasons[update.client] = f"client {update.client}: {error}"
            if isinstance(error, _EndsRound):
                raise ValueError(f"aggregate: {reasons[update.client]}") from None
    return replies, reasons


def _checked(update: Update, rules: Rules) -> Reply:
    """Return a reply that can be averaged; raise :class:`Rejected` if it cannot."""
    need(not update.failed, "reply", "a trained update", "a failed update")
    plan: Any = update.plan
    need(isinstance(plan, LayerPlan), "plan", "a LayerPlan", type(plan).__name__)
    known = sorted(set(rules.layers.values()))
    for layer in plan.layers:
        need(layer in known, "plan.layers", f"layers among {known}", layer)
    partial_ok = rules.settings.partial_ok
    weight = weight_of(update.num_examples)
    tensors = _named(update.tensors, plan, rules)
    for pair in rules.pairs:
        present = [key for key in (pair.a, pair.b) if key in tensors]
        for key in (pair.a, pair.b):
            if present and key not in present:
                need(False, key, f"a tensor, since the reply has {present[0]}", "none")
            if pair.layer in plan.layers and not partial_ok:
                need(key in present, key, "a tensor of the plan", "none")
    for key in rules.settings.shared:
        need(key in tensors or partial_ok, key, "a tensor from every client", "none")
    tensors = _finite(tensors, rules)
    need(bool(tensors), "tensors", "at least one tensor that can be averaged", "none")
    factor = _clip_factor(tensors, rules)
    weight = 1.0 if rules.settings.weighted_by is None else weight
    reply = Reply(update.client, weight, tensors, factor)
    for key in tensors:
        dtype, value = rules.state[key].dtype, reply.value(key, rules)
        if not bool(value.to(dtype).isfinite().all()):
            found = f"{value.abs().max().item():.3g}"
            raise Rejected(f"{key:.200}: expected values that {dtype} can hold, found {found}")
    return reply


def weight_of(examples: Any) -> float:
    """Return a reply's number of examples as a float; raise :class:`Rejected` if it is invalid."""
    expected = f"a number above 0, up to {_MAX_EXAMPLES}"
    real = isinstance(examples, numbers.Real) and not isinstance(examples, bool | np.bool_)
    need(real, "num-examples", expected, type(examples).__name__)
    found = float(min(max(examples, -1e300), 1e300))  # avoids overflow of a large integer
    need(0 < found <= _MAX_EXAMPLES, "num-examples", expected, found)
    return found


def _named(tensors: Any, plan: LayerPlan, rules: Rules) -> dict[str, Tensor]:
    """Check names, dtypes and shapes of a reply's tensors, without reading values, and return the
    tensors in the order of the global state."""
    need(isinstance(tensors, Mapping), "tensors", "a mapping", type(tensors).__name__)
    for key, value in tensors.items():
        known = isinstance(key, str) and (key in rules.layers or key in rules.settings.shared)
        need(known, str(key), "a name of the global state", "another name")
        if key in rules.layers:
            planned = rules.layers[key] in plan.layers
            need(planned, key, f"one of layers {plan.layers}", f"layer {rules.layers[key]}")
        need(isinstance(value, Tensor), key, "a tensor", type(value).__name__)
        found = "a nested tensor" if value.is_nested else value.layout
        dense = value.layout == torch.strided and not (value.is_meta or value.is_nested)
        need(dense, key, "a dense tensor", "a meta tensor" if value.is_meta else found)
        need(value.dtype in _DTYPES, key, f"one of {_DTYPES}", value.dtype)
        shape = list(rules.state[key].shape)
        if key in rules.axes:
            full = shape[rules.axes[key]]
            rank = plan.rank_of(rules.layers[key], full)
            need(rank <= full, f"{key}: plan.ranks", f"at most {full}", rank)
            shape[rules.axes[key]] = rank
        need(list(value.shape) == shape, key, f"shape {shape}", f"shape {list(value.shape)}")
    return {key: tensors[key] for key in rules.state if key in tensors}


def _finite(tensors: dict[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    policy = rules.settings.nan_policy
    bad = {key: int((~value.isfinite()).sum()) for key, value in tensors.items()}
    for key, count in bad.items():
        if count and policy != "drop_tensor":
            kind = _EndsRound if policy == "raise" else Rejected
            raise kind(f"{key}: expected finite values, found {count} that are not finite")
    return {key: value for key, value in tensors.items() if not bad[key]}


def _clip_factor(tensors: dict[str, Tensor], rules: Rules) -> float:
    """Return the factor, at most 1, that limits the norm of all tensors together to
    ``max_update_norm``."""
    bound = rules.settings.max_update_norm
    if bound is None:
        return 1.0
    changes: list[np.ndarray] = []
    for key, value in tensors.items():
        change = value.detach().to("cpu", torch.float64)
        if rules.settings.upload == "value":
            change = change - rules.head(key, rules.rank(key, value))
        changes.append(change.contiguous().numpy().ravel())
    largest = max(float(np.abs(c).max(initial=0.0)) for c in changes)
    need(math.isfinite(largest), "norm", "a finite number", largest)
    if largest == 0:
        return 1.0
    # numpy sums on one thread, which gives the same bits on all machines of the same kind. The
    # division by the largest value prevents an overflow of the squares.
    norm = largest * math.sqrt(sum(float(np.square(c / largest).sum()) for c in changes))
    return min(1.0, bound / norm)


def _same(first: Update, second: Update) -> bool:
    """Return whether two replies of one client are bitwise equal."""
    ours, theirs = first.tensors, second.tensors
    known = [(u.plan, u.failed, *_spelled(u.num_examples, u.loss)) for u in (first, second)]
    if known[0] != known[1] or not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
        return False
    return ours.keys() == theirs.keys() and all(_equal(ours[k], theirs[k]) for k in ours)


def _spelled(*values: Any) -> list[str]:
    """Return each value as text. Integers are in hexadecimal, since Python limits the conversion to
    decimal to 4300 digits."""
    return [hex(value) if type(value) is int else repr(value) for value in values]


def _equal(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    odd = any(t.layout != torch.strided or t.is_meta or t.is_nested for t in (first, second))
    if odd or (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if not first.numel():
        return True
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (first, second)]
    return torch.equal(*bits)  # bits, so that a NaN equals itself
