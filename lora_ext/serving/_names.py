"""Whose names a call of an attached model goes by: this is the one place that says it.

A call goes by names of its own, ``adapter_names=``; without them by those of the block around it;
without a block by the default of ``attach``. Calls whose names somebody else has dropped on the way
are refused, as the base model would answer them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from lora_ext._checks import require
from lora_ext.pool import AdapterPool
from lora_ext.rows import (
    BASE,
    ERROR,
    Names,
    current,
    last_start,
    no_block,
    of_call,
    pool_handle,
)


class CallNames:
    """The names of the calls of an attached model.

    Args:
        pool: of the model. default: of ``attach``.
    """

    def __init__(self, pool: AdapterPool, default: str | None):
        self.pool, self.default = pool, default
        self.handle = pool_handle(pool)

    def block(self, names: Names) -> contextlib.AbstractContextManager[Any]:
        """Return the block of a call with these names; None stays in the block around."""
        return contextlib.nullcontext() if names is None else of_call(names, pool=self.pool)

    def of_call(self, given: Names) -> Names:
        """Return the names of a call: the given ones, or the default outside every block.

        Raises:
            RuntimeError: the default is "error".
        """
        if given is not None or self.default is None or current(self.handle) is not None:
            return given
        if self.default == ERROR:
            raise no_block()
        return self.default

    def of_requests(self, where: str, given: Names, count: int) -> list[str | None]:
        """Return a name per request: the given ones, those of the block around, or the default.

        Args:
            where: the function, for messages. given: one name for all, one per request, or None.
            count: of requests.

        Raises:
            ValueError: another number of names, or a block that names tokens. UnknownAdapterError:
                a name that the pool lacks. RuntimeError: no name, and the default is "error".
        """
        given = self.of_call(given)
        block = current(self.handle) if given is None else None
        if block is not None:
            shape = block.assignment.shape
            if len(shape) > 1 or not isinstance(block.assignment.places, tuple):
                raise ValueError(
                    f"{where}: expected a block with one name per request, found names of tokens"
                )
            given = block.assignment.spelled()
            given = given if shape else given[0]
        names: list[Any] = (
            [given] * count if given is None or isinstance(given, str) else list(given)
        )
        source = "adapter_names" if block is None else "names of the block"
        expected = f"one for each of {count} requests"
        require(len(names) == count, where, source, expected, len(names))
        for name in names:
            fits = name is None or isinstance(name, str)
            require(fits, where, "adapter_names", "str or None", f"{name!r:.200}")
            if name not in (None, BASE) and name not in self.pool:
                self.pool.acquire([name])  # says what is wrong with it
        return names

    def check_invoked(self, where: str, prompts: Sequence[NamedPrompt]) -> None:
        """Refuse a prompt without the invocation of its adapter, before any of them is served.

        Raises:
            ValueError: naming the first such adapter and request.
        """
        for i, prompt in enumerate(prompts):
            name, allowed = prompt.adapter, prompt.allow_base
            invocation = () if name in (None, BASE) or allowed else self.pool.invocation(name)
            if invocation and last_start(torch.tensor([prompt]), invocation) == [None]:
                raise not_invoked(f"{where}: inputs[{i}]", name, invocation)


class NamedPrompt(list[int]):
    """A prompt with its adapter, on its way through ``generate_batch`` and ``add_requests``."""

    adapter: str | None
    allow_base: bool  # where it lacks the adapter's invocation
    errors: list[BaseException]  # what befell one: generate_batch itself only logs it


def not_invoked(where: str, name: str | None, invocation: Sequence[int]) -> ValueError:
    """Return the error for a prompt without the invocation of its activated adapter."""
    return ValueError(
        f"{where}: expected the invocation {list(invocation)!r:.200} of adapter {name!r} in the "
        "prompt, found none; allow_base=True lets the base model serve it"
    )


def named_prompts(
    inputs: Sequence[Sequence[int]], names: Sequence[str | None], allow_base: bool = False
) -> list[NamedPrompt]:
    """Return prompts with their adapters and one list for the errors of all of them."""
    prompts = [NamedPrompt(map(int, ids)) for ids in inputs]
    errors: list[BaseException] = []
    for prompt, name in zip(prompts, names, strict=True):
        prompt.adapter, prompt.allow_base, prompt.errors = name, allow_base, errors
    return prompts
