"""Whose names a call of an attached model goes by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_ext.pool import AdapterPool
from lora_ext.rows import BASE, ERROR, Names, current, no_block, pool_handle


def refuse_singular(where: str, given: Mapping[str, Any]) -> None:
    """Refuse what a model would swallow, as it does all arguments that it does not know: the base
    model would answer.

    Raises:
        TypeError: ``adapter_name``.
    """
    if "adapter_name" in given:
        raise TypeError(
            f"{where}: expected adapter_names=, a name or one for each row, found "
            f"adapter_name={given['adapter_name']!r:.200}"
        )


def names_of_call(given: Names, pool: AdapterPool, default: str | None) -> Names:
    """The names of a call: those that it gives, or the default of ``attach`` outside every block.

    Raises:
        RuntimeError: the default is "error".
    """
    if given is not None or default is None or current(pool_handle(pool)) is not None:
        return given
    if default == ERROR:
        raise no_block()
    return default


def request_names(
    where: str, given: Names, count: int, pool: AdapterPool, default: str | None
) -> list[str | None]:
    """A name per request: those given, or those of the block around, or the default of ``attach``.

    Args:
        where: the function, for messages. given: one name for all, one per request, or None.
        count: of requests. pool, default: of the attached model.

    Raises:
        ValueError: another number of names, or a block that names tokens. UnknownAdapterError: a
            name that the pool lacks. RuntimeError: no name anywhere, and the default is "error".
    """
    given = names_of_call(given, pool, default)
    block = current(pool_handle(pool)) if given is None else None
    if block is not None:
        shape = block.assignment.shape
        if len(shape) > 1 or not isinstance(block.assignment.places, tuple):
            raise ValueError(
                f"{where}: expected a block with one name per request, found names of tokens"
            )
        given = block.assignment.spelled()
        given = given if shape else given[0]
    names = [given] * count if given is None or isinstance(given, str) else list(given)
    if len(names) != count:
        source = "adapter_names" if block is None else "names of the block"
        raise ValueError(
            f"{where}: {source}: expected one for each of {count} requests, found {len(names)}"
        )
    for name in names:
        if name is not None and not isinstance(name, str):
            raise ValueError(f"{where}: adapter_names: expected str or None, found {name!r:.200}")
        if name not in (None, BASE) and name not in pool:
            pool.acquire([name])  # says what is wrong with it
    return names  # pyright: ignore[reportReturnType]


class NamedPrompt(list[int]):
    """A prompt with its adapter, on its way through ``generate_batch`` and ``add_requests``."""

    def __init__(self, tokens: Iterable[int], adapter: str | None, errors: list[BaseException]):
        super().__init__(map(int, tokens))
        self.adapter = adapter
        self.errors = errors  # what befell one: generate_batch itself only logs it


def named_prompts(
    inputs: Sequence[Sequence[int]], names: Sequence[str | None]
) -> list[NamedPrompt]:
    """Prompts with their adapters, and one list for all that befalls them."""
    errors: list[BaseException] = []
    return [NamedPrompt(ids, name, errors) for ids, name in zip(inputs, names, strict=True)]
