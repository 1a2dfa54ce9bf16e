"""A CUDA graph for tests without a GPU: a replay runs every captured op on the same tensors."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lora_ext.rows import _rows

_VIEWS = ("view", "expand", "slice", "select", "alias", "detach", "transpose", "t", "unsqueeze")
_FREE = ("empty", "permute", "squeeze", "_unsafe_view", "as_strided", "lift_fresh", *_VIEWS)


class FakeGraph:
    """Sequence of captured ops. A replay writes its results to the tensors of the capture.
    ``launches`` counts, by name, the ops that would launch a kernel, copy or fill on a device."""

    def __init__(self) -> None:
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        self.launches: Counter[str] = Counter()

    def replay(self) -> None:
        for op, args, kwargs, outputs in self.ops:
            found = op(*args, **kwargs)
            for old, new in zip(
                pytree.tree_leaves(outputs), pytree.tree_leaves(found), strict=True
            ):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: FakeGraph):
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = op(*args, **(kwargs or {}))
        # Keep the leaves, because the caller may change the list of outputs.
        self._graph.ops.append((op, args, kwargs or {}, pytree.tree_leaves(outputs)))
        name = op.overloadpacket.__name__
        if name not in _FREE:
            self._graph.launches[name] += 1
        return outputs


class Device:
    """Simulated device that can capture a graph. It replaces the capture state of
    ``lora_ext.rows``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._graph: FakeGraph | None = None
        monkeypatch.setattr(_rows, "capture", lambda device: self._graph)
        # The recorder must not count as a tracer, since it records the ops that a device would run.
        monkeypatch.setattr(_rows, "traced_by_python", lambda: False)

    @contextlib.contextmanager
    def capture(self) -> Iterator[FakeGraph]:
        graph = self._graph = FakeGraph()
        try:
            with _Recorder(graph):
                yield graph
        finally:
            self._graph = None


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Yield a counter, by name of the op, of the launches inside the block."""
    graph = FakeGraph()
    with _Recorder(graph):
        yield graph.launches
