"""HLA, heterogeneous layer allocation: the choice of each client's layers in every round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import integer, require
from lora_ext.federated import LayerPlan

from ._patterns import (
    Pattern,
    Weights,
    checked_weights,
    cluster_weights,
    gd_layers,
    normalised,
    pattern_weights,
    rgd_layers,
)
from .config import FedHelloConfig, Kind


class HLA:
    """Allocation that gives each client as many layers as it can train.

    Layers are chosen by position ("gd"), at random ("rgd"), or by importance ("fim"). A plan lists
    the layers that a client trains in a round. The plan depends only on the settings, the seed, the
    round, the client, its capability, and the importance passed to :meth:`update` up to that round.
    The plan does not depend on other clients or on the order of calls.

    Args:
        pattern: P, a :class:`Pattern` or its name. To pass a configuration instead, use :meth:`of`.
        L: Number of layers.
        kind: "gd", "rgd" or "fim".
        seed, weights, prior_rounds, every, hold, mix, k, levels: As in :class:`FedHelloConfig`.

    Attributes:
        config: :class:`FedHelloConfig` with the settings.
        L: Number of layers.

    Raises:
        ValueError: If L is below 1, the number of weights is not L, or :class:`FedHelloConfig`
            raises it.
        TypeError: If L is not an integer, or :class:`FedHelloConfig` raises it.

    Source: arXiv 2506.12213, GD-HLA, RGD-HLA and FIM-HLA.
    """

    def __init__(
        self,
        pattern: Pattern | str,
        L: int,
        *,
        kind: Kind = "gd",
        seed: int = 0,
        weights: Weights | None = None,
        prior_rounds: int = 50,
        every: int = 50,
        hold: bool = True,
        mix: float = 1.0,
        k: int = 3,
        levels: Sequence[float] = (1, 2, 3),
    ):
        given = None if weights is None else tuple(checked_weights("HLA", weights).tolist())
        config = FedHelloConfig(
            pattern, kind, seed, given, prior_rounds, every, hold, mix, k, tuple(levels)
        )
        self._set(config, L)

    @classmethod
    def of(cls, config: FedHelloConfig, L: int) -> HLA:
        """Return the allocation with the settings of ``config`` for a model of L layers."""
        found = cls.__new__(cls)  # __init__ accepts separate settings instead of a config
        found._set(config, L)
        return found

    def _set(self, config: FedHelloConfig, L: int) -> None:
        self.L = integer("HLA", "L", L, 1)
        self.config = config
        if config.weights is None:
            self._prior = pattern_weights(config.pattern, L)
        else:
            self._prior = normalised(checked_weights("HLA", config.weights, L))
        self._importance: dict[int, Tensor] = {}  # weights, by the first round that uses them

    def weights(self, round: int) -> Tensor:
        """Return g, the weight of each layer in a round, ``(L,)`` float64 with sum 1. The weights
        can differ between rounds only with "fim".

        Raises:
            ValueError: If the round is negative.
            TypeError: If the round is not an integer.
        """
        round = integer("HLA", "round", round, 0)
        known = [r for r in self._importance if (r <= round if self.config.hold else r == round)]
        if self.config.kind != "fim" or round < self.config.prior_rounds or not known:
            return self._prior.clone()
        mix = self.config.mix
        return mix * self._importance[max(known)] + (1 - mix) * self._prior

    def wants_scores(self, round: int) -> bool:
        """Return whether :meth:`update` should be called with new scores before the plans of a
        round are made.

        Raises:
            ValueError: If the round is negative.
            TypeError: If the round is not an integer.
        """
        round = integer("HLA", "round", round, 0)
        config = self.config
        due = round >= config.prior_rounds and round % config.every == 0
        return config.kind == "fim" and due

    def update(self, round: int, scores: Tensor | Sequence[float]) -> None:
        """Set the importance of all layers for a round, and with ``hold`` also for later rounds.

        Args:
            round: First round whose plans use the scores.
            scores: F of :func:`fim_scores`, ``(L,)``.

        Raises:
            ValueError: If the number of scores is not L, a score is not finite, or the round is
                negative. Nothing is changed in this case.
            TypeError: If the round is not an integer. Nothing is changed in this case.
        """
        round = integer("HLA.update", "round", round, 0)
        values = torch.as_tensor(scores, dtype=torch.float64)
        fits = values.shape == (self.L,)
        require(fits, "HLA.update", "scores", f"shape ({self.L},)", list(values.shape))
        self._importance[round] = cluster_weights(values, self.config.k, self.config.levels)

    def plan(self, round: int, client: int | str, capability: int) -> LayerPlan:
        """Return the plan of a client for a round.

        Args:
            round: Number of the round, from 0.
            client: Number or name of the client.
            capability: c, number of layers that the client can train. If c is 0, the plan is empty
                and the client must not be selected.

        Raises:
            ValueError: If the round is negative, the capability is outside ``[0, L]``, or fewer
                than c layers have a weight above 0.
            TypeError: If the round or the capability is not an integer.
        """
        c = integer("HLA.plan", f"capability of client {client!r}", capability, 0, self.L)
        weights = self.weights(round)
        if self.config.kind == "gd":
            return LayerPlan(self._fixed(c))
        return LayerPlan(rgd_layers(weights, c, seed=self.config.seed, round=round, client=client))

    def uncovered(self, capabilities: Iterable[int]) -> tuple[int, ...]:
        """Return the layers that no client with one of these capabilities ever trains.

        Raises:
            ValueError: If a capability is outside ``[0, L]``.
            TypeError: If a capability is not an integer.
        """
        classes = {integer("HLA.uncovered", "capabilities", c, 0, self.L) for c in capabilities}
        if self.config.kind == "gd":
            found = {layer for c in classes for layer in self._fixed(c)}
        elif not any(classes):
            found = set[int]()
        else:
            every = self.config.kind == "fim" and self.config.mix > 0
            found = {i for i, g in enumerate(self._prior.tolist()) if g > 0 or every}
        return tuple(layer for layer in range(self.L) if layer not in found)

    def _fixed(self, c: int) -> tuple[int, ...]:
        if self.config.weights is None:
            return gd_layers(self.config.pattern, self.L, c)
        g = self._prior.tolist()
        require(sum(w > 0 for w in g) >= c, "HLA.plan", "weights", f"{c} weights above 0", g)
        return tuple(sorted(sorted(range(self.L), key=lambda layer: -g[layer])[:c]))

    def __repr__(self) -> str:
        weights = ", ".join(f"{g:.3f}" for g in self._prior.tolist())
        shape = self.config.pattern if self.config.weights is None else "given weights"
        return f"HLA({self.config.kind}, {shape}, {self.L} layers of weights {weights})"

    def state_dict(self) -> dict[str, Any]:
        """Return all values that plans depend on, as a dictionary that JSON can store."""
        importance = [[round, g.tolist()] for round, g in self._importance.items()]
        config = asdict(self.config) | {"pattern": str(self.config.pattern)}
        return {"L": self.L, "config": config, "importance": importance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state returned by :meth:`state_dict`, including the settings. Later plans equal
        those of the object that returned the state.

        Raises:
            ValueError: If the number of layers is not ``L``, or settings or weights are
                invalid. Nothing is changed in this case.
            KeyError: If an entry is missing.
        """
        where = "HLA.load_state_dict"
        require(state["L"] == self.L, where, "L", self.L, state["L"])
        fresh = HLA.of(FedHelloConfig(**state["config"]), self.L)
        for round, weights in state["importance"]:
            g = checked_weights(where, weights, self.L)
            fresh._importance[integer(where, "round", round, 0)] = g
        self.__dict__.update(fresh.__dict__)  # `self` changes only here, after all checks
