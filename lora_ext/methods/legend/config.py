"""Settings of LEGEND, with the symbols of the specification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_ext._checks import check_fields, require, within

from .configurator import Mode
from .ranks import Shape, rank_distribution

Warmup = Literal["probe", "prior"]


@dataclass(frozen=True)
class LegendConfig:
    """Settings of LEGEND: the distribution of ranks, the choice of depths, and the estimates of
    devices.

    Attributes:
        total: Sum of the ranks r_l; None keeps the ranks of the global adapter.
        step, shape, r_min, r_max, multiple: As in :func:`rank_distribution`; step is lambda.
        mode, k_min, k_max, max_step, cover_every, byte_budget, deadline, eps: As in
            :class:`LegendConfigurator`.
        every: Number of rounds after which depths are chosen again.
        rho, forgetting: As in :class:`CapacityTracker`.
        cooldown: Number of rounds for which a device rests after three timeouts in a row.
        warmup: First estimates of devices. "probe": each trains all layers once, and half of them
            the next time; "prior": their speeds are given.
        explore_every: A device that trained the same depth this many times in a row tries the next
            one once, since one depth alone cannot separate f from mu.
        send_frozen: Whether a device also gets, and applies, the layers that it does not train.
        depth_as_count: Whether k only counts the layers that a device trains, which a drawing
            function then chooses; they need not be the last ones.

    Raises:
        ValueError: If a field is out of range. Limits that depend on the number of layers are
            checked once that is known.

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
        counts = ("total", "r_max", "k_max", "r_min", "multiple", "k_min", "max_step")
        counts += ("cover_every", "every", "cooldown", "explore_every")
        rises = f"a number from 0 with shape {self.shape!r}"
        table = {
            **dict.fromkeys(counts, within(1)),
            "byte_budget": within(above=0),
            "deadline": within(above=0),
            "step": {"expected": rises},
            "eps": within(0),
            "rho": within(0, below=1),
            "forgetting": within(above=0, maximum=1),
        }
        check_fields(self, table)
        for holds, name, expected in (
            (self.r_max is None or self.r_max >= self.r_min, "r_max", f"at least {self.r_min}"),
            (self.k_max is None or self.k_max >= self.k_min, "k_max", f"at least {self.k_min}"),
            (self.step >= 0 or self.shape in ("uniform", "geometric"), "step", rises),
        ):
            require(holds, "LegendConfig", name, expected, getattr(self, name))

    def ranks(self, L: int) -> tuple[int, ...]:
        """Return the ranks of L layers, :func:`rank_distribution` of ``total``.

        Raises:
            ValueError: If ``total`` is None; or as the function.
        """
        if self.total is None:
            raise ValueError("LegendConfig: total: expected a sum of ranks, found None")
        bounds = {"step": self.step, "r_min": self.r_min, "r_max": self.r_max}
        return rank_distribution(L, self.total, shape=self.shape, multiple=self.multiple, **bounds)
