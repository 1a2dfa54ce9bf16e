"""Rows that leave the graph below the lowest layer that their client trains.

The rows of a step are ordered by that layer. A block runs its first rows, those that need a
gradient in it or below, with a graph, and the others without: mixed depths pay for their own
backward. Below everyone's lowest layer all rows run together, without a graph.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._layers import forwards
from ._client_layers import BatchRows

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


class Unfit(Exception):
    """Blocks that do not run the way the staircase needs."""


class Staircase:
    """The forward of each block of a model, divided until :meth:`remove`.

    It is exact where the blocks run once each, in the order of their indices, and their first
    tensor has the sequences in its first dimension. Of a block's other arguments, tensors with one
    row a sequence are divided as well; the first such call of its kind is compared with one call of
    all rows. Whatever contradicts this raises :class:`Unfit`.

    Args:
        blocks: names by index. rows: is told which of the sequences a block's call has.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[int, str], rows: BatchRows):
        self.rows = rows
        self._lowest: Sequence[float] = ()
        self._last: int | None = None
        self._compared: set[Any] = set()
        self.removed = False
        found = {index: model.get_submodule(name) for index, name in blocks.items()}
        self._replaced = contextlib.ExitStack()
        self._replaced.enter_context(
            forwards({block: self._divided(i, block.forward) for i, block in found.items()})
        )

    @contextlib.contextmanager
    def forward(self, lowest: Sequence[float]) -> Iterator[None]:
        """A block around the model's forward: the client of sequence i trains nothing below
        ``lowest[i]``, which rises."""
        self._lowest, self._last = lowest, -1
        try:
            yield
        finally:
            self._last = None  # a checkpoint runs blocks again in the backward, the last one first

    def remove(self) -> None:
        """Give every block its own forward back."""
        self._replaced.close()
        self.removed = True

    def _divided(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def divided(*args: Any, **kwargs: Any) -> Any:
            if self._last is not None:
                if index <= self._last:
                    raise Unfit(f"block {index} runs after block {self._last}")
                self._last = index
            going = bisect.bisect_right(self._lowest, index)
            if going == len(self._lowest):
                return forward(*args, **kwargs)
            if going == 0:
                with torch.no_grad():
                    return _run(forward, args, kwargs)
            return self._in_two(index, forward, (args, kwargs), going)

        return divided

    def _in_two(self, index: int, forward: Callable[..., Any], call: Any, going: int) -> Any:
        """The first rows with a graph, the others without, and their outputs put together."""
        division = _Division(going, len(self._lowest))
        (args, kwargs), (free_args, free_kwargs) = division.of(call)
        with self.rows.only(0, going):
            first = _run(forward, args, kwargs)
        with torch.no_grad(), self.rows.only(going, len(self._lowest)):
            rest = _run(forward, free_args, free_kwargs)
        division.check_unchanged()
        output = division.joined(first, rest)
        # Where the hidden state has another dimension of that size, a tensor that has one row for
        # each of those may have been divided by mistake, and do no harm in this call alone.
        doubtful = len(self._lowest) in division.shapes[0][1:]
        kind = (index, *division.shapes)
        if len(division.shapes) > 1 and (doubtful or kind not in self._compared):
            with torch.no_grad():
                _check_close(output, forward(*call[0], **call[1]))
            self._compared.add(kind)
        return output


def _run(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A block's forward as the staircase runs it; what it raises there, it may not raise whole."""
    try:
        return forward(*args, **kwargs)
    except (Unfit, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise Unfit(str(error)) from error


class _Division:
    """The arguments of a block's call divided between its first rows and the others."""

    def __init__(self, first: int, count: int):
        self.first, self.count = first, count
        self.shapes: list[torch.Size] = []  # of what was divided, the hidden state's first
        self._versions: list[tuple[Tensor, int]] = []

    def of(self, value: Any) -> tuple[Any, Any]:
        """The two parts of an argument; what has no rows goes to both."""
        if isinstance(value, Tensor):
            self._versions.append((value, value._version))
            if value.dim() > 0 and value.shape[0] == self.count:
                self.shapes.append(value.shape)
                return value[: self.first], value[self.first :]
            if not self.shapes:
                raise Unfit(f"a block's first tensor has shape {list(value.shape)}")
            return value, value
        if type(value) in (tuple, list):
            parts = [self.of(each) for each in value]
            return type(value)(p[0] for p in parts), type(value)(p[1] for p in parts)
        if type(value) is dict:
            both = {name: self.of(each) for name, each in value.items()}
            return {n: p[0] for n, p in both.items()}, {n: p[1] for n, p in both.items()}
        if isinstance(value, _PLAIN):
            return value, value
        raise Unfit(f"a block gets a {type(value).__name__}")

    def check_unchanged(self) -> None:
        """Refuse a block that writes into its arguments: its parts write into one tensor, and the
        second writes what the first one keeps for its backward."""
        if any(value._version != version for value, version in self._versions):
            raise Unfit("a block changes a tensor that it gets")

    def joined(self, first: Any, rest: Any) -> Any:
        """The two outputs as one call would have returned them."""
        if isinstance(first, Tensor) and isinstance(rest, Tensor):
            sizes = first.shape[:1] + rest.shape[:1]
            if sizes != (self.first, self.count - self.first):
                raise Unfit(f"a block returns tensors of {list(first.shape)}, {list(rest.shape)}")
            return torch.cat([first, rest])
        if type(first) in (tuple, list) and type(rest) is type(first) and len(first) == len(rest):
            return type(first)(map(self.joined, first, rest))
        if isinstance(first, _PLAIN) and first == rest:
            return first
        raise Unfit(f"a block returns a {type(first).__name__}")


def _check_close(parts: Any, whole: Any) -> None:
    """The first tensor of a block's output, put together of parts and made in one call."""
    while type(parts) in (tuple, list) and type(whole) in (tuple, list):
        parts, whole = parts[0], whole[0]
    eps = torch.finfo(whole.dtype).eps ** 0.5
    if not torch.allclose(parts, whole, rtol=eps, atol=eps, equal_nan=True):
        raise Unfit("a block computes other values for a part of its rows")
