"""Settings of LEGEND, under the specification's symbols."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from .configurator import Mode
from .ranks import Shape, rank_distribution

Warmup = Literal["probe", "prior"]


@dataclass(frozen=True)
class LegendConfig:
    """How ranks are spread, how depths are chosen, and how devices are estimated.

    Attributes:
        total: the sum of the ranks r_l; None takes those that the global adapter has.
        step, shape, r_min, r_max, multiple: of :func:`rank_distribution`; step is lambda.
        mode, k_min, k_max, max_step, cover_every, byte_budget, deadline, eps: of
            :class:`LegendConfigurator`.
        every: depths are chosen anew every so many rounds.
        rho, forgetting: of :class:`CapacityTracker`. cooldown: for how many rounds a device rests
            after three timeouts in a row.
        warmup: how devices are estimated at first. "probe" lets each train all layers once, and
            half of them the next time; "prior" wants speeds that are given.
        explore_every: a device that trained the same depth so many times in a row tries the next
            one once, as one depth alone does not tell f from mu.
        send_frozen: whether a device also gets, and applies, the layers that it does not train.
        depth_as_count: k is the number of layers that a device trains, of which a drawing function
            says which; they need not be the last ones then.

    Raises:
        ValueError: a value out of range, naming the field. What depends on the number of layers is
            checked where that is known.

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
        for name, options in (("shape", Shape), ("mode", Mode), ("warmup", Warmup)):
            allowed = get_args(options)
            self._check(name, getattr(self, name) in allowed, f"one of {allowed}")
        optional = ("total", "r_max", "k_max", "byte_budget", "deadline")
        whole = ("total", "r_max", "k_max", "r_min", "multiple", "k_min", "max_step")
        for name in (*whole, "cover_every", "every", "cooldown", "explore_every"):
            value = getattr(self, name)
            fits = type(value) is int and value >= 1
            self._check(name, fits or (value is None and name in optional), "an integer from 1")
        for name in ("byte_budget", "deadline"):
            value = getattr(self, name)
            self._check(
                name, value is None or (_is_number(value) and value > 0), "a number above 0"
            )
        self._check("r_max", self.r_max is None or self.r_max >= self.r_min, "at least r_min")
        self._check("k_max", self.k_max is None or self.k_max >= self.k_min, "at least k_min")
        rises = _is_number(self.step) and (self.step >= 0 or self.shape in ("uniform", "geometric"))
        self._check("step", rises, f"a number from 0 with shape {self.shape!r}")
        self._check("eps", _is_number(self.eps) and self.eps >= 0, "a number from 0")
        self._check("rho", _is_number(self.rho) and 0 <= self.rho < 1, "a number in [0, 1)")
        inside = _is_number(self.forgetting) and 0 < self.forgetting <= 1
        self._check("forgetting", inside, "a number in (0, 1]")
        for name in ("send_frozen", "depth_as_count"):
            self._check(name, isinstance(getattr(self, name), bool), "True or False")

    def ranks(self, L: int) -> tuple[int, ...]:
        """The ranks of L layers, :func:`rank_distribution` of ``total``.

        Raises:
            ValueError: there is no ``total``; what the function refuses.
        """
        if self.total is None:
            raise ValueError("LegendConfig: total: expected a sum of ranks, found None")
        bounds = {"step": self.step, "r_min": self.r_min, "r_max": self.r_max}
        return rank_distribution(L, self.total, shape=self.shape, multiple=self.multiple, **bounds)

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"LegendConfig: {name}: expected {expected}, found {getattr(self, name)!r}"
            )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # pyright: ignore[reportArgumentType]
