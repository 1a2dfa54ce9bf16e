"""Checks of arguments. Each message reads ``<where>: <argument>: expected ..., found ...``.

``where`` is the name of the function or class whose argument is checked. A value of the right type
that is out of range raises ValueError. A value of another type raises :class:`WrongKind`, which is
both a TypeError and a ValueError. Zero-dimensional arrays and tensors of numpy and torch are
converted to Python's numbers and bools. A bool is not accepted as a number, NaN is outside every
range, and an array or tensor with a dimension is not a scalar, even if it has one element.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
#: Description of the expected value for a message. A pair contains the description for values of
#: the wrong type, then the description for values that are out of range.
Words = str | tuple[str, ...]

#: Floating-point dtypes that the ops support; some arguments accept only some of these dtypes.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class WrongKind(TypeError, ValueError):
    """Error that is raised for an argument of the wrong type."""


def require(
    holds: object,
    where: str,
    argument: str,
    expected: object,
    found: object,
    error: type[Exception] = ValueError,
) -> None:
    """Raise ``error("<where>: <argument>: expected ..., found ...")`` unless ``holds`` is true."""
    if not holds:
        raise error(f"{where}: {argument}: expected {expected}, found {found}")


def instance(where: str, argument: str, value: object, kind: type | tuple[type, ...]) -> None:
    """Raise :class:`WrongKind` unless ``value`` is an instance of ``kind``."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        name = " or ".join(each.__name__ for each in kinds)
        article = "an" if name[0] in "AEIOUaeiou" else "a"
        found = type(value).__name__
        raise WrongKind(f"{where}: {argument}: expected {article} {name}, found {found}")


def integer(
    where: str,
    argument: str,
    value: Any,
    minimum: int | None = None,
    maximum: int | None = None,
    *,
    expected: Words | None = None,
) -> int:
    """Return ``value`` as a Python int; raise unless it is in ``[minimum, maximum]``.

    ``expected`` replaces the default description of the expected value in the message.
    """
    whole = value if type(value) in (int, torch.SymInt) else _whole(_plain(value))
    if whole is None or not _inside(whole, minimum, maximum, None, None):
        low = "" if minimum is None else f" from {minimum}"
        high = "" if maximum is None else f" to {maximum}"
        up = " up" if high and not low else ""
        words = expected or f"an integer{low}{up}{high}"
        _refuse(where, argument, words, value, WrongKind if whole is None else ValueError)
    return whole


def number(
    where: str,
    argument: str,
    value: Any,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    expected: Words | None = None,
) -> float:
    """Return ``value`` as a Python float, or as an int if it is an integer; raise if out of bounds.

    Infinity is accepted only with ``maximum=math.inf``. NaN is never accepted.

    Args:
        where: name of the function or class, with which the message begins.
        argument: name of the argument, which follows ``where`` in the message.
        value: value to check.
        minimum: inclusive lower bound.
        maximum: inclusive upper bound.
        above: exclusive lower bound.
        below: exclusive upper bound.
        expected: description of the expected value in the message. The first item of a pair is used
            for values that are not finite numbers.

    Raises:
        WrongKind: If ``value`` is not a real number.
        ValueError: If ``value`` is out of bounds or not finite.
    """
    real = value if type(value) in (float, torch.SymFloat, torch.SymInt) else _real(_plain(value))
    finite = maximum != math.inf
    words = expected or _interval(minimum, maximum if finite else None, above, below)
    if real is None:
        _refuse(where, argument, words, value, WrongKind)
    # The value is compared without a conversion to float, because an integer may be too large.
    if not (abs(real) <= sys.float_info.max if finite else real == real):
        _refuse(where, argument, words if isinstance(words, str) else words[:1], value)
    if not _inside(real, minimum, maximum, above, below):
        _refuse(where, argument, words, value)
    return real


