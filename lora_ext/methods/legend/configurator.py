"""Choice of each device's depth, that is, of the number of last layers that the device trains."""

from __future__ import annotations

import bisect
import logging
import math
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

from lora_ext._checks import check_fields, integer, number, require, within
from lora_ext.federated import Client, LayerPlan

from ._capacity import Estimate, check_estimate, waiting_time

Mode = Literal["fastest", "utility", "balanced"]
WHERE = "LegendConfigurator"

#: Bounds of settings that are also fields of :class:`LegendConfig`.
BOUNDS = {
    **dict.fromkeys(("max_step", "cover_every"), within(1)),
    "byte_budget": within(above=0),
    "deadline": within(above=0),
    "eps": within(0),
}
#: Relative difference below which two times count as equal. Rounding makes the estimates of equally
#: fast devices differ, but such devices must get equal depths.
_TIME_TOLERANCE = 1e-9

_log = logging.getLogger(__name__)


class Configuration(dict[Client, LayerPlan]):
    """Plans of a round by device, with their expected costs.

    Attributes:
        depths: k, number of last layers to train, by device.
        times: Predicted duration of the round in seconds, by device.
        target: tau, duration in seconds for which the depths were chosen.
        seconds: Largest value of ``times``.
        waiting: W, mean time in seconds that devices wait for the slowest device.
        over_target: Devices that need longer than tau even at depth ``k_min``.
        raised: Device whose depth was increased to the largest possible by step 4 of
            :class:`LegendConfigurator`, or None.
        extra_wait: Seconds that the increase of this depth added to W.
        uncovered: Layers that no device trains.
        bytes: Bytes of the planned layers of all devices, in one direction.
    """

    depths: dict[Client, int]
    times: dict[Client, float]
    target: float
    seconds: float
    waiting: float
    over_target: tuple[Client, ...]
    raised: Client | None
    extra_wait: float
    uncovered: tuple[int, ...]
    bytes: float


