"""How long a round takes a device, and how long the devices of a round wait for each other."""

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
    """The seconds that a simulated round took, as :meth:`SimulatedClock.advance` returns them."""

    times: dict[Client, float]  # seconds of each device
    seconds: float  # of the slowest
    waiting: float  # W


@dataclass(eq=False, repr=False)
class SimulatedClock:
    """Rounds timed by speeds that are known, instead of by a clock.

    ``T = f + d mu + beta (down + up) / 2``: the bytes are those of the planned layers, and down
    those of all layers where a device gets all. d is how far the backward goes down, from the
    output to the lowest planned layer, which for a suffix is its depth.

    Args:
        speeds: by device its f, mu and beta.
        state: the global adapter, of which sizes count. pattern: finds the index of a layer.
        send_frozen: whether devices get the layers that they do not train.

    Attributes:
        seconds: of all rounds so far.

    Raises:
        ValueError: a state without layers.
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
        """Return what ``device`` would report of a round with this ``plan``: durations in seconds,
        computed from its speeds, and the bytes of the slice."""
        f, mu, beta = self.speeds[device][:3]
        up = plan_bytes(self.state, plan, self.pattern)
        whole = LayerPlan(tuple(range(self.L)))
        down = plan_bytes(self.state, whole, self.pattern) if self.send_frozen else up
        reach = self.L - plan.layers[0] if plan.layers else 0
        figures = f + reach * mu, beta * down / 2, up, beta * up / 2
        return CapacityReport(device, len(plan.layers), *figures)

    def advance(self, plans: Mapping[Client, LayerPlan]) -> RoundTime:
        """Let a round pass: the devices train in parallel, and the slowest ends it.

        Args:
            plans: by device what it trains.

        Returns:
            the seconds of the round and of each device; :attr:`seconds` grows by the former.
        """
        times: dict[Client, float] = {}
        for device, plan in plans.items():
            report = self.report(device, plan)
            times[device] = report.train_time + report.down_time + (report.up_time or 0.0)
        seconds = max(times.values(), default=0.0)
        self.seconds += seconds
        return RoundTime(times, seconds, waiting_time(times) if times else 0.0)
