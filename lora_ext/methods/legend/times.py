"""Times of the devices of a round, and how long they wait for each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lora_ext._checks import require
from lora_ext.federated import PATTERN, Client, LayerPlan, check_layers, layer_pairs, plan_bytes

from ._capacity import CapacityReport, Estimate


def waiting_time(times: Iterable[float] | Mapping[Any, float]) -> float:
    """Return ``W = mean_i(max_j T_j - T_i)``, the mean time that a device waits for the slowest.

    Args:
        times: Seconds of the devices of one round; of a mapping its values.

    Returns:
        Seconds, exactly 0 if all times are equal.

    Raises:
        ValueError: If there are no times, or one is negative or not finite.

    Source: LEGEND (arXiv 2412.20004), which aims to let devices finish together.
    """
    found = list(times.values() if isinstance(times, Mapping) else times)
    require(bool(found), "waiting_time", "times", "at least one", "none")
    for value in found:
        real = math.isfinite(value) and value >= 0
        require(real, "waiting_time", "times", "seconds from 0", value)
    longest = max(found)
    return math.fsum(longest - value for value in found) / len(found)


class RoundTime(NamedTuple):
    """Duration of a simulated round, the result of :meth:`SimulatedClock.advance`."""

    times: dict[Client, float]  # seconds of each device
    seconds: float  # of the slowest device
    waiting: float  # W, in seconds


@dataclass(eq=False, repr=False)
class SimulatedClock:
    """Clock of simulated rounds, computed from known speeds.

    ``T = f + d mu + beta (down + up) / 2``: up is the bytes of the planned layers; down is the same
    or, with ``send_frozen``, the bytes of all layers. d is the number of layers that the backward
    passes through, from the output to the lowest planned one; for a suffix, its depth.

    Args:
        speeds: f, mu and beta by device.
        state: Global adapter, of which only sizes matter.
        pattern: Regular expression for the layer's index in a name.
        send_frozen: Whether devices get the layers that they do not train.

    Attributes:
        seconds: Sum over all rounds so far.

    Raises:
        ValueError: If the state has no layers.
    """

    speeds: Mapping[Client, Estimate]
    state: Mapping[str, Tensor]
    pattern: str = PATTERN
    send_frozen: bool = False
    seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        pairs = layer_pairs("SimulatedClock: state", self.state, self.pattern)
        self.L = check_layers("SimulatedClock", {pair.layer for pair in pairs})
        self.speeds = dict(self.speeds)

    def report(self, device: Client, plan: LayerPlan) -> CapacityReport:
        """Return the report of ``device`` on a round with this ``plan``: durations in seconds,
        computed from its speeds, and the bytes of the slice."""
        f, mu, beta = self.speeds[device][:3]
        up = plan_bytes(self.state, plan, self.pattern)
        whole = LayerPlan(tuple(range(self.L)))
        down = plan_bytes(self.state, whole, self.pattern) if self.send_frozen else up
        reach = self.L - plan.layers[0] if plan.layers else 0
        figures = f + reach * mu, beta * down / 2, up, beta * up / 2
        return CapacityReport(device, len(plan.layers), *figures)

    def advance(self, plans: Mapping[Client, LayerPlan]) -> RoundTime:
        """Simulate a round, in which the devices train in parallel and the slowest one ends it.

        Args:
            plans: Plan of each device.

        Returns:
            Seconds of the round and of each device; the former are added to :attr:`seconds`.
        """
        times: dict[Client, float] = {}
        for device, plan in plans.items():
            report = self.report(device, plan)
            times[device] = report.train_time + report.down_time + (report.up_time or 0.0)
        seconds = max(times.values(), default=0.0)
        self.seconds += seconds
        return RoundTime(times, seconds, waiting_time(times) if times else 0.0)
