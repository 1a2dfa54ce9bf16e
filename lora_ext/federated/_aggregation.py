"""Aggregation of clients' updates into one global adapter, by layer and rank.

An adapter adds ``s B A`` to the weight of a module, with a scale s and factors A ``(r, I)`` and B
``(O, r)``. Shape letters: r rank, I inputs and O outputs of the module.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import number, require
from lora_ext.adapter import PREFIX, TooLarge, able_to_learn, norm_of, padded, rounded, truncated

from ._plan import PATTERN, Client, Pair, layer_pairs
from ._update import NanPolicy, RankAgg, Reply, Rules, Settings, Update, Upload, accept

WHERE = "aggregate"


@dataclass(frozen=True)
class Aggregate:
    """Result of the aggregation of one round.

    Attributes:
        state: the new global adapter. Tensors that no client trained, and all tensors if the round
            was skipped, are the objects of the old adapter.
        accepted: clients with valid replies, in ascending order.
        rejected: by client, the reason for rejecting its reply, with expected and found value.
        uncovered: indices of the layers that no accepted client trained.
        noise: by layer, the norm of the error divided by the norm of the mean of ``B A``. The error
            is ``mean(B) mean(A) - mean(B A)``, or the part that "svd" truncates; the noise is 0 for
            "stack".
        skipped: True if the round was skipped and ``state`` equals the old adapter.
        stacked: with "stack", ``(A, B)`` in float64 by module name in the base model. The caller
            must add ``scaling * B @ A`` to the base weight.
        clipped: by client, the factor below 1 that scaled the client's update down to
            ``max_update_norm``. Clients with smaller updates have no entry.
        reason: why the round was skipped; empty if it was not.
    """

    state: dict[str, Tensor]
    accepted: tuple[Client, ...]
    rejected: dict[Client, str]
    uncovered: tuple[int, ...]
    noise: dict[int, float] = field(default_factory=dict)
    skipped: bool = False
    stacked: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    clipped: dict[Client, float] = field(default_factory=dict)
    reason: str = ""


@torch.no_grad()
def aggregate(
    state: Mapping[str, Tensor],
    updates: Iterable[Update],
    *,
    rank_agg: RankAgg = "covered",
    upload: Upload = "delta",
    weighted_by: Literal["num-examples"] | None = "num-examples",
    server_lr: float = 1.0,
    scaling: float | Mapping[str, float] = 1.0,
    nan_policy: NanPolicy = "drop_client",
    max_update_norm: float | None = None,
    min_replies: int = 1,
    partial_ok: bool = False,
    pattern: str = PATTERN,
    shared: Sequence[str] = (),
) -> Aggregate:
    """Average the replies of a round into the global adapter.

    A tensor theta of the state becomes ``theta + server_lr * (sum_i w_i theta_i / sum_i w_i -
    theta)``. The sums are over the clients i that trained the layer of theta; ``theta_i`` is the
    value of theta at client i, and ``w_i`` is the client's weight.

    =========== ===================================================================================
    rank_agg    what is averaged
    =========== ===================================================================================
    "covered"   row j of A and column j of B, over the clients whose rank is above j
    "zero_pad"  A and B, with zeros for the rows and columns that a client lacks
    "fro"       as "covered", with weights ``w_i ||B_i A_i||_F``, or ``w_i`` if all of these are 0
    "svd"       the products: ``sum_i w_i B_i A_i``, truncated to the global rank; each factor
                contains the square roots of the singular values
    "stack"     the products, exactly: ``stacked`` contains factors of the sum, to be added to the
                base weight; in the new state, B is 0 and A does not change
    =========== ===================================================================================

    Row j of A and column j of B can both become 0, if the clients' values cancel or, with "svd", if
    the product has a smaller rank. Training could not change such zeros. Row j of A is therefore
    drawn at random, which leaves ``B A`` unchanged. "zero_pad" keeps the zeros.

    Sums are computed in float64, with the clients in sorted order, and rounded once to the dtype of
    the state, so the order of replies does not change any bit. An invalid reply is rejected, and
    all other replies are averaged. Shapes must match exactly: no tensor is broadcast.

    Args:
        state: the whole global adapter under PEFT's names: A ``(r, I)``, B ``(O, r)``.
        updates: the clients' replies. Identical updates of one client count once.
        rank_agg: method of averaging, one of those in the table.
        upload: "delta" if replies contain differences from ``state``, "value" for new values.
        weighted_by: "num-examples" if the weight of a client is its number of examples; None if all
            weights are 1.
        server_lr: step size of the server, above 0.
        scaling: scale s of all clients: a number, or numbers by module name in the base model.
        nan_policy: if a reply contains NaN or infinity, "drop_client" rejects it; "drop_tensor"
            ignores only the tensor (and the other factor, if products are averaged); "raise" raises
            an error.
        max_update_norm: maximum norm of an update over all its tensors. An update with a larger
            norm is scaled down to this norm. None for no maximum.
        min_replies: minimum number of accepted replies. With fewer, the round is skipped.
        partial_ok: whether a reply may lack both factors of modules in its plan.
        pattern: regular expression whose first group is the index of a layer in a name.
        shared: names of tensors outside the adapter that every client sends, such as a head's.

    Raises:
        ValueError: If settings are out of range; if the state has no layers, or its factors do not
            fit each other; or if a value is not finite and ``nan_policy="raise"``.
        TypeError: If an element of ``updates`` is not an :class:`Update`.
        KeyError: If a module of the state lacks one of its two factors.

    Sources: Fed-HeLLo (arXiv 2506.12213), "covered"; HetLoRA, "zero_pad"; FlexLoRA, "svd"; FLoRA,
    "stack".
    """
    settings = Settings(
        rank_agg=rank_agg,
        upload=upload,
        weighted_by=weighted_by,
        server_lr=server_lr,
        scaling=scaling,
        nan_policy=nan_policy,
        max_update_norm=max_update_norm,
        min_replies=min_replies,
        partial_ok=partial_ok,
        pattern=pattern,
        shared=tuple(shared),
    )
    pairs = layer_pairs(f"{WHERE}: state", state, pattern)
    return average(Rules(state, pairs, settings), updates)


@torch.no_grad()
def average(rules: Rules, updates: Iterable[Update]) -> Aggregate:
    """Average the replies, as :func:`aggregate` does, with settings that are already checked."""
    state, settings = rules.state, rules.settings
    for key in settings.shared:
        require(key in state, WHERE, "shared", "names of tensors of the state", repr(key))
    scales = _scales(settings.scaling, rules.pairs)
    replies, rejected = accept(updates, rules)
    accepted = tuple(reply.client for reply in replies)
    trained = {rules.layers[key] for reply in replies for key in reply.tensors if key in rules.axes}
    uncovered = tuple(sorted(set(rules.layers.values()) - trained))
    clipped = {reply.client: reply.factor for reply in replies if reply.factor != 1}
    result = Aggregate(dict(state), accepted, rejected, uncovered, clipped=clipped)
    if len(accepted) < settings.min_replies:
        few = f"replies: expected at least {settings.min_replies}, found {len(accepted)}"
        return replace(result, skipped=True, reason=few)
    round_ = _Round(rules, replies)
    try:
        for pair in rules.pairs:
            round_.add(pair, scales[pair.module])
        for key in settings.shared:
            if parts := round_.parts(key):
                round_.write(key, _mean(parts))
    except TooLarge as error:
        return replace(result, skipped=True, reason=str(error))
    new = {**result.state, **round_.new}
    return replace(result, state=new, noise=round_.noise(), stacked=round_.stacked)


class _Round:
    """Computation of the new values of one round, module by module."""

    def __init__(self, rules: Rules, replies: list[Reply]):
        self.rules = rules
        self.replies = replies
        self.rank_agg = rules.settings.rank_agg
        self.server_lr = rules.settings.server_lr
        self.new: dict[str, Tensor] = {}
        self.stacked: dict[str, tuple[Tensor, Tensor]] = {}
        self._generator = torch.Generator().manual_seed(0)
        self._squares: dict[int, tuple[float, float]] = {}  # by layer: squared norms

    def add(self, pair: Pair, scale: float) -> None:
        """Aggregate the factors of one module."""
        parts = [
            PairPart(reply.weight, *(reply.value(key, self.rules) for key in (pair.a, pair.b)))
            for reply in self.replies
            if pair.a in reply.tensors and pair.b in reply.tensors
        ]
        ways = {"svd": self._add_nearest, "stack": self._add_stack}
        error, size = ways.get(self.rank_agg, self._add_means)(pair, parts)
        if self.rank_agg != "zero_pad" and not self.new.keys().isdisjoint((pair.a, pair.b)):
            a, b = (self.new.get(key, self.rules.state[key]) for key in (pair.a, pair.b))
            if (found := able_to_learn(a, b, self._generator)) is not a:
                self.new[pair.a] = found
        if parts:
            errors, sizes = self._squares.get(pair.layer, (0.0, 0.0))
            self._squares[pair.layer] = errors + (scale * error) ** 2, sizes + (scale * size) ** 2

    def noise(self) -> dict[int, float]:
        """Return by layer the norm of the error, divided by the norm of the averaged products."""
        return {
            layer: math.sqrt(error / size) if size else 0.0
            for layer, (error, size) in self._squares.items()
        }

    def _add_means(self, pair: Pair, parts: list[PairPart]) -> tuple[float, float]:
        """Average A and B separately. Return the norm of ``mean(B) mean(A) - mean(B A)``, and the
        norm of ``mean(B A)``."""
        weights = _by_norm(parts) if self.rank_agg == "fro" else [p.weight for p in parts]
        zero_pad = self.rank_agg == "zero_pad"
        means: list[Tensor] = []
        for axis, key in enumerate((pair.a, pair.b)):
            start = self._start(key)
            pairs = zip(weights, parts, strict=True)
            own = [Part(weight, (p.a, p.b)[axis], p.weight) for weight, p in pairs]
            if own:
                means.append(_mean_of(start, own, axis, zero_pad))
            alone = self.parts(key) if self.rank_agg != "fro" else own
            if len(alone) > len(own):  # For some clients, the other factor is not finite.
                self.write(key, _mean_of(start, alone, axis, zero_pad))
            elif own:
                self.write(key, means[-1])
        if not parts:
            return 0.0, 0.0
        weighed = [p._replace(weight=weight) for weight, p in zip(weights, parts, strict=True)]
        return _noise_of(_normalised(weighed), means[0], means[1])

    def _add_nearest(self, pair: Pair, parts: list[PairPart]) -> tuple[float, float]:
        """Average the products, and truncate the result to the module's rank; return the
        truncation error and the norm of the averaged product."""
        if not parts:
            return 0.0, 0.0
        start_a, start_b = self._start(pair.a), self._start(pair.b)
        a, b = _stack_of(self._moved(_normalised(parts), start_a, start_b))
        size = norm_of(a, b)
        if not math.isfinite(size):
            raise TooLarge(f"{pair.module}: expected products with a finite norm, found {size}")
        dtype = self.rules.state[pair.a].dtype
        near_a, near_b, dropped = truncated(a, b, start_a.shape[0], dtype)
        near_a, near_b = padded(near_a, near_b, start_a.shape[0])
        self.write(pair.a, near_a.reshape(start_a.shape), moved=True)
        self.write(pair.b, near_b.reshape(start_b.shape), moved=True)
        return dropped, size

    def _add_stack(self, pair: Pair, parts: list[PairPart]) -> tuple[float, float]:
        """Stack the clients' factors, to be added to the base weight by the caller; set B to 0."""
        if not parts:
            return 0.0, 0.0
        start_a, start_b = self._start(pair.a), self._start(pair.b)
        self.stacked[pair.module] = _stack_of(self._moved(_normalised(parts), start_a, start_b))
        self.write(pair.b, torch.zeros_like(start_b), moved=True)
        return 0.0, 1.0

    def _moved(self, parts: list[PairPart], a: Tensor, b: Tensor) -> list[PairPart]:
        """Return the parts of the new global product: a step of ``server_lr`` from the product of
        the global factors ``a`` and ``b`` towards the mean of ``parts``."""
        if self.server_lr == 1:
            return parts
        towards = _normalised(parts, to=self.server_lr)
        return [PairPart(1 - self.server_lr, a, b), *towards]

    def parts(self, key: str) -> list[Part]:
        return [
            Part(reply.weight, reply.value(key, self.rules), reply.weight)
            for reply in self.replies
            if key in reply.tensors
        ]

    def _start(self, key: str) -> Tensor:
        return self.rules.state[key].detach().to("cpu", torch.float64)

    def write(self, key: str, value: Tensor, moved: bool = False) -> None:
        """Store a new value in the state's dtype; apply ``server_lr`` first unless ``moved``."""
        before = self.rules.state[key]
        if not moved and self.server_lr != 1:
            start = self._start(key)
            value = start + self.server_lr * (value - start)
        self.new[key] = rounded(value, before, before.dtype, key)