@dataclass(eq=False, repr=False)
class LegendConfigurator:
    """Object that chooses a depth for each device such that all devices of a round finish together.

    A device of depth k trains the last k of L layers. The predicted time of device i is
    ``T_i(k) = f + k mu + beta U(k)``, with f, mu and beta of the device (see :class:`Estimate`) and
    the bytes ``U(k)`` of these layers. ``kmax_i`` is the largest depth that the device's memory and
    the limits allow.

    1. The target time tau is chosen. "fastest": ``min_i T_i(kmax_i)``, the shortest time in which a
       device trains its largest depth. "balanced": the larger of this time and
       ``max_i T_i(k_min)``, so that no device is late. "utility": the smallest ``T_i(k)`` that
       minimizes ``max_i T_i(k_i) / sum_i p_i R(k_i)``, where ``R(k)`` is the sum of the ranks of
       the last k layers.
    2. ``k_i`` is the largest depth with ``T_i(k) <= tau``. If there is none, ``k_i`` is the largest
       depth that takes no longer than depth ``k_min``.
    3. No depth changes by more than ``max_step`` from one round to the next.
    4. Every ``cover_every`` rounds, one device trains all layers or, if no device can, the largest
       possible number of layers.
    5. While the layers to send have more than ``byte_budget`` bytes in total, the depth of the
       device with the most bytes per share of the data is lowered by one.

    **Our choice**: steps 4 and 5 may change a depth by more than ``max_step``, since they cannot be
    spread over several rounds. Devices that are not trusted (see :class:`Estimate`) get ``k_min``
    and do not affect tau, unless no device is trusted.

    Args:
        L: Number of layers.
        bytes_per_layer: Bytes of each layer's factors at its rank, in one direction; see
            :func:`layer_bytes`.
        ranks: Rank of each layer, the same for all devices that train it.
        mode: Rule for tau: "fastest", "balanced" or "utility".
        deadline: Upper bound of tau, in seconds.
        k_min: Lower bound of every depth.
        k_max: Upper bound of every depth; None means L.
        memory: Bytes of memory by device; a device without an entry has no bound.
        mem: Function ``mem(k)``, the bytes that depth k needs, non-decreasing in k.
        shares: p, share of the data by device; by default, all shares are equal.
        byte_budget: Upper bound of the bytes that all devices send per round, in one direction.
        max_step: Largest change of a depth per round.
        cover_every: Interval in rounds at which one device trains all layers, see step 4.
        eps: Tolerance: the depths of the previous round are kept if their mean waiting time is
            below ``eps`` times the duration of the round.
        rank_caps: Largest rank by device. With rank caps, the server must average each rank
            separately.

    Raises:
        ValueError: If a setting is out of range.
        TypeError: If a depth or rank is not an int.

    Source: LEGEND (arXiv 2412.20004). Only its abstract was available. The inputs and the aim are
    those of the paper; the algorithm is our choice.
    """

    L: int
    bytes_per_layer: Sequence[float]
    _: KW_ONLY
    ranks: Sequence[int]
    mode: Mode = "fastest"
    k_min: int = 1
    k_max: int | None = None
    memory: Mapping[Client, float] | None = None
    mem: Callable[[int], float] | None = None
    shares: Mapping[Client, float] | None = None
    byte_budget: float | None = None
    max_step: int = 3
    cover_every: int = 5
    eps: float = 0.0
    deadline: float | None = None
    rank_caps: Mapping[Client, int] | None = None

    def __post_init__(self) -> None:
        where, L = WHERE, self.L
        bounds = {"L": within(1), "k_min": within(1, L), "k_max": within(self.k_min, L)}
        check_fields(self, {**BOUNDS, **bounds})
        sizes, ranks = tuple(self.bytes_per_layer), self.ranks
        for name, values in (("bytes_per_layer", sizes), ("ranks", ranks)):
            require(len(values) == L, where, name, f"one value for each of {L} layers", len(values))
        for layer, size in enumerate(sizes):
            number(where, f"bytes_per_layer[{layer}]", size, above=0)
        self.bytes_per_layer = sizes
        self.ranks = tuple(integer(where, f"ranks[{i}]", r, 1) for i, r in enumerate(ranks))
        fits = self.memory is None or self.mem is not None
        require(fits, where, "mem", "a function if memory is given", "None")
        for device, share in (self.shares or {}).items():
            number(where, f"shares[{device!r}]", share, 0)
        # The mappings are copied, since the caller may change them later.
        self.rank_caps = {
            device: integer(where, f"rank_caps[{device!r}]", cap, 1)
            for device, cap in (self.rank_caps or {}).items()
        }
        self.k_max = L if self.k_max is None else self.k_max
        self.memory = dict(self.memory or {})
        self.shares = None if self.shares is None else dict(self.shares)

    def plan(self, device: Client, depth: int) -> LayerPlan:
        """Return the plan of ``device`` for the last ``depth`` layers, from 1 to L, with the
        device's ranks."""
        layers = tuple(range(self.L - depth, self.L))
        return LayerPlan(layers, tuple(self.ranks_of(device)[self.L - depth :]))

    def deepest(self, device: Client, limit: int) -> int:
        """Return the largest depth that ``limit``, ``k_max`` and the memory of a device allow.

        Raises:
            ValueError: If these limits do not allow ``k_min``.
        """
        where = f"{WHERE}.configure"
        most = min(self.k_max or self.L, limit)
        top = integer(where, f"limits[{device!r}]", most, self.k_min)
        if not self.memory or device not in self.memory or self.mem is None:
            return top
        has, mem = self.memory[device], self.mem
        fits = [k for k in range(self.k_min, top + 1) if mem(k) <= has]
        needed = f"at least {mem(self.k_min)} bytes, which depth {self.k_min} needs"
        require(bool(fits), where, f"memory[{device!r}]", needed, has)
        return fits[-1]

    def ranks_of(self, device: Client) -> tuple[int, ...]:
        """Return the rank of each layer, at most the device's entry in ``rank_caps``."""
        cap = (self.rank_caps or {}).get(device, math.inf)
        return tuple(int(min(rank, cap)) for rank in self.ranks)

    def configure(
        self,
        estimates: Mapping[Client, Estimate],
        selected: Iterable[Client],
        previous: Mapping[Client, LayerPlan | int] | None = None,
        round: int | None = None,
        limits: Mapping[Client, int] | None = None,
    ) -> Configuration:
        """Choose the depths of one round.

        Args:
            estimates: Estimates by device; devices that are not selected may have one too.
            selected: Devices of the round; their order has no effect.
            previous: Plans or depths of the previous round by device. ``max_step`` does not apply
                to a device without an entry, for example after a fault. None means no entries.
            round: Number of the round. If None, ``cover_every`` does not apply.
            limits: Largest depth by device, for reasons other than memory.

        Returns:
            Plans by device, with the devices in ascending order.

        Raises:
            ValueError: If no device is selected; if a device is selected twice or has no estimate;
                if an estimate is negative or not finite; if the memory or limit of a device is
                below ``k_min``.
        """
        devices = self._devices(estimates, selected, limits or {})
        target = self._target(devices)
        depths = [device.deepest(target) for device in devices]
        if previous is not None:
            depths = self._limit_steps(devices, depths, previous)
        wait_before = waiting_time(_times(devices, depths))
        raised = None
        if round is not None and round % self.cover_every == 0:
            raised = self._cover(devices, depths, previous or {})
        extra_wait = waiting_time(_times(devices, depths)) - wait_before
        if raised is not None:
            _log.info("%s: depth of %r raised, mean wait + %.3g s", WHERE, raised, extra_wait)
        if self.byte_budget is not None:
            self._fit_byte_budget(devices, depths, self.byte_budget)
        pairs = [(device.name, k) for device, k in zip(devices, depths, strict=True)]
        found = Configuration((name, self.plan(name, k)) for name, k in pairs)
        times = _times(devices, depths)
        found.depths, found.times = dict(pairs), dict(zip(found, times, strict=True))
        found.target, found.seconds, found.waiting = target, max(times), waiting_time(times)
        late = target * (1 + _TIME_TOLERANCE)
        found.over_target = tuple(d.name for d in devices if d.time(self.k_min) > late)
        found.raised, found.extra_wait = raised, extra_wait
        found.uncovered = tuple(range(self.L - max(depths)))
        found.bytes = _bytes(devices, depths)
        if len(found.over_target) == len(devices):
            warnings.warn(
                f"{WHERE}: all devices exceed the target time at depth {self.k_min}", stacklevel=2
            )
        elif found.over_target:
            _log.info("%s: over the target time of %.3g s: %s", WHERE, target, found.over_target)
        return found

    def _devices(
        self,
        estimates: Mapping[Client, Estimate],
        selected: Iterable[Client],
        limits: Mapping[Client, int],
    ) -> list[_Device]:
        where = f"{WHERE}.configure"
        names = list(selected)
        require(bool(names), where, "selected", "at least one device", "none")
        twice = [name for name, count in Counter(names).items() if count > 1]
        require(not twice, where, "selected", "each device only once", f"{twice[:1]} repeated")
        found: list[_Device] = []
        for name in sorted(names, key=lambda name: (isinstance(name, str), name)):
            require(name in estimates, where, "estimates", f"one for device {name!r}", "none")
            estimate = Estimate(*estimates[name])
            check_estimate(where, f"estimates[{name!r}]", estimate)
            k_max = self.deepest(name, limits.get(name, self.L))
            ranks, sizes = self.ranks_of(name), self.bytes_per_layer
            if ranks != self.ranks:
                cut = zip(sizes, ranks, self.ranks, strict=True)
                sizes = [size * rank / full for size, rank, full in cut]
            share = 1.0 if self.shares is None else self.shares.get(name, math.nan)
            require(not math.isnan(share), where, "shares", f"one for device {name!r}", "none")
            sums = [[0, *accumulate(reversed(values))] for values in (sizes, ranks)]
            found.append(_Device(name, estimate, self.k_min, k_max, share, *sums))
        return found

    def _target(self, devices: list[_Device]) -> float:
        trusted = [d for d in devices if d.estimate.trusted] or devices
        fastest = min(device.time(device.k_max) for device in trusted)
        if self.mode == "fastest":
            target = fastest
        elif self.mode == "balanced":
            target = max(fastest, *(device.time(self.k_min) for device in trusted))
        else:

            def cost(tau: float) -> float:
                """Return the duration of the round divided by the weighted sum of the ranks."""
                pairs = [(device, device.deepest(tau)) for device in trusted]
                useful = math.fsum(d.share * d.useful[k] for d, k in pairs)
                return max(d.time(k) for d, k in pairs) / useful if useful else math.inf

            taus = {d.time(k) for d in trusted for k in range(self.k_min, d.k_max + 1)}
            target = min(sorted(taus), key=cost)
        return target if self.deadline is None else min(target, self.deadline)

    def _limit_steps(
        self, devices: list[_Device], depths: list[int], previous: Mapping[Client, LayerPlan | int]
    ) -> list[int]:
        """Limit the change of each depth since the previous round to ``max_step``. If the waiting
        time of the previous depths is within the tolerance ``eps``, return the previous depths."""
        before = [_depth(previous.get(d.name, k)) for d, k in zip(devices, depths, strict=True)]
        pairs = [*zip(devices, before, strict=True)]
        if all(d.name in previous and self.k_min <= k <= d.deepest(math.inf) for d, k in pairs):
            times = _times(devices, before)
            if waiting_time(times) < self.eps * max(times):
                return before
        found: list[int] = []
        for (device, old), k in zip(pairs, depths, strict=True):
            near = min(max(k, old - self.max_step), old + self.max_step)
            found.append(min(max(near, self.k_min), device.k_max))
        return found

    def _cover(
        self, devices: list[_Device], depths: list[int], previous: Mapping[Client, LayerPlan | int]
    ) -> Client | None:
        """Increase the depth of one device to the largest possible, and return the device's name.
        If a device has this depth already, return None.

        The device is the fastest of those that can train this many layers. Devices whose previous
        depth is within ``max_step`` of the largest one are preferred.
        """
        trusted = [device for device in devices if device.estimate.trusted]
        deepest = max((device.k_max for device in trusted), default=0)
        if max(depths) >= deepest:
            return None
        able = [device for device in trusted if device.k_max == deepest]
        least = deepest - self.max_step
        near = [d for d in able if _depth(previous.get(d.name, deepest)) >= least]
        chosen = min(near or able, key=lambda device: device.time(deepest))
        depths[devices.index(chosen)] = deepest
        return chosen.name

    def _fit_byte_budget(self, devices: list[_Device], depths: list[int], budget: float) -> None:
        """Lower ``depths`` in place until the layers to send have at most ``budget`` bytes."""

        def cost(i: int) -> tuple[float, float]:
            device, size = devices[i], devices[i].bytes_of[depths[i]]
            return (size / device.share if device.share else math.inf), device.time(depths[i])

        while _bytes(devices, depths) > budget:
            deeper = [i for i, depth in enumerate(depths) if depth > self.k_min]
            if not deeper:
                least = f"even depth {self.k_min} of all devices exceeds {budget} bytes"
                warnings.warn(f"{WHERE}: byte_budget: {least}", stacklevel=3)
                return
            depths[max(deeper, key=cost)] -= 1


