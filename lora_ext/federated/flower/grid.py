"""An implementation of Flower's grid in this process, without server, socket or thread."""

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
from ._batched_app import BatchedApp, of_clients
from ._tasks import failed

RUN, SERVER = 1, 1  # 1 is also the node id of Flower's server


class LocalGrid(Grid):
    """A grid that runs the clients of a federation in this process.

    ``strategy.start(grid=LocalGrid(app, 10), ...)`` is a complete simulation. Clients run one after
    another in the order of the messages, or all in one batch if the app supports it. Replies have
    the same order. An exception becomes an error reply, as in Flower. The timeout is checked
    between clients: later clients do not start, and a reply that took longer is lost.

    Node i is partition i. It keeps a separate ``Context``, and receives copies of the records.

    Args:
        client_app: a ``ClientApp``; or ``BatchedClients``, whose clients are the nodes in order and
            train by their ``ClientSpec``.
        num_nodes: at least 1; the number of clients for ``BatchedClients``.
        run_config: of every node's context.
        clock: function that returns seconds, for the timeout.

    Raises:
        ValueError: If the number of nodes does not fit.
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
            require(num_nodes == found, where, "num_nodes", f"{found}, as clients", num_nodes)
            client_app = of_clients(client_app)
        kind = type(client_app).__name__
        require(callable(client_app), where, "client_app", "a ClientApp", kind, TypeError)
        require(num_nodes > 0, where, "num_nodes", "from 1", num_nodes)
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
        """Set the run, which is not used."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
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
            content: its records.
            message_type: "train", "evaluate" or "query".
            dst_node_id: one of :meth:`get_node_ids`.
            group_id, ttl: not used.
        """
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes, 0 to ``num_nodes - 1``."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store messages until their replies are pulled, and return one id per message."""
        ids: list[str] = []
        for message in messages:
            ids.append(f"local-{next(self._numbers)}")
            message.metadata.__dict__["_message_id"] = ids[-1]  # as in Flower's grids
            self._pushed[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the clients that received the messages of these ids, and return their replies."""
        found = [self._pushed.pop(each) for each in message_ids if each in self._pushed]
        return self._answers(found, None)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run the clients of the messages, and return their replies in that order.

        Args:
            messages: one for each client.
            timeout: seconds; a client that would start later does not run, and a reply that took
                longer is lost. None waits for all.
        """
        pushed = self.push_messages(messages)
        return self._answers([self._pushed.pop(each) for each in pushed], timeout)

    def _answers(self, messages: list[Message], timeout: float | None) -> list[Message]:
        end = None if timeout is None else self._clock() + timeout
        replies: list[Message] = []
        app = self._app
        groups = [[message] for message in messages]
        if isinstance(app, BatchedApp):  # all training messages together
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
    """Return a copy of a message with records that the receiver may change."""
    records = {name: record.copy() for name, record in message.content.items()}
    return make_message(message.metadata, RecordDict(records))
