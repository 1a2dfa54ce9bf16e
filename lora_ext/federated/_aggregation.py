"""Many clients' updates made into one global adapter, layer by layer and rank by rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import number, require
from lora_ext.adapter import PREFIX, able_to_learn, norm_of, padded, truncated

from ._plan import PATTERN, Pair, layer_pairs
from ._update import Client, NanPolicy, RankAgg, Reply, Rules, Settings, Update, Upload, accept

WHERE = "aggregate"


@dataclass(frozen=True)
class Aggregate:
    """What a round made of its replies.

    Attributes:
        state: the new global state. What nobody trained is the very tensor of before; where the
            round was skipped, everything is.
        accepted: clients whose replies were fit to be averaged, in ascending order.
        rejected: by client the reason, which names key, expected and found.
        uncovered: layers that no accepted client trained.
        noise: by layer how far averaging A and B apart is from averaging ``B A``; of "svd" what the
            truncation takes away. Relative.
        skipped: whether the state is that of before.
        stacked: with "stack", by module in the base model ``(A, B)`` in float64, whose
            ``scaling * B @ A`` the base weight takes up.
        clipped: by client the factor below 1 that brought a long update down to the bound.
        reason: why the round was skipped.
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

    ``theta + server_lr * (sum_i w_i theta_i / sum_i w_i - theta)`` for each tensor, over the
    clients that trained its layer, and no others. ``theta_i`` is a client's own value.

    =========== ===================================================================================
    rank_agg    where clients have other ranks, or how their products are averaged
    =========== ===================================================================================
    "covered"   row j of A and column j of B over the clients of rank above j
    "zero_pad"  rows and columns that a client lacks count as zeros
    "fro"       "covered" with weights ``w_i ||B_i A_i||_F``; the ``w_i`` where all of them are 0
    "svd"       ``sum_i w_i B_i A_i``, cut back to the global rank, roots of the singular values in
                either factor
    "stack"     the same sum exactly, in ``stacked``, for the base weight; B becomes 0, A stays
    =========== ===================================================================================

    A rank that comes out as 0 in both factors, where the clients cancel or "svd" finds no more
    directions, gets a drawn row of A and keeps its product, so that training moves it; "zero_pad"
    alone has the zeros that it asks for.

    Sums are float64, in the order of the clients, and rounded once to the dtype of the state: no
    order of the replies changes a bit. Bad replies are rejected one by one; nothing is broadcast.

    Args:
        state: the whole global adapter under PEFT's names: A ``(r, I)``, B ``(O, r)``.
        updates: equal ones of one client count once.
        upload: what the tensors of a reply are, "delta" from the state or "value".
        weighted_by: None gives every client the weight 1.
        server_lr: above 0.
        scaling: s of ``s B A``, for all modules or by each one's name in the base model. Every
            client has the same.
        nan_policy: "drop_client" rejects a reply with NaN or infinity; "drop_tensor" leaves that
            tensor out (and its partner, where products are averaged); "raise" ends the round.
        max_update_norm: an update of a larger norm, over all its tensors, is scaled down to it.
        min_replies: with fewer that are accepted, the round is skipped.
        partial_ok: whether a reply may lack modules of its plan; never half of one.
        pattern: finds the index of a layer in a name.
        shared: further names of the state that every client sends beside its plan: a head.

    Raises:
        ValueError: settings out of range; a state without layers, or with factors that do not fit;
            with ``nan_policy="raise"`` what it says. TypeError: no :class:`Update`.
            KeyError: a factor of the state without the other.

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
    """:func:`aggregate` of a state whose pairs of factors are known, with checked settings."""
    state, settings = rules.state, rules.settings
    for key in settings.shared:
        require(key in state, WHERE, "shared", f"names of the {len(state)} tensors", repr(key))
    scales = _scales(settings.scaling, rules.pairs)
    replies, rejected, clipped = accept(updates, rules)
    accepted = tuple(reply.client for reply in replies)
    trained = {rules.layers[key] for reply in replies for key in reply.tensors if key in rules.axes}
    uncovered = tuple(sorted(set(rules.layers.values()) - trained))
    result = Aggregate(dict(state), accepted, rejected, uncovered, clipped=clipped)
    if len(replies) < settings.min_replies:
        few = f"replies: expected at least {settings.min_replies}, found {len(replies)}"
        return replace(result, skipped=True, reason=few)
    round_ = _Round(rules, replies)
    try:
        for pair in rules.pairs:
            round_.add(pair, scales[pair.module])
        for key in settings.shared:
            if parts := round_.parts(key):
                round_.write(key, _mean(parts))
    except _TooLarge as error:
        return replace(result, skipped=True, reason=str(error))
    new = {**result.state, **round_.new}
    return replace(result, state=new, noise=round_.noise(), stacked=round_.stacked)