class _Device(NamedTuple):
    name: Client
    estimate: Estimate
    k_min: int
    k_max: int
    share: float
    bytes_of: Sequence[float]  # U(0) to U(L): U(k) is the bytes of the last k layers
    useful: Sequence[int]  # R(0) to R(L): R(k) is the sum of the ranks of the last k layers

    def time(self, depth: int) -> float:
        """Return ``T(k)``, the predicted seconds of a round of depth k."""
        f, mu, beta = self.estimate[:3]
        return f + depth * mu + beta * self.bytes_of[depth]

    def deepest(self, target: float) -> int:
        """Return the depth for the time ``target`` by step 2 of :class:`LegendConfigurator`, or
        ``k_min`` if the device is not trusted."""
        if not self.estimate.trusted:
            return self.k_min
        depths = range(self.k_min, self.k_max + 1)
        # If T(k_min) exceeds the target, larger depths that take no longer than T(k_min) are used.
        slack = max(target, self.time(self.k_min)) * (1 + _TIME_TOLERANCE)
        return self.k_min - 1 + bisect.bisect_right(depths, slack, key=self.time)


def _times(devices: Sequence[_Device], depths: Sequence[int]) -> list[float]:
    return [device.time(k) for device, k in zip(devices, depths, strict=True)]


def _bytes(devices: Sequence[_Device], depths: Sequence[int]) -> float:
    return math.fsum(d.bytes_of[k] for d, k in zip(devices, depths, strict=True))


def _depth(plan: LayerPlan | int) -> int:
    return len(plan.layers) if isinstance(plan, LayerPlan) else operator.index(plan)
