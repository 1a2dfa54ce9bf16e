"""How long a round takes a device, and how long the devices of a round wait for each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_ext.federated.plan import LayerPlan
from lora_ext.federated.update import Client
from lora_ext.ops._checks import require

from .capacity import CapacityReport, Estimate


class DeviceTime(NamedTuple):
    """``T(k) = f + k mu + beta U(k)`` of one device; ``U(k)``: the bytes of the last k layers."""

    estimate: Estimate
    bytes_of: Sequence[float]  # U(0) to U(L)

    def __call__(self, depth: int) -> float:
        """Seconds of a round in which the last ``depth`` layers train."""
        f, mu, beta = self.estimate[:3]
        return f + depth * mu + beta * self.bytes_of[depth]


def suffix_sums(values: Sequence[Any]) -> list[Any]:
    """``sums[k]``, k from 0 on: the sum of the last k values."""
    sums = [0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums


def waiting_time(times: Iterable[float] | Mapping[Any, float]) -> float:
    """``W = mean_i(max_j T_j - T_i)``: how long a device waits for the slowest, on the mean.

    Args:
        times: seconds of the devices of one round; of a mapping its values.

    Returns:
        seconds, 0 exactly where all are equal.

    Raises:
        ValueError: no times, or one that is negative or no finite number.

    Source: LEGEND (arXiv 2412.20004), whose devices are to finish together.
    """
    found = list(times.values() if isinstance(times, Mapping) else times)
    require(bool(found), "waiting_time", "times", "at least one", "none")
    for value in found:
        real = math.isfinite(value) and value >= 0
        require(real, "waiting_time", "times", "seconds from 0", value)
    longest = max(found)
    return math.fsum(longest - value for value in found) / len(found)


class RoundTime(NamedTuple):
    """What a simulated round took."""

    times: dict[Client, float]  # seconds of each device
    seconds: float  # of the slowest
    waiting: float  # W


class SimulatedClock:
    """Rounds timed by speeds that are known, instead of by a clock.

    ``T = f + d mu + beta U``: U are the bytes of the planned layers. d is how far the backward
    goes down, from the output to the lowest planned layer, which for a suffix is its depth.

    Args:
        speeds: by device its f, mu and beta.
        bytes_per_layer: one way, at the ranks that are planned.

    Attributes:
        seconds: of all rounds so far.

    Raises:
        ValueError: no layer.
    """

    def __init__(self, speeds: Mapping[Client, Estimate], bytes_per_layer: Sequence[float]):
        require(len(bytes_per_layer) > 0, "SimulatedClock", "bytes_per_layer", "a layer", "none")
        self.speeds = dict(speeds)
        self.bytes_per_layer = tuple(bytes_per_layer)
        self.seconds = 0.0

    def report(self, device: Client, plan: LayerPlan) -> CapacityReport:
        """What a device with such speeds reports of a round; half of its bytes' time is down."""
        f, mu, beta = self.speeds[device][:3]
        size = sum(self.bytes_per_layer[layer] for layer in plan.layers)
        down = beta * size / 2
        train = f + mu * self._reach(plan)
        return CapacityReport(device, len(plan.layers), train, down, size, down)

    def advance(self, plans: Mapping[Client, LayerPlan]) -> RoundTime:
        """Let a round pass: the devices train in parallel, and the slowest ends it."""
        times: dict[Client, float] = {}
        for device, plan in plans.items():
            report = self.report(device, plan)
            times[device] = report.train_time + 2 * report.down_time
        seconds = max(times.values(), default=0.0)
        self.seconds += seconds
        return RoundTime(times, seconds, waiting_time(times) if times else 0.0)

    def _reach(self, plan: LayerPlan) -> int:
        return len(self.bytes_per_layer) - plan.layers[0] if plan.layers else 0