class _TooLarge(ArithmeticError):
    """A result that the dtype of the state cannot hold."""


class _Round:
    """The new values of one round, module by module."""

    def __init__(self, rules: Rules, replies: list[Reply]):
        self.rules = rules
        self.replies = replies
        self.rank_agg = rules.settings.rank_agg
        self.server_lr = rules.settings.server_lr
        self.new: dict[str, Tensor] = {}
        self.stacked: dict[str, tuple[Tensor, Tensor]] = {}
        self._generator = torch.Generator().manual_seed(0)
        self._squares: dict[int, tuple[float, float]] = {}  # of error and size, by layer

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
        """By layer, the root of the sums of squares over its modules."""
        return {
            layer: math.sqrt(error / size) if size else 0.0
            for layer, (error, size) in self._squares.items()
        }

    def _add_means(self, pair: Pair, parts: list[PairPart]) -> tuple[float, float]:
        """A and B apart."""
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
            if len(alone) > len(own):  # somebody's other factor was dropped
                self.write(key, _mean_of(start, alone, axis, zero_pad))
            elif own:
                self.write(key, means[-1])
        if not parts:
            return 0.0, 0.0
        weighed = [p._replace(weight=weight) for weight, p in zip(weights, parts, strict=True)]
        return _noise_of(_normalised(weighed), means[0], means[1])

    def _add_nearest(self, pair: Pair, parts: list[PairPart]) -> tuple[float, float]:
        """The sum of the products, cut back to the rank that the module has."""
        if not parts:
            return 0.0, 0.0
        start_a, start_b = self._start(pair.a), self._start(pair.b)
        a, b = _stack_of(self._moved(_normalised(parts), start_a, start_b))
        size = norm_of(a, b)
        if not math.isfinite(size):
            raise _TooLarge(f"{pair.module}: expected products of a finite norm, found {size}")
        dtype = self.rules.state[pair.a].dtype
        near_a, near_b, dropped = truncated(a, b, start_a.shape[0], dtype)
        near_a, near_b = padded(near_a, near_b, start_a.shape[0])
        self.write(pair.a, near_a.reshape(start_a.shape), moved=True)
        self.write(pair.b, near_b.reshape(start_b.shape), moved=True)
        return dropped, size

    def _add_stack(self, pair: Pair, parts: list[PairPart]) -> tuple[float, float]:
        """The sum of the products as it is, for the base weight."""
        if not parts:
            return 0.0, 0.0
        start_a, start_b = self._start(pair.a), self._start(pair.b)
        self.stacked[pair.module] = _stack_of(self._moved(_normalised(parts), start_a, start_b))
        self.write(pair.b, torch.zeros_like(start_b), moved=True)
        return 0.0, 1.0

    def _moved(self, parts: list[PairPart], a: Tensor, b: Tensor) -> list[PairPart]:
        """The step of ``server_lr`` from the global product towards the mean one."""
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
        """Round a mean, after the step towards it where that is not done yet."""
        before = self.rules.state[key]
        if not moved and self.server_lr != 1:
            start = self._start(key)
            value = start + self.server_lr * (value - start)
        value = value.to(before.dtype)
        if not bool(value.isfinite().all()):
            raise _TooLarge(f"{key}: expected values that {before.dtype} can hold, found larger")
        self.new[key] = value.to(before.device)


