"""What a federation has sent, and what became of each round. All of it is plain JSON on request."""

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
    """The bytes of one client in one round: ``up`` it sent, ``down`` it got."""

    round: int
    client: Client
    up: int = 0
    down: int = 0
    frames: int = 0  # of up and down together, what is no data: headers, names, settings
    full: int = 0  # what up and down would have been for all layers


class CommLog:
    """Bytes by round and client, as the messages carried them.

    Several records of one round and client add up: a message down is known before the reply is.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[int, Client], CommRow] = {}

    @property
    def rows(self) -> list[CommRow]:
        """One for each round and client, in the order in which they came up."""
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
            round, client: whose they are.
            up, down: bytes that the client sent and got. frames: of both, what is no data.
            full: what up and down would have been for all layers.

        Raises:
            ValueError: a number below 0. TypeError: one that is no int.
        """
        row = self._rows.get((round, client), CommRow(round, client))
        more = {"up": up, "down": down, "frames": frames, "full": full}
        for name, value in more.items():
            integer("CommLog.record", name, value, 0, expected=("an int", "bytes from 0"))
        sums = {name: getattr(row, name) + value for name, value in more.items()}
        self._rows[round, client] = row._replace(**sums)

    def total(self, name: str = "up", round: int | None = None) -> int:
        """Add up one column, in bytes.

        Args:
            name: "up", "down", "frames" or "full". round: one round's alone; None is all of them.

        Raises:
            ValueError: another name.
        """
        require(name in CommRow._fields[2:], "CommLog.total", "name", CommRow._fields[2:], name)
        return sum(getattr(r, name) for r in self.rows if round is None or r.round == round)

    def cumulative(self, name: str = "up") -> dict[int, int]:
        """Add up one column round by round: by round, its bytes up to and with that one. ``name``
        as for :meth:`total`."""
        rounds = sorted({row.round for row in self.rows})
        totals = itertools.accumulate(self.total(name, round) for round in rounds)
        return dict(zip(rounds, totals, strict=True))

    @property
    def share(self) -> float:
        """What was sent, of what all layers for the same clients would have cost; 0 of nothing."""
        full = self.total("full")
        return (self.total("up") + self.total("down")) / full if full else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Lists and numbers, for JSON."""
        return {"rows": [list(row) for row in self.rows]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave, instead of what is here.

        Raises:
            ValueError, TypeError: rows that are no such lists; nothing has changed then.
        """
        fresh = CommLog()
        for row in state["rows"]:
            require(len(row) == 6, "CommLog.load_state_dict", "rows", "six entries", row)
            round, client, *counts = row
            fresh.record(round, client, **dict(zip(CommRow._fields[2:], counts, strict=True)))
        self._rows = fresh._rows


@dataclass(frozen=True)
class RoundLog:
    """What became of one round.

    Attributes:
        round: its number. plans: by client what it was asked for.
        accepted, rejected, clipped, uncovered, noise, skipped, reason: of its :class:`Aggregate`.
        heights: for each layer, how many accepted clients trained it: what its mean is over.
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
        """The entry of a round.

        Args:
            plans: of all clients that were asked. num_layers: L.
        """
        trained = [plans[client].layers for client in result.accepted]
        heights = tuple(sum(i in layers for layers in trained) for i in range(num_layers))
        names = ("accepted", "rejected", "clipped", "uncovered", "noise", "skipped", "reason")
        own = {name: copy.copy(getattr(result, name)) for name in names}
        return cls(round, dict(plans), heights=heights, **own)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, whose mappings know no numbers as keys: pairs instead."""
        found = asdict(self)
        found["plans"] = [[client, plan.to_config()] for client, plan in self.plans.items()]
        for name in ("rejected", "clipped", "noise"):
            found[name] = [list(entry) for entry in getattr(self, name).items()]
        for name in ("accepted", "heights", "uncovered"):
            found[name] = list(found[name])
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoundLog:
        """Read ``values`` that :meth:`to_dict` wrote, by way of JSON or not."""
        read: dict[str, Any] = dict(values)
        read["plans"] = {client: LayerPlan.from_config(plan) for client, plan in values["plans"]}
        for name in ("rejected", "clipped", "noise"):
            read[name] = {key: value for key, value in values[name]}
        for name in ("accepted", "heights", "uncovered"):
            read[name] = tuple(values[name])
        return cls(**read)
