"""Assignment of Flower's nodes, whose ids are random, to the clients of a federation."""

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

_QUERY_TIMEOUT_S = 180.0  # Ray took more than 60 s to start on a busy machine

_log = logging.getLogger("flwr")


class Nodes:
    """Mapping from nodes to clients.

    The client's number is the partition that the node reports, or the node id if the node reports
    none. Each node receives one query before its first round. A node that reconnects with a new id
    and the same partition is the same client. If two connected nodes report the same partition, the
    partition belongs to the first node.

    Args:
        capability: number of layers that a client can train: a mapping by client or node, or a
            function of the client. None uses the number that a node reports, or all layers if the
            node reports no number.
        comm: log in which the bytes of the queries are counted, as round 0.
    """

    def __init__(self, capability: Capability, comm: CommLog):
        self._capability = capability
        self._comm = comm
        self._clients: dict[int, int] = {}
        self._says: dict[int, int] = {}  # reported capability of each node
        self._asked: set[int] = set()

    def client(self, node: int) -> int:
        """Return the client of a node."""
        return self._clients.get(node, node)

    def meet(self, grid: Grid, nodes: Iterable[int], timeout: float | None) -> None:
        """Query the identity of new nodes.

        If a node does not answer, its node id is used as the client, and the node is queried again
        in the next round.
        """
        connected = list(nodes)
        new = [node for node in connected if node not in self._asked]
        if not new:
            return
        queries = [Message(RecordDict(), node, MessageType.QUERY) for node in new]
        patience = min(_QUERY_TIMEOUT_S, _QUERY_TIMEOUT_S if timeout is None else timeout)
        answers = grid.send_and_receive(queries, timeout=patience)
        replies = {reply.metadata.src_node_id: reply for reply in answers}
        for node in [each for each in new if each in replies]:
            self._asked.add(node)
            if replies[node].has_content():
                identity = replies[node].content.config_records.get(NODE, {})
                self.learn(node, identity, connected)
        for query in sorted(queries, key=lambda q: self.client(q.metadata.dst_node_id)):
            node = query.metadata.dst_node_id
            answered = node in replies and replies[node].has_content()
            up = count_bytes(replies[node].content) if answered else 0
            self._comm.record(0, self.client(node), up=up, down=count_bytes(query.content))

    def learn(
        self, node: int, said: Mapping[str, Any], connected: Iterable[int] | None = None
    ) -> None:
        """Store the capability and the partition that a node reports, unless both are known
        already.

        The partition is not stored if it belongs to a different node in ``connected``. None stands
        for all known nodes.
        """
        connected = [*self._asked, *self._clients] if connected is None else connected
        count, partition = said.get(CAPABILITY), said.get(PARTITION)
        if type(count) is int:
            self._says.setdefault(node, count)
        if node in self._clients or type(partition) is not int or not 0 <= partition < 2**63:
            return
        holders = [n for n in connected if n != node and self.client(n) == partition]
        if holders:
            _log.warning(
                "node %d: partition-id %d belongs to node %d, which is still connected; the node "
                "id is used as the client instead",
                node,
                partition,
                holders[0],
            )
            return
        for other in [n for n, client in self._clients.items() if client == partition]:
            del self._clients[other]  # The node has left; if it returns, it is queried again.
            self._asked.discard(other)
        self._clients[node] = partition

    def capable(self, nodes: list[int], num_layers: int, strict: bool) -> dict[int, int]:
        """Return the number of layers of each node that can train at least one.

        If a capability is missing or out of range, the node is skipped, or ValueError is raised
        if ``strict``.
        """
        found: dict[int, int] = {}
        for node in nodes:
            try:
                found[node] = self._capability_of(node, num_layers)
            except ValueError as error:
                if strict:
                    raise
                _log.warning("node %d is skipped: %s", node, error)
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
            expected = f"a number for client {client} of node {node}"
            require(holds, where, "capability", expected, "none")
            found = known[client] if client in known else known[node]
        name = f"capability of client {client}"
        if isinstance(found, bool) or not isinstance(found, int):
            raise TypeError(f"{where}: {name}: expected an integer, found {found!r:.100}")
        require(0 <= found <= num_layers, where, name, f"0 to {num_layers} layers", found)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state as lists of numbers, which JSON can store."""
        return {
            "asked": sorted(self._asked),
            "clients": [[node, client] for node, client in sorted(self._clients.items())],
            "says": [[node, count] for node, count in sorted(self._says.items())],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that :meth:`state_dict` returned."""
        self._clients = {node: client for node, client in state["clients"]}
        self._says = {node: count for node, count in state["says"]}
        self._asked = set(state["asked"])


def connected(grid: Grid, least: int, timeout: float | None) -> list[int]:
    """Wait until at least ``least`` nodes are connected or ``timeout`` seconds have passed, and
    return the connected nodes."""
    end = time.monotonic() + (math.inf if timeout is None else timeout)
    while len(nodes := sorted(grid.get_node_ids())) < least and time.monotonic() < end:
        _log.info("Waiting for nodes: %d connected, at least %d needed", len(nodes), least)
        time.sleep(min(1.0, max(end - time.monotonic(), 0.0)))
    return nodes


def drawn(names: Iterable[Client], count: int, *key: int) -> list[Client]:
    """Draw ``count`` names at random. The random number of a name depends only on ``key`` and the
    name."""
    lots = {name: np.random.default_rng([*key, int(name)]).random() for name in names}
    return sorted(sorted(lots, key=lambda name: (lots[name], name))[:count])
