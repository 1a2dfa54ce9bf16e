"""Logs of the traffic and of the rounds of a federation, convertible to JSON."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from lora_ext._checks import integer, require

from ._aggregation import Aggregate
from ._plan import LayerPlan
from ._update import Client


class CommRow(NamedTuple):
    """The bytes of one client in one round: ``up`` were sent, ``down`` were received."""

    round: int
    client: Client
    up: int = 0
    down: int = 0
    frames: int = 0  # headers, names and settings, in up and down together
    full: int = 0  # up and down if all layers were sent


class CommLog:
    """Bytes by round and client, as counted in messages.

    Records of the same round and client are added, since messages in both directions are counted
    separately.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[int, Client], CommRow] = {}

    @property
    def rows(self) -> list[CommRow]:
        """Rows of the log, one per round and client, in the order of their first record."""
        return list(self._rows.values())

    def record(
        self,
        round: int,
        client: Client,
        *,
        up: int = 0,
        down: int = 0,
        frames: int = 0,
        full: int = 0,
    ) -> None:
        """Add bytes to those of a round and client.

        Args:
            round, client: key of the row.
            up, down: bytes that the client sent and received.
            frames: part of both that is not tensor data.
            full: up and down if all layers were sent.

        Raises:
            ValueError: If a number is below 0.
            TypeError: If a number is not an int.
        """
        row = self._rows.get((round, client), CommRow(round, client))
        more = {"up": up, "down": down, "frames": frames, "full": full}
        for name, value in more.items():
            integer("CommLog.record", name, value, 0, expected=("an int", "bytes from 0"))
        sums = {name: getattr(row, name) + value for name, value in more.items()}
        self._rows[round, client] = row._replace(**sums)

    def total(self, name: str = "up", round: int | None = None) -> int:
        """Sum one column, in bytes.

        Args:
            name: "up", "down", "frames" or "full".
            round: only this round; None is all of them.

        Raises:
            ValueError: If ``name`` is unknown.
        """
        require(name in CommRow._fields[2:], "CommLog.total", "name", CommRow._fields[2:], name)
        return sum(getattr(r, name) for r in self.rows if round is None or r.round == round)

    def cumulative(self, name: str = "up") -> dict[int, int]:
        """Return, by round, the sum of one column up to and including that round. ``name`` is that
        of :meth:`total`."""
        rounds = sorted({row.round for row in self.rows})
        totals = itertools.accumulate(self.total(name, round) for round in rounds)
        return dict(zip(rounds, totals, strict=True))

    @property
    def share(self) -> float:
        """Ratio of the bytes sent to those of all layers for the same clients; 0 if empty."""
        full = self.total("full")
        return (self.total("up") + self.total("down")) / full if full else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return lists and numbers, for JSON."""
        return {"rows": [list(row) for row in self.rows]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the rows by those of :meth:`state_dict`.

        Raises:
            ValueError, TypeError: If rows are invalid; the log has not changed.
        """
        fresh = CommLog()
        for row in state["rows"]:
            require(len(row) == 6, "CommLog.load_state_dict", "rows", "six entries", row)
            round, client, *counts = row
            fresh.record(round, client, **dict(zip(CommRow._fields[2:], counts, strict=True)))
        self._rows = fresh._rows


@dataclass(frozen=True)
class RoundLog:
    """The outcome of one round.

    Attributes:
        round: its number.
        plans: the plan sent to each client.
        accepted, rejected, clipped, uncovered, noise, skipped, reason: see :class:`Aggregate`.
        heights: for each layer, the number of accepted clients that trained it.
    """

    round: int
    plans: Mapping[Client, LayerPlan]
    accepted: tuple[Client, ...] = ()
    rejected: Mapping[Client, str] = field(default_factory=dict)
    clipped: Mapping[Client, float] = field(default_factory=dict)
    heights: tuple[int, ...] = ()
    uncovered: tuple[int, ...] = ()
    noise: Mapping[int, float] = field(default_factory=dict)
    skipped: bool = False
    reason: str = ""

    @classmethod
    def of(
        cls, round: int, plans: Mapping[Client, LayerPlan], result: Aggregate, num_layers: int
    ) -> RoundLog:
        """Create the entry of a round.

        Args:
            plans: of all clients that received one.
            num_layers: L.
        """
        trained = [plans[client].layers for client in result.accepted]
        heights = tuple(sum(i in layers for layers in trained) for i in range(num_layers))
        names = ("accepted", "rejected", "clipped", "uncovered", "noise", "skipped", "reason")
        own = {name: copy.copy(getattr(result, name)) for name in names}
        return cls(round, dict(plans), heights=heights, **own)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON; mappings become pairs, since JSON has no numeric keys."""
        found = asdict(self)
        found["plans"] = [[client, plan.to_config()] for client, plan in self.plans.items()]
        for name in ("rejected", "clipped", "noise"):
            found[name] = [list(entry) for entry in getattr(self, name).items()]
        for name in ("accepted", "heights", "uncovered"):
            found[name] = list(found[name])
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoundLog:
        """Read the output of :meth:`to_dict`, with or without conversion to JSON."""
        read: dict[str, Any] = dict(values)
        read["plans"] = {client: LayerPlan.from_config(plan) for client, plan in values["plans"]}
        for name in ("rejected", "clipped", "noise"):
            read[name] = {key: value for key, value in values[name]}
        for name in ("accepted", "heights", "uncovered"):
            read[name] = tuple(values[name])
        return cls(**read)