def _scales(scaling: float | Mapping[str, float], pairs: Sequence[Pair]) -> dict[str, float]:
    given: dict[str, Any] = {pair.module: scaling for pair in pairs}
    if isinstance(scaling, Mapping):
        named = {str(name).removeprefix(PREFIX): value for name, value in scaling.items()}
        for module in given:
            require(module in named, WHERE, "scaling", f"one of {module}", sorted(named))
        given = {module: named[module] for module in given}
    return {m: float(number(WHERE, f"scaling: {m}", value)) for m, value in given.items()}


# -------------------------------------------------------------------------------------------------
# One module's factors out of those of several clients, in float64 on the CPU. A client's rank may
# be smaller than that of the global adapter: it then has the first rows of A and the first columns
# of B. Sums go from client to client in the order that is given, element by element, so that no
# result depends on the number of threads.


class Part(NamedTuple):
    """Value of one tensor at one client, and its weight."""

    weight: float
    value: Tensor
    otherwise: float  # its weight where those of all are 0


class PairPart(NamedTuple):
    """Factors of one module at one client, and their weight."""

    weight: float
    a: Tensor  # (r, I)
    b: Tensor  # (O, r)


def _mean_of(start: Tensor, parts: Sequence[Part], axis: int, zero_pad: bool) -> Tensor:
    """The weighted mean, rank by rank over the clients that have the rank; shaped like ``start``.

    Args:
        start: the global value, which ranks that nobody has keep. parts: at least one.
        axis: of the ranks. zero_pad: whether a client's missing ranks count as zeros.
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
    """The weighted mean, around the first value: that of equal values is exactly what they are."""
    weights = [part.weight for part in parts]
    if not any(weights):
        weights = [part.otherwise for part in parts]
    total = sum(weights)
    first = parts[0].value
    away = torch.zeros_like(first)
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        away += (weight / total) * (part.value - first)  # a share: no weight makes it overflow
    return first + away


def _by_norm(parts: Sequence[PairPart]) -> list[float]:
    """Weights times the norm of each client's ``B A``; the weights where all norms are 0."""
    scaled = [part.weight * norm_of(part.a.flatten(1), part.b.flatten(1)) for part in parts]
    return scaled if any(scaled) else [part.weight for part in parts]


def _stack_of(parts: Sequence[PairPart]) -> tuple[Tensor, Tensor]:
    """Factors of ``sum w_i B_i A_i``, the weights as they are, their roots in either factor."""
    roots = [math.sqrt(abs(part.weight)) for part in parts]
    a = torch.cat([root * part.a.flatten(1) for root, part in zip(roots, parts, strict=True)])
    signs = [math.copysign(root, part.weight) for root, part in zip(roots, parts, strict=True)]
    b = torch.cat([s * part.b.flatten(1) for s, part in zip(signs, parts, strict=True)], 1)
    return a, b


def _normalised(parts: Sequence[PairPart], to: float = 1.0) -> list[PairPart]:
    """The same with weights that sum up to ``to``."""
    total = sum(part.weight for part in parts)
    return [part._replace(weight=to * (part.weight / total)) for part in parts]


def _noise_of(parts: Sequence[PairPart], mean_a: Tensor, mean_b: Tensor) -> tuple[float, float]:
    """``|| sum w_i B_i A_i - (mean B)(mean A) ||_F`` and ``|| sum w_i B_i A_i ||_F``; weights sum
    up to 1, and ranks that no part has are left out of the means."""
    a, b = _stack_of(parts)
    size = norm_of(a, b)
    if len(parts) == 1:
        return 0.0, size
    rank = max(len(part.a) for part in parts)
    mean_a, mean_b = mean_a.flatten(1)[:rank], mean_b.flatten(1)[:, :rank]
    difference = norm_of(torch.cat([a, mean_a]), torch.cat([b, -mean_b], 1))
    return difference, size
