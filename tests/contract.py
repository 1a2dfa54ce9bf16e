"""Row type of the table of ops, and the comparisons that its laws use.

Each family defines its rows beside its inputs, in ``cases*.py``. ``test_contract.py`` lists all
rows and checks them against the laws that every op keeps. ``test_contract_<family>.py`` checks the
laws of one family.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from backends import BACKENDS, Backend, marks_of
from torch import Tensor

Outputs = dict[str, Tensor]
Check = tuple[Any, tuple[Any, ...]]  # an op of torch.ops.lora_ext, and its arguments
Wrong = tuple[str, Callable[[], Any]]  # the error message expected, and the call


@dataclass(frozen=True)
class Op:
    """A row of the table: one op, or several that take the same inputs.

    ``inputs(shape, dtype, seed=, exact=, device=, **variant)`` returns the argument of ``run`` (the
    op) and of ``formula`` (the reference, in float64 on the CPU). Both return every output and
    gradient by name. With ``exact`` inputs, such as small integers, both must be bitwise equal.
    """

    name: str
    inputs: Callable[..., Any]
    run: Callable[[Any], Outputs]
    formula: Callable[[Any], Outputs] | None = None
    bounds: Callable[[Any, Outputs], Outputs] | None = None  # largest |error| allowed per entry
    small: Sequence[Any] = ()  # shapes for every backend
    medium: Sequence[Any] = ()  # shapes not for backends with `small`
    large: Sequence[Any] = ()  # shapes only for the default CPU twin
    # Groups of variants (keyword arguments of `inputs`). The first shape runs with each variant of
    # the first group, the next shape with each variant of the next group, and so on. A group
    # contains every value of every argument, but not every combination of values.
    variants: Sequence[Sequence[dict[str, Any]]] = (({},),)
    dtypes: Callable[[Backend], list[torch.dtype]] = Backend.dtypes
    on_gpu: bool = True
    exact: bool = True  # bitwise equal to the formula on exact inputs
    steady: bool = True  # all runs on one backend are bitwise equal
    random: dict[str, Any] = field(default_factory=dict)  # overrides variants in the test of bounds
    # overrides variants in the test of threads; None: no test
    threads: dict[str, Any] | None = field(default_factory=dict)
    replays: Sequence[Any] | None = None  # shapes for CUDA graphs; None: small and medium
    captured: Callable[[Any], Outputs] | None = None  # replaces `run` in captured graphs
    checks: Callable[[], Iterator[Check]] | None = None  # yields calls for torch.library.opcheck
    wrong: Callable[[str], list[Wrong]] | None = None  # returns wrong calls on a device

    def shapes(self, backend: Backend) -> list[Any]:
        if backend.device == "cuda" and not self.on_gpu:
            return []
        if backend.small:
            return [*self.small]
        return [*self.small, *self.medium, *(self.large if backend.is_twin else ())]

    def feed(self, shape: Any, dtype: torch.dtype, turn: int = 0, **how: Any) -> Iterator[Any]:
        """Yield a shape's inputs for each variant of its group, ``turn`` groups later."""
        at = [*self.small, *self.medium, *self.large].index(shape) + turn
        for variant in self.variants[at % len(self.variants)]:
            yield self.inputs(shape, dtype, **{**variant, **how})


def shapes(op: Op, *groups: Sequence[Any], name: str = "shape") -> pytest.MarkDecorator:
    """Return a mark that parametrizes a test with each backend and the shapes that it runs."""
    params = [
        pytest.param(b, s, id=f"{b.name}-{s}", marks=marks_of(b))
        for b in BACKENDS
        for group in groups
        for s in group
        if s in op.shapes(b)
    ]
    return pytest.mark.parametrize(("backend", name), params, indirect=["backend"])


def wrong_calls(name: str, op: Callable[..., Any], rows: Sequence[tuple[Any, ...]]) -> list[Wrong]:
    """Return entries of :attr:`Op.wrong` for ``rows`` of ``(message, *arguments)``."""
    return [(f"{name}: {message}", functools.partial(op, *args)) for message, *args in rows]


def wide(inputs: dict[str, Any], keep: Sequence[str] = ()) -> dict[str, Any]:
    """Return the inputs in float64 on the CPU; the inputs named in ``keep`` keep their dtype."""
    return {
        k: v.cpu().double() if v.is_floating_point() and k not in keep else v.cpu()
        for k, v in inputs.items()
        if isinstance(v, Tensor)
    } | {k: v for k, v in inputs.items() if not isinstance(v, Tensor)}


def with_threads(*counts: int) -> Iterator[int]:
    """Set torch's number of threads to each count in turn, and yield the count."""
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(before)


def assert_same_bits(got: Tensor, expected: Tensor, what: str = "") -> None:
    got, expected = got.cpu(), expected.cpu()
    assert got.dtype == expected.dtype and got.shape == expected.shape
    differs = (got != expected) & ~(got.isnan() & expected.isnan())
    where = differs.nonzero()
    assert not len(where), f"{what}{len(where)} of {differs.numel()}, first at {where[0].tolist()}"


def same(got: Outputs, expected: Outputs, what: object = "") -> None:
    """Check bitwise equality, after rounding ``expected`` to the dtypes of ``got``."""
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert_same_bits(value, expected[name].to(value.dtype), f"{what} {name}: ")


def within(got: Outputs, exact: Outputs, allowed: Outputs, what: object = "") -> None:
    """Check each error against its bound. Entries must be -inf exactly where the formula's are."""
    assert got.keys() == exact.keys()
    for name, value in got.items():
        value = value.cpu().double()
        impossible = exact[name] == -math.inf
        assert torch.equal(value == -math.inf, impossible), f"{what} {name}: wrong -inf entries"
        error = (value - exact[name]).abs()[~impossible]
        worst = error / allowed[name].expand_as(exact[name])[~impossible].clamp(min=1e-300)
        worst = worst.nan_to_num(torch.inf)
        assert (worst <= 1).all(), f"{what} {name}: the error is {worst.max():.2f} times the bound"


def off_grid(t: Tensor, gap: int = 3) -> Tensor:
    """Return a copy with ``gap`` unused elements (NaN) between rows, and one element before the
    first row."""
    rows, width = t.shape
    store = t.new_full((rows * (width + gap) + 1,), float("nan"))
    view = store[1:].view(rows, width + gap)[:, :width]
    return view.copy_(t)


def strided(t: Tensor) -> Tensor:
    """Return a copy with three unused elements (NaN) between rows, at an unaligned address."""
    room = t.new_full((*t.shape[:-1], t.shape[-1] + 3), float("nan"))
    room[..., 1:-2] = t
    return room[..., 1:-2]


def transposed(t: Tensor) -> Tensor:
    """Return a copy in which the first dimension, not the last one, is contiguous."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return few combinations of values, one per axis, that contain every pair of values of two
    axes. The choice is greedy and deterministic."""
    rows = list(itertools.product(*(range(len(axis)) for axis in axes)))

    def pairs(row: tuple[int, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), 2))

    left: set[Any] = set().union(*map(pairs, rows))
    chosen = []
    while left:
        chosen.append(max(rows, key=lambda row: len(pairs(row) & left)))
        left -= pairs(chosen[-1])
    return [tuple(axis[at] for axis, at in zip(axes, row, strict=True)) for row in chosen]