def _inside(value: Any, *bounds: float | None) -> bool:
    minimum, maximum, above, below = bounds
    return (
        (minimum is None or value >= minimum)
        and (maximum is None or value <= maximum)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def choice(
    where: str, argument: str, value: object, choices: Sequence[T], *, expected: str | None = None
) -> T:
    """Return the member of ``choices`` that equals ``value``; raise ValueError if none does."""
    for each in choices:
        if isinstance(value, type(each)) and value == each:
            return each
    _refuse(where, argument, expected or f"one of {tuple(choices)}", value)


def flag(where: str, argument: str, value: object, *, expected: str = "True or False") -> bool:
    """Return ``value`` as a bool; raise for anything else, since ``bool("no")`` is True."""
    plain = _plain(value)
    if type(plain) is not bool:
        _refuse(where, argument, expected, value, WrongKind)
    return plain


def require_flags(where: str, **flags: object) -> None:
    """Raise :class:`WrongKind` for the first keyword argument that is not a bool."""
    for argument, found in flags.items():
        flag(where, argument, found)


@contextlib.contextmanager
def renamed(where: str, **names: str) -> Iterator[None]:
    """Rename the function and the arguments in the messages of errors raised in a ``with`` block.

    A public function uses this to call another function whose arguments have other names.

    Args:
        where: function name that the messages begin with.
        names: new name for each argument name of the called function, as in ``inner="outer"``.
    """
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        kinds = (WrongKind, NotImplementedError, TypeError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        words = str(error)
        named, expected, rest = (words.partition(": ")[2] or words).partition(": expected")
        for inner, outer in names.items():
            named = re.sub(rf"\b{inner}(?=$|[:\[])", outer, named, count=1)
        raise kind(f"{where}: {named}{expected}{rest}") from error


# -------------------------------------------------------------------------------------------------
# Frozen dataclasses

#: Function that checks one field. Its arguments are ``where``, the field's name and the field's
#: value, and it returns the value to store.
Rule = Callable[[str, str, Any], Any]


def within(
    minimum: float | None = None, maximum: float | None = None, **more: Any
) -> Mapping[str, Any]:
    """Return bounds for a field, as keyword arguments of :func:`integer` or :func:`number`."""
    return {"minimum": minimum, "maximum": maximum, **more}


def check_fields(
    config: Any, table: Mapping[str, Rule | Mapping[str, Any]], where: str | None = None
) -> None:
    """Check the fields of a frozen dataclass and convert them to Python's numbers and bools.

    The annotation of a field selects its check: int, float, bool or a Literal, or one of these with
    ``| None``. An entry of the table adds bounds (:func:`within`), or is a rule that replaces the
    check. A field with another annotation is checked only if the table contains a rule for it.

    Args:
        config: instance of the dataclass, which calls this function in its ``__post_init__``.
        table: bounds or a rule by field name.
        where: name that the messages begin with; None uses the name of the class.
    """
    where = where or type(config).__name__
    kinds = _kinds(type(config))
    for name in {**kinds, **table}:
        value, entry = getattr(config, name), table.get(name, {})
        if callable(entry):
            kept = entry(where, name, value)
        else:
            rule, optional = kinds[name]
            kept = None if value is None and optional else rule(where, name, value, **entry)
        object.__setattr__(config, name, kept)


@functools.cache
def _kinds(config: type) -> dict[str, tuple[Callable[..., Any], bool]]:
    """Return the check that each field's annotation selects, and whether the field may be None.

    Fields with other annotations are left out.
    """
    found: dict[str, tuple[Callable[..., Any], bool]] = {}
    for name, hint in typing.get_type_hints(config).items():
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        parts = typing.get_args(hint) if union else (hint,)
        kind, *more = [part for part in parts if part is not types.NoneType]
        rule = {int: integer, float: number, bool: flag}.get(kind)
        if typing.get_origin(kind) is Literal:
            rule = functools.partial(choice, choices=typing.get_args(kind))
        if rule is not None and not more:
            found[name] = rule, len(parts) > 1
    return found


# -------------------------------------------------------------------------------------------------
# Tensors


def require_dim(op: str, argument: str, t: Tensor, letters: str) -> None:
    """Raise ValueError unless ``t`` has one dimension per letter, as in ``(B, K)``."""
    dims = len(letters.strip("(,)").split(","))
    require(t.dim() == dims, op, argument, f"shape {letters}", list(t.shape))


def require_shape(op: str, argument: str, t: Tensor, letters: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless ``t`` has this shape; ``letters`` describes it in the message."""
    holds = t.dim() == len(shape) and all(a == b for a, b in zip(t.shape, shape, strict=True))
    require(holds, op, argument, f"shape {letters} = {list(shape)}", list(t.shape))


def require_tensor(
    op: str,
    argument: str,
    t: Tensor,
    letters: str,
    shape: Sequence[int] | None,
    *dtypes: torch.dtype,
) -> None:
    """Raise ValueError unless ``t`` has this shape and one of these dtypes.

    If ``shape`` is None, only the number of dimensions is checked: one per letter.
    """
    if shape is None:
        require_dim(op, argument, t, letters)
    else:
        require_shape(op, argument, t, letters, shape)
    require_dtype(op, argument, t, *dtypes)


def require_dtype(op: str, argument: str, t: Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless the dtype of ``t`` is one of ``dtypes``."""
    require(t.dtype in dtypes, op, argument, " or ".join(map(str, dtypes)), t.dtype)


# -------------------------------------------------------------------------------------------------
# Types and messages


def _refuse(
    where: str,
    argument: str,
    expected: Words,
    found: object,
    error: type[ValueError] = ValueError,
) -> typing.NoReturn:
    if not isinstance(expected, str):
        expected = expected[0 if error is WrongKind else -1]
    raise error(f"{where}: {argument}: expected {expected}, found {found!r:.200}")


def _plain(value: Any) -> Any:
    """Convert a scalar of numpy or torch to a Python scalar; return other values unchanged."""
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        try:
            return value.item()
        except RuntimeError:  # The tensor has no values: it is on the meta device, for example.
            return value
    return value


def _whole(value: Any) -> int | None:
    if isinstance(value, bool) or hasattr(value, "dtype") or not hasattr(value, "__index__"):
        return None
    return operator.index(value)


def _real(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    whole = _whole(value)
    return float(value) if whole is None else whole


def _interval(
    minimum: float | None, maximum: float | None, above: float | None, below: float | None
) -> str:
    low = above if minimum is None else minimum
    high = below if maximum is None else maximum
    if low is not None and high is not None:
        opens, closes = "(" if minimum is None else "[", ")" if maximum is None else "]"
        return f"a number in {opens}{low}, {high}{closes}"
    if high is not None:
        return f"a number below {high}" if maximum is None else f"a number up to {high}"
    if low is None:
        return "a finite number"
    return f"a number above {low}" if minimum is None else f"a number from {low}"
