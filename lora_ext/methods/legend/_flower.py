"""LEGEND on Flower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_ext._checks import instance
from lora_ext.federated import PATTERN, Client, LayerPlan
from lora_ext.federated.flower import LoraStrategy

from . import LegendAllocator, LegendConfig

_OF_ALLOCATOR = ("draw", "prior", "memory", "mem", "shares", "rank_caps")


class Legend(LoraStrategy):
    """Each client trains as many of the last layers as it can in the time of the others.

    What clients report of their times (``train-time-s`` and ``down-time-s``) decides; every
    duration is measured by one clock, the client's. A client that has not answered counts as if it
    had taken the whole timeout; after three in a row it is not asked for ``cooldown`` rounds.

    Args:
        config: how ranks, depths and speeds are chosen. With ``total``, the global adapter has the
            ranks of ``config.ranks(L)``; :func:`lora_ext.methods.legend.resize_state` gives them.
        settings: ``draw``, ``prior``, ``memory``, ``mem``, ``shares`` and ``rank_caps`` of
            :class:`lora_ext.methods.legend.LegendAllocator`; all others are
            :class:`LoraStrategy`'s. ``capability`` is the largest depth of a client.

    Attributes:
        allocator: the :class:`LegendAllocator`, once the first round has begun.

    Raises:
        ValueError: settings out of range; when the first round begins, an adapter that does not
            fit the config. TypeError: another kind of config.

    Source: LEGEND (arXiv 2412.20004).
    """

    allocator: LegendAllocator | None

    def __init__(self, config: LegendConfig | None = None, **settings: Any):
        self.config = LegendConfig() if config is None else config
        instance("Legend", "config", self.config, LegendConfig)
        self._settings = {name: settings.pop(name) for name in _OF_ALLOCATOR if name in settings}
        self._pattern: str = settings.get("pattern", PATTERN)
        self._restored: Mapping[str, Any] | None = None
        settings.setdefault("send_frozen", self.config.send_frozen)
        super().__init__(**settings)

    def before_round(self, round: int, state: Mapping[str, Tensor]) -> None:
        """Make the allocator before the first round, from the ranks and bytes of the adapter."""
        if self.allocator is None:
            self.allocator = LegendAllocator.of(self.config, state, self._pattern, **self._settings)
            if self._restored is not None:
                self.allocator.load_state_dict(self._restored)

    def select(self, round: int, clients: Mapping[Client, int]) -> list[Client]:
        """Draw the clients of a round from those that do not rest after a timeout."""
        tracker = self._allocator.tracker
        awake = {client: k for client, k in clients.items() if not tracker.rests(client, round)}
        return super().select(round, awake)

    def plan_round(self, round: int, clients: Mapping[Client, int]) -> dict[Client, LayerPlan]:
        """Plan a round as the allocator does; a client that rests has no plan."""
        plans = self._allocator.plan_round(round, clients)
        return {client: plans[client] for client in clients if client in plans}

    def observe(
        self, round: int, client: Client, plan: LayerPlan, metrics: Mapping[str, float]
    ) -> None:
        """Let the allocator learn a client's speeds from the ``metrics`` of its reply."""
        self._allocator.observe(round, client, plan, metrics)

    def timed_out(self, round: int, client: Client, plan: LayerPlan, seconds: float) -> None:
        """Let the allocator learn that a client has kept silent for ``seconds``."""
        self._allocator.timed_out(round, client, plan, seconds)

    def state_dict(self) -> dict[str, Any]:
        """As :class:`LoraStrategy` gives it; also between a restart and its first round."""
        found = super().state_dict()
        if self.allocator is None and self._restored is not None:
            found["allocator"] = dict(self._restored)
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave, be it read back from JSON. The allocator is
        made anew in the next round, since it belongs to an adapter."""
        rest = dict(state)
        self._restored = rest.pop("allocator", None)
        super().load_state_dict(rest)
        self.allocator = None

    @property
    def _allocator(self) -> LegendAllocator:
        if self.allocator is None:
            raise ValueError("Legend: allocator: expected before_round to come first, found None")
        return self.allocator
