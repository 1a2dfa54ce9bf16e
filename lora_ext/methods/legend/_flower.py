"""LEGEND as a strategy of Flower."""

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
    """Flower strategy in which each client trains as many of the last layers as time allows.

    The number of these layers, called the depth, is computed from the durations that each client
    measures and reports (``train-time-s`` and ``down-time-s``). A client that does not reply is
    treated as if it had trained until the timeout. After three consecutive timeouts, a client is
    not selected for ``cooldown`` rounds.

    Args:
        config: Settings of ranks, depths and speeds. With ``total``, the global adapter must have
            the ranks of ``config.ranks(L)``; :func:`lora_ext.methods.legend.resize_state` changes
            its ranks.
        settings: Arguments ``draw``, ``prior``, ``memory``, ``mem``, ``shares`` and ``rank_caps``
            of :class:`lora_ext.methods.legend.LegendAllocator`, and all arguments of
            :class:`LoraStrategy`. ``capability`` is the largest depth of a client.

    Attributes:
        allocator: :class:`LegendAllocator`, or None before the first round.

    Raises:
        ValueError: If a setting is out of range or, in the first round, if the adapter does not
            have the ranks of the config.
        TypeError: If ``config`` has the wrong type.

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
        """Create the allocator from the ranks and sizes of the adapter, if there is none yet."""
        if self.allocator is None:
            self.allocator = LegendAllocator.of(self.config, state, self._pattern, **self._settings)
            if self._restored is not None:
                self.allocator.load_state_dict(self._restored)

    def select(self, round: int, clients: Mapping[Client, int]) -> list[Client]:
        """Select clients as :class:`LoraStrategy` does, except clients that are paused after
        timeouts."""
        tracker = self._allocator.tracker
        awake = {client: k for client, k in clients.items() if not tracker.rests(client, round)}
        return super().select(round, awake)

    def plan_round(self, round: int, clients: Mapping[Client, int]) -> dict[Client, LayerPlan]:
        """Return the allocator's plans for a round. A client that is paused after timeouts has no
        plan."""
        return self._allocator.plan_round(round, clients)

    def observe(
        self, round: int, client: Client, plan: LayerPlan, metrics: Mapping[str, float]
    ) -> None:
        """Update the estimated speeds of a client from the ``metrics`` of its reply."""
        self._allocator.observe(round, client, plan, metrics)

    def timed_out(self, round: int, client: Client, plan: LayerPlan, seconds: float) -> None:
        """Record that a client did not reply for ``seconds``."""
        self._allocator.timed_out(round, client, plan, seconds)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as :class:`LoraStrategy` does. If no round has run since
        :meth:`load_state_dict`, the allocator's part is the part that was loaded."""
        found = super().state_dict()
        if self.allocator is None and self._restored is not None:
            found["allocator"] = dict(self._restored)
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state returned by :meth:`state_dict`, possibly stored as JSON in between. The
        allocator is created in the next round, since it depends on the adapter."""
        rest = dict(state)
        self._restored = rest.pop("allocator", None)
        super().load_state_dict(rest)
        self.allocator = None

    @property
    def _allocator(self) -> LegendAllocator:
        if self.allocator is None:
            raise ValueError("Legend: allocator: expected before_round to run first, found None")
        return self.allocator
