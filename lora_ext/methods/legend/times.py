"""Time that each device needs for a round, and the time that devices wait for the slowest one."""

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
    """Return ``W = mean_i(max_j T_j - T_i)``, the mean time that devices wait for the slowest one.

    Args:
        times: Seconds that each device needs for the round; of a mapping, the values are used.

    Returns:
        Seconds, exactly 0 if all times are equal.

    Raises:
        ValueError: If there are no times, or one is negative or not finite.

    Source: LEGEND (arXiv 2412.20004), which aims to let devices finish together.
    """
    found = list(times.values() if isinstance(times, Mapping) else times)
    require(bool(found), "waiting_time", "times", "at least one time", "none")
    for value in found:
        real = math.isfinite(value) and value >= 0
        require(real, "waiting_time", "times", "finite seconds >= 0", value)
    longest = max(found)
    return math.fsum(longest - value for value in found) / len(found)


class RoundTime(NamedTuple):
    """Duration of a simulated round, the result of :meth:`SimulatedClock.advance`."""

    times: dict[Client, float]  # seconds of each device
    seconds: float  # seconds of the slowest device
    waiting: float  # W, in seconds


@dataclass(eq=False, repr=False)
class SimulatedClock:
    """Clock that simulates the durations of rounds from known speeds of the devices.

    A device needs ``T = f + d mu + beta (down + up) / 2`` seconds. ``up`` is the number of bytes of
    the planned layers. ``down`` is the same number, or with ``send_frozen`` the bytes of all
    layers. d is the number of layers from the lowest planned layer to the output, which the
    backward passes through. If the last k layers are planned, d is k.

    Args:
        speeds: f, mu and beta by device.
        state: Global adapter; only the sizes of its tensors are used.
        pattern: Regular expression for the layer's index in a name.
        send_frozen: Whether devices also receive the layers that they do not train.

    Attributes:
        seconds: Sum of the durations of all rounds so far.

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
        """Return the report that ``device`` would send after a round with ``plan``. Its durations
        in seconds are computed from the device's speeds."""
        f, mu, beta = self.speeds[device][:3]
        up = plan_bytes(self.state, plan, self.pattern)
        whole = LayerPlan(tuple(range(self.L)))
        down = plan_bytes(self.state, whole, self.pattern) if self.send_frozen else up
        reach = self.L - plan.layers[0] if plan.layers else 0
        figures = f + reach * mu, beta * down / 2, up, beta * up / 2
        return CapacityReport(device, len(plan.layers), *figures)

    def advance(self, plans: Mapping[Client, LayerPlan]) -> RoundTime:
        """Simulate a round, in which the devices train in parallel. The round ends when the slowest
        device is finished, and its duration is added to :attr:`seconds`.

        Args:
            plans: Plan of each device.

        Returns:
            Seconds of the round and of each device, and the mean waiting time.
        """
        times: dict[Client, float] = {}
        for device, plan in plans.items():
            report = self.report(device, plan)
            times[device] = report.train_time + report.down_time + (report.up_time or 0.0)
        seconds = max(times.values(), default=0.0)
        self.seconds += seconds
        return RoundTime(times, seconds, waiting_time(times) if times else 0.0)
