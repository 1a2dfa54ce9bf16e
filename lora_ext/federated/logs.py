"""Logs of a federation's traffic and rounds, which can be converted to JSON."""

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
    """Bytes that one client sent and received in one round."""

    round: int
    client: Client
    up: int = 0  # sent by the client
    down: int = 0  # received by the client
    frames: int = 0  # part of up + down that is not tensor data: headers, names and settings
    full: int = 0  # value of up + down if the messages contained all layers


class CommLog:
    """Log of the bytes in messages, by round and client.

    You can record bytes of the same round and client repeatedly, such as once per direction. The
    log contains their sum.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[int, Client], CommRow] = {}

    @property
    def rows(self) -> list[CommRow]:
        """Rows of the log, one per round and client, in the order of their first records."""
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
        """Add numbers of bytes to the row of a round and client.

        Args:
            round, client: key of the row.
            up: bytes that the client sent.
            down: bytes that the client received.
            frames: part of ``up + down`` that is not tensor data.
            full: value that ``up + down`` would have if the messages contained all layers.

        Raises:
            ValueError: If a number of bytes is below 0.
            TypeError: If a number of bytes is not an int.
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
            name: name of the column: "up", "down", "frames" or "full".
            round: number of the round to sum over; None for all rounds.

        Raises:
            ValueError: If ``name`` is unknown.
        """
        require(name in CommRow._fields[2:], "CommLog.total", "name", CommRow._fields[2:], name)
        return sum(getattr(r, name) for r in self.rows if round is None or r.round == round)

    def cumulative(self, name: str = "up") -> dict[int, int]:
        """Return, by round, the sum of a column up to and including that round, in bytes. See
        :meth:`total` for ``name``."""
        rounds = sorted({row.round for row in self.rows})
        totals = itertools.accumulate(self.total(name, round) for round in rounds)
        return dict(zip(rounds, totals, strict=True))

    @property
    def share(self) -> float:
        """Ratio of the transferred bytes to the bytes of messages with all layers; 0 for an empty
        log."""
        full = self.total("full")
        return (self.total("up") + self.total("down")) / full if full else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the rows as lists, which JSON can store."""
        return {"rows": [list(row) for row in self.rows]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the rows by those that :meth:`state_dict` returned. If an error is raised, the
        log does not change.

        Raises:
            ValueError: If a row has a wrong number of entries, or a value is below 0.
            TypeError: If a value is not an int.
        """
        fresh = CommLog()
        for row in state["rows"]:
            require(len(row) == 6, "CommLog.load_state_dict", "rows", "six entries", row)
            round, client, *counts = row
            fresh.record(round, client, **dict(zip(CommRow._fields[2:], counts, strict=True)))
        self._rows = fresh._rows


@dataclass(frozen=True)
class RoundLog:
    """Log entry of one round.

    Attributes:
        round: number of the round.
        plans: the plan that each client received.
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
            round: number of the round.
            plans: plans by client, for all clients that received a plan.
            result: result of the aggregation.
            num_layers: number of layers of the model.
        """
        trained = [plans[client].layers for client in result.accepted]
        heights = tuple(sum(i in layers for layers in trained) for i in range(num_layers))
        names = ("accepted", "rejected", "clipped", "uncovered", "noise", "skipped", "reason")
        own = {name: copy.copy(getattr(result, name)) for name in names}
        return cls(round, dict(plans), heights=heights, **own)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict that JSON can store. Mappings become lists of pairs, since JSON converts
        numeric keys to strings."""
        found = asdict(self)
        found["plans"] = [[client, plan.to_config()] for client, plan in self.plans.items()]
        for name in ("rejected", "clipped", "noise"):
            found[name] = [list(entry) for entry in getattr(self, name).items()]
        for name in ("accepted", "heights", "uncovered"):
            found[name] = list(found[name])
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoundLog:
        """Create an entry from the output of :meth:`to_dict`, which may have been converted to JSON
        and back."""
        read: dict[str, Any] = dict(values)
        read["plans"] = {client: LayerPlan.from_config(plan) for client, plan in values["plans"]}
        for name in ("rejected", "clipped", "noise"):
            read[name] = {key: value for key, value in values[name]}
        for name in ("accepted", "heights", "uncovered"):
            read[name] = tuple(values[name])
        return cls(**read)
