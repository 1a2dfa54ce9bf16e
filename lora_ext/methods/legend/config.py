"""Settings of LEGEND."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_ext._checks import check_fields, require, within

from . import _capacity, configurator
from .configurator import Mode
from .ranks import Shape, rank_distribution

Warmup = Literal["probe", "prior"]


@dataclass(frozen=True)
class LegendConfig:
    """Settings of LEGEND: the ranks of the layers, the choice of depths, and the estimation of the
    devices' speeds.

    The depth k of a device is the number of layers that the device trains. The training time is
    estimated as ``f + k mu`` seconds.

    Attributes:
        total: Sum of the ranks of all layers; None keeps the ranks of the global adapter.
        step, shape, r_min, r_max, multiple: As in :func:`rank_distribution`; step is lambda.
        mode, k_min, k_max, max_step, cover_every, byte_budget, deadline, eps: As in
            :class:`LegendConfigurator`.
        every: Interval in rounds between two choices of the depths.
        rho, forgetting: As in :class:`CapacityTracker`.
        cooldown: Number of rounds for which a device is not selected after three consecutive
            timeouts.
        warmup: Source of the first estimates. "probe": the device's reports on its first two
            rounds, in which it trains all layers and half of them; "prior": the caller.
        explore_every: Number of consecutive reports of equal depth after which a device trains one
            more layer for one round, since reports of only one depth cannot separate f from mu.
        send_frozen: Whether a device also receives, and applies, the layers that it does not train.
        depth_as_count: Whether a function passed by the caller chooses the k layers that a device
            trains. If False, a device trains the last k layers.

    Raises:
        ValueError: If a field is out of range. Limits that depend on the number of layers are
            checked when this number is known.

    Source: LEGEND (arXiv 2412.20004).
    """

    total: int | None = None
    step: float = 1.0
    shape: Shape = "arithmetic"
    r_min: int = 1
    r_max: int | None = None
    multiple: int = 1
    mode: Mode = "fastest"
    k_min: int = 1
    k_max: int | None = None
    max_step: int = 3
    cover_every: int = 5
    byte_budget: float | None = None
    deadline: float | None = None
    eps: float = 0.0
    every: int = 1
    rho: float = 0.8
    forgetting: float = 0.9
    cooldown: int = 5
    warmup: Warmup = "probe"
    explore_every: int = 10
    send_frozen: bool = False
    depth_as_count: bool = False

    def __post_init__(self) -> None:
        counts = ("total", "r_max", "k_max", "r_min", "multiple", "k_min", "every", "explore_every")
        rises = f"a number from 0 with shape {self.shape!r}"
        table = {
            **_capacity.BOUNDS,
            **configurator.BOUNDS,
            **dict.fromkeys(counts, within(1)),
            "step": {"expected": rises},
        }
        check_fields(self, table)
        for holds, name, expected in (
            (self.r_max is None or self.r_max >= self.r_min, "r_max", f">= r_min = {self.r_min}"),
            (self.k_max is None or self.k_max >= self.k_min, "k_max", f">= k_min = {self.k_min}"),
            (self.step >= 0 or self.shape in ("uniform", "geometric"), "step", rises),
        ):
            require(holds, "LegendConfig", name, expected, getattr(self, name))

    def ranks(self, L: int) -> tuple[int, ...]:
        """Return the ranks of L layers with the sum ``total``, see :func:`rank_distribution`.

        Raises:
            ValueError: If ``total`` is None, or if :func:`rank_distribution` raises it.
        """
        if self.total is None:
            raise ValueError("LegendConfig: total: expected a sum of ranks, found None")
        bounds = {"step": self.step, "r_min": self.r_min, "r_max": self.r_max}
        return rank_distribution(L, self.total, shape=self.shape, multiple=self.multiple, **bounds)
