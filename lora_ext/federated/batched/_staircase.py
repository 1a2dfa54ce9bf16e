"""Removal of rows from the graph below the lowest layer that their client trains.

The rows of a step are sorted by that layer. A block runs the rows that need a gradient in it or
below with a graph, and the others without. Each client thus has the backward cost of its own depth.
Below the lowest layer of all clients, all rows run together without a graph.
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
    """Raised if blocks do not run as the staircase requires."""


class Staircase:
    """The divided forward of each block of a model, until :meth:`remove`.

    The result is exact if the blocks run once each, in the order of their indices, and their first
    tensor has the sequences in its first dimension. Other tensor arguments with one row per
    sequence are divided as well. The first such call of each kind is compared with one call of all
    rows. A violation raises :class:`Unfit`.

    Args:
        blocks: names by index.
        rows: object that stores the sequences of each call of a block.
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
        """Return a context for the model's forward. The client of sequence i trains nothing below
        ``lowest[i]``; ``lowest`` is ascending."""
        self._lowest, self._last = lowest, -1
        try:
            yield
        finally:
            self._last = None  # in the backward, a checkpoint reruns blocks in reverse order

    def remove(self) -> None:
        """Restore the forward of every block."""
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
        """Run the first rows with a graph and the others without, and concatenate the outputs."""
        division = _Division(going, len(self._lowest))
        (args, kwargs), (free_args, free_kwargs) = division.of(call)
        with self.rows.only(0, going):
            first = _run(forward, args, kwargs)
        with torch.no_grad(), self.rows.only(going, len(self._lowest)):
            rest = _run(forward, free_args, free_kwargs)
        division.check_unchanged()
        output = division.joined(first, rest)
        # If the hidden state has another dimension of that size, a tensor indexed by that dimension
        # may have been divided by mistake, without an effect in this call.
        doubtful = len(self._lowest) in division.shapes[0][1:]
        kind = (index, *division.shapes)
        if len(division.shapes) > 1 and (doubtful or kind not in self._compared):
            with torch.no_grad():
                _check_close(output, forward(*call[0], **call[1]))
            self._compared.add(kind)
        return output


def _run(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run a block's forward; raise `Unfit` for errors, which a call of all rows might not have."""
    try:
        return forward(*args, **kwargs)
    except (Unfit, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise Unfit(str(error)) from error


class _Division:
    """Division of the arguments of a block's call between its first rows and the others."""

    def __init__(self, first: int, count: int):
        self.first, self.count = first, count
        self.shapes: list[torch.Size] = []  # of divided tensors, the hidden state's first
        self._versions: list[tuple[Tensor, int]] = []

    def of(self, value: Any) -> tuple[Any, Any]:
        """Return both parts of an argument; an argument without rows is in both."""
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
        raise Unfit(f"a block has an argument of type {type(value).__name__}")

    def check_unchanged(self) -> None:
        """Raise for a block that writes into its arguments. Both calls would write into one tensor,
        and the second would change values that the first needs for its backward."""
        for value, version in self._versions:
            if value._version != version:
                raise Unfit(f"a block changes an argument of shape {list(value.shape)}")

    def joined(self, first: Any, rest: Any) -> Any:
        """Concatenate two outputs in the structure that one call would have returned."""
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
    """Raise unless the first tensor of a block's output is equal in two calls and in one."""
    while type(parts) in (tuple, list) and type(whole) in (tuple, list):
        parts, whole = parts[0], whole[0]
    eps = torch.finfo(whole.dtype).eps ** 0.5
    if not torch.allclose(parts, whole, rtol=eps, atol=eps, equal_nan=True):
        error = float((parts - whole).abs().max())
        raise Unfit(f"a block computes other values for a part of its rows (error {error:.3g})")
