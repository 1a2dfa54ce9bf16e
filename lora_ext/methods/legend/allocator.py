"""Server side of LEGEND, independent of Flower: it computes plans from the devices' reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lora_ext._checks import require
from lora_ext.federated import PATTERN, Client, LayerPlan, layer_pairs

from ._capacity import CapacityReport, CapacityTracker, Estimate
from .config import LegendConfig
from .configurator import Configuration, LegendConfigurator
from .ranks import layer_bytes

#: ``draw(count, round, client)`` returns the ``count`` layers that a client trains.
Draw = Callable[[int, int, Client], Sequence[int]]

WHERE = "LegendAllocator"
#: Fields of the config that are passed to the tracker or the configurator under the same names.
_OF_TRACKER = ("rho", "forgetting", "cooldown")
_OF_DEPTHS = ("mode", "k_min", "k_max", "byte_budget", "max_step", "cover_every", "eps", "deadline")


class LegendAllocator:
    """Planner of rounds that estimates the speed of each device from its reports.

    If ``config.warmup`` is "probe", a new device is probed: it trains all layers in its first round
    and half of them in its second. A device that is not trusted, since its latest reports were
    invalid, trains only ``k_min`` layers. A device that is paused after timeouts has no plan.

    Args:
        config: Settings. ``total`` and ``shape`` determine the ranks, unless ``ranks`` is given.
        bytes_per_layer: Bytes of each layer's factors in one direction, see :func:`layer_bytes`.
        ranks: Rank of each layer.
        draw: With ``depth_as_count``, function ``draw(count, round, client)`` that returns the
            layers to train, for example with Fed-HeLLo's ``rgd_layers``.
        prior: Known f, mu and beta by device, see :class:`Estimate`.
        memory, mem, shares, rank_caps: As in :class:`LegendConfigurator`.

    Attributes:
        tracker: :class:`CapacityTracker` that estimates the speeds.
        configurator: :class:`LegendConfigurator` that chooses the depths.
        L: Number of layers.
        ranks: Rank of each layer.
        last: Latest :class:`Configuration`, without the devices that were probed.

    Raises:
        ValueError: If ``draw`` or ``prior`` does not match ``config``, or another setting is
            invalid.

    Source: LEGEND (arXiv 2412.20004); probes and exploration are our choice.
    """

    def __init__(
        self,
        config: LegendConfig,
        bytes_per_layer: Sequence[float],
        *,
        ranks: Sequence[int] | None = None,
        draw: Draw | None = None,
        prior: Mapping[Client, Estimate] | None = None,
        memory: Mapping[Client, float] | None = None,
        mem: Callable[[int], float] | None = None,
        shares: Mapping[Client, float] | None = None,
        rank_caps: Mapping[Client, int] | None = None,
    ):
        self.config = config
        self.L = len(bytes_per_layer)
        self.ranks = tuple(ranks) if ranks is not None else config.ranks(self.L)
        fits = config.depth_as_count == (draw is not None)
        expected = "a function" if config.depth_as_count else "None"
        expected += f" with depth_as_count={config.depth_as_count}"
        require(fits, WHERE, "draw", expected, draw)
        known = config.warmup == "probe" or bool(prior)
        require(known, WHERE, "prior", "speeds of the devices for warmup 'prior'", prior)
        self.draw = draw
        speeds: Any = {name: getattr(config, name) for name in _OF_TRACKER}
        self.tracker = CapacityTracker(self.L, prior=prior, **speeds)
        settings: Any = {name: getattr(config, name) for name in _OF_DEPTHS}
        settings |= {"memory": memory, "mem": mem, "shares": shares, "rank_caps": rank_caps}
        self.configurator = LegendConfigurator(
            self.L, bytes_per_layer, ranks=self.ranks, **settings
        )
        self.last: Configuration | None = None
        self._depths: dict[Client, int] = {}  # latest depths of trusted devices without a timeout
        self._probes: Counter[Client] = Counter()

    @classmethod
    def of(
        cls,
        config: LegendConfig,
        state: Mapping[str, Tensor],
        pattern: str = PATTERN,
        **settings: Any,
    ) -> LegendAllocator:
        """Create an allocator for a global adapter.

        Args:
            config: Settings. If ``total`` is given, the adapter must have the ranks of the config.
            state: Tensors of the adapter under PEFT's names.
            pattern: Regular expression for the layer's index in a name.
            settings: Further keyword arguments of the class.

        Raises:
            ValueError: If modules of one layer have different ranks; if the ranks are not those of
                the config; or if the class or :func:`layer_bytes` raises it.
        """
        ranks: dict[int, int] = {}
        for pair in layer_pairs(f"{WHERE}: state", state, pattern):
            rank = state[pair.a].shape[0]
            first = ranks.setdefault(pair.layer, rank)
            require(rank == first, WHERE, pair.module, f"rank {first}, its layer's rank", rank)
        found = tuple(ranks[layer] for layer in sorted(ranks))
        sizes = layer_bytes(state, found, pattern)
        if config.total is not None:
            wanted = config.ranks(len(sizes))
            require(found == wanted, WHERE, "state", f"ranks {wanted} (use resize_state)", found)
        return cls(config, sizes, ranks=found, **settings)

    def plan(self, round: int, client: Client, capability: int) -> LayerPlan:
        """Return the plan of a device that is the only one in its round.

        Args:
            round: Number of the round, from 1.
            client: Name of the device.
            capability: Largest depth of the device.

        Returns:
            Plan of the layers to train, with their ranks; it has no layers if the device is paused
            after timeouts.

        Raises:
            ValueError: As for :meth:`plan_round`.
        """
        return self.plan_round(round, {client: capability}).get(client, LayerPlan(()))

    def plan_round(self, round: int, clients: Mapping[Client, int]) -> dict[Client, LayerPlan]:
        """Return the plans of a round by client; a client that is paused after timeouts has no
        plan.

        Args:
            round: Number of the round, from 1.
            clients: Largest depth of each selected client.

        Raises:
            ValueError: If ``warmup`` is "prior" and a client has no speeds; if the largest depth or
                the memory of a client does not allow ``k_min``; or if
                :meth:`LegendConfigurator.configure` raises it.
        """
        tracker, config = self.tracker, self.config
        awake = {c: limit for c, limit in clients.items() if not tracker.rests(c, round)}
        new: list[Client] = []  # not a set: the saved state depends on the order
        for c in awake:
            if config.warmup == "prior":
                require(c in tracker, WHERE, "prior", f"the speeds of device {c!r}", "none")
            elif c not in tracker or self._probes[c] < 2:
                new.append(c)
        depths = {c: self._probe(c, awake[c]) for c in new}
        known = {c: limit for c, limit in awake.items() if c not in depths}
        chosen = self._configured(round, known) if known else {}
        self._probes.update(new)
        self._depths |= chosen
        for c, depth in chosen.items():
            # After `explore_every` reports of equal depth, the device trains one more layer for one
            # round.
            repeated = tracker.repeats(c, depth) >= config.explore_every
            free = config.byte_budget is None and tracker.trusted(c)
            more = repeated and free and depth < self.configurator.deepest(c, known[c])
            depths[c] = depth + int(more)
        return {c: self._plan(round, c, depths[c]) for c in awake}

    def observe(
        self, round: int, client: Client, plan: LayerPlan, metrics: Mapping[str, float]
    ) -> None:
        """Update the estimates from a client's report on a round.

        Args:
            round: Number of the round; not used.
            client: Name of the client.
            plan: Plan of the client in this round.
            metrics: ``train-time-s``, ``down-time-s``, ``bytes`` of the planned layers, and
                optionally ``up-time-s``. Reports with missing or impossible values are ignored and
                counted.

        Raises:
            ValueError: If the plan has no layers.
        """
        names = ("train-time-s", "down-time-s", "bytes")
        figures = [metrics.get(name, math.nan) for name in names]
        up = metrics.get("up-time-s")
        self.tracker.update(CapacityReport(client, self._reach(plan), *figures, up_time=up))
        if not self.tracker.trusted(client):
            self._depths.pop(client, None)

    def timed_out(self, round: int, client: Client, plan: LayerPlan, seconds: float) -> None:
        """Record that a client did not reply, see :meth:`CapacityTracker.update_timeout`.

        Args:
            round: Number of the round.
            client: Name of the client.
            plan: Plan of the client in this round.
            seconds: Time that the server waited.

        Raises:
            ValueError: If the plan has no layers, or :meth:`CapacityTracker.update_timeout` raises
                it.
        """
        self.tracker.update_timeout(client, self._reach(plan), seconds, round)
        self._depths.pop(client, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a restarted server needs, as a dictionary that JSON can store."""
        return {
            "tracker": self.tracker.state_dict(),
            "depths": [list(entry) for entry in self._depths.items()],
            "probes": [list(entry) for entry in self._probes.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state returned by :meth:`state_dict`, possibly stored as JSON in between.

        Raises:
            KeyError, TypeError: If the state has the wrong form. Nothing is changed in this case.
        """
        depths, probes = dict(state["depths"]), Counter(dict(state["probes"]))
        self.tracker.load_state_dict(state["tracker"])
        self._depths, self._probes = depths, probes

    def _probe(self, client: Client, limit: int) -> int:
        """Return the depth of a new device: all layers in its first round, then half of them, or
        the smallest depth if the device is not trusted."""
        least = self.config.k_min
        most = self.configurator.deepest(client, limit)  # raises if the device cannot take part
        if not self.tracker.trusted(client):
            return least
        wanted = self.L if self._probes[client] % 2 == 0 else -(-self.L // 2)
        return max(least, min(wanted, most))

    def _configured(self, round: int, limits: Mapping[Client, int]) -> dict[Client, int]:
        anew = (round - 1) % self.config.every == 0
        kept = {} if anew else {c: k for c, k in self._depths.items() if c in limits}
        kept = {c: min(k, self.configurator.deepest(c, limits[c])) for c, k in kept.items()}
        if len(kept) == len(limits):
            return kept
        estimates = {client: self.tracker.estimate(client) for client in limits}
        self.last = self.configurator.configure(estimates, limits, self._depths, round, limits)
        return {**self.last.depths, **kept}

    def _plan(self, round: int, client: Client, depth: int) -> LayerPlan:
        if self.draw is None:
            return self.configurator.plan(client, depth)
        layers = tuple(sorted(self.draw(depth, round, client)))
        ranks = self.configurator.ranks_of(client)
        return LayerPlan(layers, tuple(ranks[layer] for layer in layers))

    def _reach(self, plan: LayerPlan) -> int:
        """Return the number of layers that the backward pass runs through, from the output to the
        lowest planned layer."""
        require(bool(plan.layers), WHERE, "plan", "at least one layer", "none: device is paused")
        return self.L - plan.layers[0]