def _scales(scaling: float | Mapping[str, float], pairs: Sequence[Pair]) -> dict[str, float]:
    given: dict[str, Any] = {pair.module: scaling for pair in pairs}
    if isinstance(scaling, Mapping):
        named = {str(name).removeprefix(PREFIX): value for name, value in scaling.items()}
        for module in given:
            require(module in named, WHERE, "scaling", f"a scale for {module}", sorted(named))
        given = {module: named[module] for module in given}
    return {m: float(number(WHERE, f"scaling: {m}", value)) for m, value in given.items()}


# -------------------------------------------------------------------------------------------------
# The following functions combine the factors of one module from several clients, in float64 on the
# CPU. A client's rank may be smaller than the global rank; the client's factors are then the first
# rows of A and the first columns of B. Clients are added one after another, so that results do not
# depend on the number of threads.


class Part(NamedTuple):
    """A client's value of a tensor, and the client's weight in the mean."""

    weight: float
    value: Tensor
    otherwise: float  # weight to use if all weights are 0


class PairPart(NamedTuple):
    """A client's factors of a module, and the client's weight in the mean."""

    weight: float
    a: Tensor  # (r, I)
    b: Tensor  # (O, r)


def _mean_of(start: Tensor, parts: Sequence[Part], axis: int, zero_pad: bool) -> Tensor:
    """Return the weighted mean of each rank over the clients that have this rank, shaped like
    ``start``.

    Args:
        start: global value, which is returned for ranks that no client has.
        parts: values of at least one client.
        axis: dimension of the ranks.
        zero_pad: whether a client's missing ranks count as zeros.
    """
    result = start.clone()
    bounds = {0, start.shape[axis], *(part.value.shape[axis] for part in parts)}
    for low, high in itertools.pairwise(sorted(bounds)):
        ranks = result.narrow(axis, low, high - low)
        having: list[Part] = []
        for part in parts:
            if part.value.shape[axis] >= high:
                having.append(part._replace(value=part.value.narrow(axis, low, high - low)))
            elif zero_pad:
                having.append(part._replace(value=torch.zeros_like(ranks)))
        if having:
            ranks.copy_(_mean(having))
    return result


