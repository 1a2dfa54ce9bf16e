"""One round of the server: creating its messages, and reading the untrusted replies."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, Metadata, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor

from lora_ext._checks import require

from .. import CommLog, LayerPlan, Update
from .._masked import masked_shapes
from .._payload import shapes_of
from .._plan import Pair
from .._update import Client, Settings
from . import _records

# Error codes with which Flower's server replies if a message or node is lost.
_UNANSWERED = (
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
)


class _Unanswered(ValueError):
    """Raised for an error reply that the server created because the client did not reply."""


@dataclasses.dataclass(frozen=True)
class Sending:
    """Settings of the messages of a run. Most are arguments of the strategy with the same name."""

    settings: Settings  # arguments of aggregate
    send_frozen: bool
    pack: bool
    seed: int
    payload: str
    scaling: Any  # argument of the strategy; sent to clients only if it is one number

    def config(self) -> dict[str, Any]:
        """Return the settings that clients need."""
        found: dict[str, Any] = {
            "protocol": _records.PROTOCOL,
            "seed": self.seed,
            "upload": self.settings.upload,
            "others": "frozen" if self.send_frozen else "disabled",
            "pack": self.pack,
        }
        if self.settings.shared:
            found["shared"] = list(self.settings.shared)
        if isinstance(self.scaling, int | float):
            found["scaling"] = float(self.scaling)
        if self.payload == "dense_masked":
            weighted = self.settings.weighted_by is not None
            found |= {"payload": self.payload, "weighted": weighted}
            if self.settings.max_update_norm is not None:
                found["max-update-norm"] = self.settings.max_update_norm
        return found


@dataclasses.dataclass
class Round:
    """A round in progress."""

    number: int
    record: ArrayRecord  # the global adapter, as Flower passes it
    state: Mapping[str, Tensor]  # the global adapter as tensors
    pairs: Sequence[Pair]  # names of the adapter's factors
    nodes: dict[int, Client]  # client of each node that receives a message
    plans: dict[Client, LayerPlan]
    sending: Sending
    comm: CommLog  # log in which the bytes of the messages are counted
    #: Time at which the messages were sent, in seconds of ``time.monotonic``.
    sent: float = dataclasses.field(default_factory=time.monotonic)
    _asked: list[Metadata] = dataclasses.field(default_factory=list)

    def messages(self, config: Mapping[str, Any]) -> list[Message]:
        """Return one message per node. ``config`` contains additional settings for the clients."""
        messages: list[Message] = []
        sending, shared = self.sending, self.sending.settings.shared
        for node, client in self.nodes.items():
            plan = self.plans[client]
            shapes = shapes_of(self.pairs, self.state, plan)
            sent = {
                key: value[tuple(map(slice, shapes[key]))] if key in shapes else value
                for key, value in self.state.items()
                if key in shapes or key in shared or sending.send_frozen
            }
            record, manifest = _records.pack(sent, sending.pack)
            own = {"server-round": self.number, "client": client, **plan.to_config(), **manifest}
            settings = ConfigRecord({**config, **sending.config(), **own})
            content = RecordDict({_records.LORA: record, _records.CONFIG: settings})
            messages.append(Message(content, node, MessageType.TRAIN))
        for message in messages:  # A separate loop: nothing is counted if creating a message raises
            self._asked.append(message.metadata)
            self._count(message.metadata.dst_node_id, message, "down")
        return messages

    def collect(
        self, replies: Iterable[Message]
    ) -> tuple[list[Update], dict[Client, RecordDict], dict[Client, str], list[Client]]:
        """Check each reply independently of the others.

        Returns:
            the updates of the valid replies; the contents of these replies by client; the reasons
            of rejections by client (or by node for an unknown node); and the clients that did not
            reply.
        """
        updates: list[Update] = []
        contents: dict[Client, RecordDict] = {}
        reasons: dict[Client, str] = {}
        answered: set[Client] = set()
        reported: dict[Client, set[str]] = {}
        for reply in replies:
            node = self.sender(reply)
            client = self.nodes.get(node, f"node {node}")
            try:
                updates.append(self.read(node, reply))
                contents[client] = reply.content
                metrics = reply.content.metric_records[_records.METRICS]
                reported.setdefault(client, set()).add(repr(sorted(metrics.items())))
            except ValueError as error:
                reasons[client] = str(error)
                if isinstance(error, _Unanswered):
                    continue
            answered.add(client)
        for client in [c for c, each in reported.items() if len(each) > 1]:
            updates = [update for update in updates if update.client != client]
            where = f"node {self.node(client)}: client {client}: reply"
            reasons[client] = f"{where}: expected one or equal replies, found two that differ"
        silent = [client for client in self.plans if client not in answered]
        return updates, contents, reasons, silent

    def sender(self, reply: Message) -> int:
        """Return the node of a reply. If the reply is an error, this is the receiver of the message
        that the reply answers, since the server may have created the error."""
        if reply.has_error():
            for asked in self._asked:  # by now, the grid has assigned ids to these messages
                if asked.message_id and asked.message_id == reply.metadata.reply_to_message_id:
                    return asked.dst_node_id
        return reply.metadata.src_node_id

    def read(self, node: int, reply: Message) -> Update:
        """Return a node's reply as an update. Raise ValueError for errors that are visible only in
        the message, such as an error reply or a plan that differs from the one sent."""
        where = f"node {node}"
        require(node in self.nodes, where, "reply", "no reply, as no message was sent", "a reply")
        self._count(node, reply, "up")
        if reply.has_error():
            found = f"error {reply.error.code}: {reply.error.reason!s:.500}"
            kind = _Unanswered if reply.error.code in _UNANSWERED else ValueError
            raise kind(f"{where}: reply: expected a reply without error, found {found}")
        client, content = self.nodes[node], reply.content
        plan = self.plans[client]
        for name, kind in (
            (_records.ECHO, content.config_records),
            (_records.LORA, content.array_records),
            (_records.METRICS, content.metric_records),
        ):
            expected, found = f"a record {name!r}", f"{sorted(content)!s:.200}"
            require(name in kind, where, "records", expected, found)
        echo = content.config_records[_records.ECHO]
        number = echo.get("server-round")
        require(number == self.number, where, "echo", f"round {self.number}", f"{number!r:.50}")
        try:
            echoed = LayerPlan.from_config(echo)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: echo: expected {plan}: {error!s:.200}") from None
        require(echoed == plan, where, "echo", plan, f"{echoed!s:.200}")
        if self.sending.payload == "dense_masked":
            shapes = masked_shapes(self.pairs, self.state)
        else:
            shapes = shapes_of(self.pairs, self.state, plan)
            shapes |= {key: tuple(self.state[key].shape) for key in self.sending.settings.shared}
        tensors = _records.unpack(content.array_records[_records.LORA], echo, shapes, where)
        examples = content.metric_records[_records.METRICS].get("num-examples")
        return Update(client, examples, tensors, plan)

    def node(self, client: Client) -> int:
        """Return the node of a client."""
        return next(node for node, asked in self.nodes.items() if asked == client)

    def _count(self, node: int, message: Message, way: str) -> None:
        """Add the bytes of a message to the log; ``way`` is "up" or "down"."""
        if not message.has_content():
            return
        arrays = message.content.array_records
        total = _records.count_bytes(message.content)
        full = total - _records.count_bytes(arrays) + self.record.count_bytes()
        # In a .npy file, the tensor data follow 10 bytes and a header, whose length is in the last
        # two of these bytes.
        data = [array.data for record in arrays.values() for array in record.values()]
        frames = total - sum(max(len(d) - 10 - int.from_bytes(d[8:10], "little"), 0) for d in data)
        client = self.nodes[node]
        self.comm.record(self.number, client, frames=frames, full=full, **{way: total})
