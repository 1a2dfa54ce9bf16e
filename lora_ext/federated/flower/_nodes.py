"""Who is who: Flower's nodes, whose ids are random, and the clients of a federation."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from lora_ext._checks import require

from .._update import Client
from ..logs import CommLog
from ._records import CAPABILITY, NODE, PARTITION, count_bytes

Capability = Mapping[int, int] | Callable[[int], int] | None

_PATIENCE = 180.0  # seconds for a query: on a busy machine Ray took more than 60 to start

_log = logging.getLogger("flwr")


class Nodes:
    """The client that each node is: its partition where it names one, else the node itself.

    A node is asked once, with a query, before its first round. One that comes back under another
    id, with the partition that it had, is the client that it was; a partition that another
    connected node has is nobody else's.

    Args:
        capability: by client, or by node, how many layers it can train: a mapping or a function of
            the client. None takes what nodes say of themselves, or all layers.
        comm: takes the bytes of the queries, as round 0.
    """

    def __init__(self, capability: Capability, comm: CommLog):
        self._capability = capability
        self._comm = comm
        self._clients: dict[int, int] = {}
        self._says: dict[int, int] = {}  # the capability that a node claims
        self._asked: set[int] = set()

    def client(self, node: int) -> int:
        """The client that a node is."""
        return self._clients.get(node, node)

    def meet(self, grid: Grid, nodes: Iterable[int], timeout: float | None) -> None:
        """Ask the nodes that are new who they are.

        One that has no partition goes by its node id; so does one that gives no answer, until it
        is asked again in the next round.
        """
        connected = list(nodes)
        new = [node for node in connected if node not in self._asked]
        if not new:
            return
        queries = [Message(RecordDict(), node, MessageType.QUERY) for node in new]
        patience = min(_PATIENCE, _PATIENCE if timeout is None else timeout)
        answers = grid.send_and_receive(queries, timeout=patience)
        replies = {reply.metadata.src_node_id: reply for reply in answers}
        for node in [each for each in new if each in replies]:
            self._asked.add(node)
            if replies[node].has_content():
                said = replies[node].content.config_records.get(NODE, {})
                self.learn(node, said, connected)
        for query in sorted(queries, key=lambda q: self.client(q.metadata.dst_node_id)):
            node = query.metadata.dst_node_id
            answered = node in replies and replies[node].has_content()
            up = count_bytes(replies[node].content) if answered else 0
            self._comm.record(0, self.client(node), up=up, down=count_bytes(query.content))

    def learn(
        self, node: int, said: Mapping[str, Any], connected: Iterable[int] | None = None
    ) -> None:
        """Take up what a node says of itself, unless it is known already; ``connected`` are those
        whose partitions are taken, None for all that are known."""
        connected = [*self._asked, *self._clients] if connected is None else connected
        count, partition = said.get(CAPABILITY), said.get(PARTITION)
        if type(count) is int:
            self._says.setdefault(node, count)
        if node in self._clients or type(partition) is not int or not 0 <= partition < 2**63:
            return
        holders = [n for n in connected if n != node and self.client(n) == partition]
        if holders:
            _log.warning(
                "node %d: partition-id %d is that of node %d, which is connected: it goes by its "
                "node id",
                node,
                partition,
                holders[0],
            )
            return
        for other in [n for n, client in self._clients.items() if client == partition]:
            del self._clients[other]  # it has left; should it return, it is asked again
            self._asked.discard(other)
        self._clients[node] = partition

    def capable(self, nodes: list[int], num_layers: int, strict: bool) -> dict[int, int]:
        """Return the nodes that can train, and how many layers. A node whose capability is missing
        or out of range is left out, or raises if ``strict``."""
        found: dict[int, int] = {}
        for node in nodes:
            try:
                found[node] = self._capability_of(node, num_layers)
            except ValueError as error:
                if strict:
                    raise
                _log.warning("node %d is left out: %s", node, error)
        return {node: count for node, count in found.items() if count > 0}

    def _capability_of(self, node: int, num_layers: int) -> int:
        where = "LoraStrategy"
        client = self.client(node)
        known = self._capability
        if known is None:
            return min(max(self._says.get(node, num_layers), 0), num_layers)
        if callable(known):
            found = known(client)
        else:
            holds = client in known or node in known
            require(holds, where, "capability", f"one for client {client} of node {node}", "none")
            found = known[client] if client in known else known[node]
        name = f"capability of client {client}"
        if isinstance(found, bool) or not isinstance(found, int):
            raise TypeError(f"{where}: {name}: expected an integer, found {found!r:.100}")
        require(0 <= found <= num_layers, where, name, f"0 to {num_layers} layers", found)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Lists of numbers, for JSON."""
        return {
            "asked": sorted(self._asked),
            "clients": [[node, client] for node, client in sorted(self._clients.items())],
            "says": [[node, count] for node, count in sorted(self._says.items())],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self._clients = {node: client for node, client in state["clients"]}
        self._says = {node: count for node, count in state["says"]}
        self._asked = set(state["asked"])


def connected(grid: Grid, least: int, timeout: float | None) -> list[int]:
    """The nodes that are there, after a wait for so many of them."""
    end = time.monotonic() + (math.inf if timeout is None else timeout)
    while len(nodes := sorted(grid.get_node_ids())) < least and time.monotonic() < end:
        _log.info("Waiting for nodes: %d connected, at least %d needed", len(nodes), least)
        time.sleep(min(1.0, max(end - time.monotonic(), 0.0)))
    return nodes


def drawn(names: Iterable[Client], count: int, *key: int) -> list[Client]:
    """So many of the names, by a lot for each that depends on the key and the name alone."""
    lots = {name: np.random.default_rng([*key, int(name)]).random() for name in names}
    return sorted(sorted(lots, key=lambda name: (lots[name], name))[:count])