def _mean(parts: Sequence[Part]) -> Tensor:
    """Return the weighted mean of the parts' values. Differences from the first value are averaged,
    so that the mean of equal values is exact."""
    weights = [part.weight for part in parts]
    if not any(weights):
        weights = [part.otherwise for part in parts]
    total = sum(weights)
    first = parts[0].value
    away = torch.zeros_like(first)
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        away += (weight / total) * (part.value - first)  # a ratio, so that weights cannot overflow
    return first + away


def _by_norm(parts: Sequence[PairPart]) -> list[float]:
    """Return each weight times the norm of ``B A``, or the weights if all such values are 0."""
    scaled = [part.weight * norm_of(part.a.flatten(1), part.b.flatten(1)) for part in parts]
    return scaled if any(scaled) else [part.weight for part in parts]


def _stack_of(parts: Sequence[PairPart]) -> tuple[Tensor, Tensor]:
    """Return stacked A and B with the product ``sum w_i B_i A_i``; each contains ``sqrt(w_i)``."""
    roots = [math.sqrt(abs(part.weight)) for part in parts]
    a = torch.cat([root * part.a.flatten(1) for root, part in zip(roots, parts, strict=True)])
    signs = [math.copysign(root, part.weight) for root, part in zip(roots, parts, strict=True)]
    b = torch.cat([s * part.b.flatten(1) for s, part in zip(signs, parts, strict=True)], 1)
    return a, b


def _normalised(parts: Sequence[PairPart], to: float = 1.0) -> list[PairPart]:
    """Return the parts with their weights scaled to the sum ``to``."""
    total = sum(part.weight for part in parts)
    return [part._replace(weight=to * (part.weight / total)) for part in parts]


def _noise_of(parts: Sequence[PairPart], mean_a: Tensor, mean_b: Tensor) -> tuple[float, float]:
    """Return ``|| sum w_i B_i A_i - (mean B)(mean A) ||_F`` and ``|| sum w_i B_i A_i ||_F``.

    The weights must sum to 1. Ranks that no part has are excluded from the means.
    """
    a, b = _stack_of(parts)
    size = norm_of(a, b)
    if len(parts) == 1:
        return 0.0, size
    rank = max(len(part.a) for part in parts)
    mean_a, mean_b = mean_a.flatten(1)[:rank], mean_b.flatten(1)[:, :rank]
    difference = norm_of(torch.cat([a, mean_a]), torch.cat([b, -mean_b], 1))
    return difference, size
