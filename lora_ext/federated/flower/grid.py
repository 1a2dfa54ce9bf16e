"""An implementation of Flower's grid in one process, without a server, sockets or threads."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable

from flwr.app import Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from lora_ext._checks import require

from .. import BatchedClients
from ._client import BatchedApp, of_clients
from ._tasks import failed

RUN, SERVER = 1, 1  # 1 is also the node id of Flower's server


class LocalGrid(Grid):
    """A grid that runs the clients of a federation in the calling process.

    ``strategy.start(grid=LocalGrid(app, 10), ...)`` is a complete simulation. Clients run one after
    another in the order of the messages, or all in one batch if the app supports it. Replies have
    the same order. If a client raises, its reply is an error, as in Flower. The timeout is checked
    between clients: when it has passed, no further client starts, and later replies are lost.

    Node i has partition i and a separate ``Context``. The node receives copies of the records.

    Args:
        client_app: a ``ClientApp``; or ``BatchedClients``, in which case node i is the i-th client
            and trains as its ``ClientSpec`` specifies.
        num_nodes: number of nodes, at least 1. With ``BatchedClients``, the number of clients.
        run_config: run configuration in the context of every node.
        clock: function that returns the time in seconds, used for the timeout.

    Raises:
        ValueError: If ``num_nodes`` is below 1 or not the number of clients of ``BatchedClients``.
        TypeError: If the app is not callable.
    """

    def __init__(
        self,
        client_app: ClientApp | BatchedClients,
        num_nodes: int,
        *,
        run_config: dict[str, bool | float | int | str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        where = "LocalGrid"
        if isinstance(client_app, BatchedClients):
            found = len(client_app.clients)
            require(num_nodes == found, where, "num_nodes", f"{found}, one per client", num_nodes)
            client_app = of_clients(client_app)
        kind = type(client_app).__name__
        require(callable(client_app), where, "client_app", "a ClientApp", kind, TypeError)
        require(num_nodes > 0, where, "num_nodes", "at least 1", num_nodes)
        self._app = client_app
        self._clock = clock
        self._numbers = itertools.count(1)
        self._pushed: dict[str, Message] = {}
        try:  # Set the identity of this process in messages, as Flower's engines do.
            _ = TaskIdentity.run_id
        except RuntimeError:
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, SERVER, 1
        self._run = Run.create_empty(RUN)
        self.contexts = {
            node: Context(
                run_id=RUN,
                node_id=node,
                node_config={"partition-id": node, "num-partitions": num_nodes},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for node in range(num_nodes)
        }

    def set_run(self, run: Run) -> None:
        """Store Flower's description of the run, which the grid does not use."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to a node, like Flower's ``Message``.

        Args:
            content: records of the message.
            message_type: "train", "evaluate" or "query".
            dst_node_id: receiver, one of :meth:`get_node_ids`.
            group_id: stored in the message; not used.
            ttl: stored in the message; not used.
        """
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes, 0 to ``num_nodes - 1``."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store messages until their replies are pulled, and return one id per message."""
        ids: list[str] = []
        for message in messages:
            ids.append(f"local-{next(self._numbers)}")
            message.metadata.__dict__["_message_id"] = ids[-1]  # Flower's grids do the same.
            self._pushed[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the receivers of the messages with these ids, and return their replies."""
        found = [self._pushed.pop(each) for each in message_ids if each in self._pushed]
        return self._answers(found, None)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run the receivers of the messages, and return their replies in the same order.

        Args:
            messages: one message per client.
            timeout: seconds after which no further client starts; a reply completed later is lost.
                None for no timeout.
        """
        pushed = self.push_messages(messages)
        return self._answers([self._pushed.pop(each) for each in pushed], timeout)

    def _answers(self, messages: list[Message], timeout: float | None) -> list[Message]:
        end = None if timeout is None else self._clock() + timeout
        replies: list[Message] = []
        app = self._app
        groups = [[message] for message in messages]
        if isinstance(app, BatchedApp):  # All training messages form one group.
            train = [m for m in messages if m.metadata.message_type == "train"]
            groups = [[m] for m in messages if m.metadata.message_type != "train"]
            groups += [train] if train else []
        for group in groups:
            if end is not None and self._clock() >= end:
                break
            known = [m for m in group if m.metadata.dst_node_id in self.contexts]
            pairs = [(_own(m), self.contexts[m.metadata.dst_node_id]) for m in known]
            if isinstance(app, BatchedApp) and len(pairs) > 1:
                answered = app.train_together(pairs)
            else:
                answered = [self._one(*pair) for pair in pairs]
            if end is None or self._clock() < end:
                replies += answered
        return replies

    def _one(self, message: Message, context: Context) -> Message:
        try:
            reply = self._app(message, context)
            fits, found = isinstance(reply, Message), f"one that returns {type(reply).__name__}"
            expected = "an app that returns a Message"
            require(fits, "LocalGrid", "client_app", expected, found, TypeError)
            return reply
        except Exception as error:
            return failed(message, error)


def _own(message: Message) -> Message:
    """Return a copy of a message and of its records; the receiver may change the copy."""
    records = {name: record.copy() for name, record in message.content.items()}
    return make_message(message.metadata, RecordDict(records))
