"""Exclusion of rows from the autograd graph below the lowest layer that their client trains.

The rows of a step are sorted by that layer. A block runs in two calls. The first call has a graph
and computes the rows that need gradients in this block or below it. The second call has no graph
and computes the other rows. The backward pass of a client's rows therefore covers only the blocks
from the client's lowest trained layer upwards. Below the lowest trained layer of all clients, one
call without a graph computes all rows.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._layers import assigned, forwards
from ._client_layers import BatchRows

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


class Unfit(Exception):
    """Raised if the blocks of a model do not run as a :class:`Staircase` requires."""


class Staircase:
    """Replacement of the forward of each block by two calls, in effect until :meth:`remove`.

    The blocks must run once each, in the order of their indices, and the first dimension of a
    block's first tensor argument must be the sequences. Other tensor arguments with a first
    dimension of that size are divided too. For each combination of shapes, the first result is
    compared with that of one call with all rows. :class:`Unfit` is raised if a condition is
    violated.

    Args:
        model: model with the blocks.
        blocks: names of the blocks by index.
        rows: object that stores which sequences a call of a block contains.
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

    def forward(self, lowest: Sequence[float]) -> contextlib.AbstractContextManager[None]:
        """Return a context manager in which the model's forward must run.

        ``lowest[i]`` is the lowest layer that the client of sequence i trains, in ascending order.
        """
        self._lowest = lowest
        # `_last` is None in the backward pass, where checkpoints rerun blocks in reverse order.
        return assigned(self, "_last", -1)

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
        """Run the first ``going`` rows with a graph and all other rows without a graph; return the
        concatenated outputs."""
        division = _Division(going, len(self._lowest))
        (args, kwargs), (free_args, free_kwargs) = division.of(call)
        with self.rows.only(0, going):
            first = _run(forward, args, kwargs)
        with torch.no_grad(), self.rows.only(going, len(self._lowest)):
            rest = _run(forward, free_args, free_kwargs)
        division.check_unchanged()
        output = division.joined(first, rest)
        # If another dimension of the hidden state has the size of the batch, an argument that
        # belongs to that dimension may have been divided by mistake. One comparison is then not
        # enough, since the mistake may have no effect in some calls.
        doubtful = len(self._lowest) in division.shapes[0][1:]
        kind = (index, *division.shapes)
        if len(division.shapes) > 1 and (doubtful or kind not in self._compared):
            with torch.no_grad():
                _check_close(output, forward(*call[0], **call[1]))
            self._compared.add(kind)
        return output


def _run(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run a block's forward. Raise errors as `Unfit`, since a call with all rows might succeed."""
    try:
        return forward(*args, **kwargs)
    except (Unfit, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise Unfit(str(error)) from error


class _Division:
    """Division of the arguments of a block's call into those of the first rows and those of all
    other rows."""

    def __init__(self, first: int, count: int):
        self.first, self.count = first, count
        self.shapes: list[torch.Size] = []  # shapes of the divided tensors, hidden state first
        self._versions: list[tuple[Tensor, int]] = []

    def of(self, value: Any) -> tuple[Any, Any]:
        """Return the two parts of an argument. An argument without rows is returned twice."""
        if isinstance(value, Tensor):
            self._versions.append((value, value._version))
            if value.dim() > 0 and value.shape[0] == self.count:
                self.shapes.append(value.shape)
                return value[: self.first], value[self.first :]
            if not self.shapes:
                raise Unfit(f"a block's input has shape {list(value.shape)}, not {self.count} rows")
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
        """Raise if a block has written into its arguments. Both calls write into the same tensor,
        so the second may change values that the first has saved for its backward."""
        for value, version in self._versions:
            if value._version != version:
                raise Unfit(f"a block changes an argument of shape {list(value.shape)}")

    def joined(self, first: Any, rest: Any) -> Any:
        """Concatenate the outputs of the two calls, in the structure of a single call's output."""
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
    """Raise unless the first tensor of ``parts``, a block's output from two calls, is close to that
    of ``whole``, its output from one call."""
    while type(parts) in (tuple, list) and type(whole) in (tuple, list):
        parts, whole = parts[0], whole[0]
    eps = torch.finfo(whole.dtype).eps ** 0.5
    if not torch.allclose(parts, whole, rtol=eps, atol=eps, equal_nan=True):
        error = float((parts - whole).abs().max())
        raise Unfit(f"a block computes other values for a part of its rows (error {error:.3g})")
