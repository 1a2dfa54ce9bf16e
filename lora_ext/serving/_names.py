"""Choice of the adapter names of a call of an attached model.

A call uses its argument ``adapter_names=``; without it the names of the surrounding block; without
a block the default of ``attach``. Calls whose names another package has dropped are rejected, as
the base model would answer them.
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
    """Names of the calls of an attached model.

    Args:
        pool: pool of the model.
        default: argument of ``attach``.
    """

    def __init__(self, pool: AdapterPool, default: str | None):
        self.pool, self.default = pool, default
        self.handle = pool_handle(pool)

    def block(self, names: Names) -> contextlib.AbstractContextManager[Any]:
        """Return the block of a call with these names; None keeps the surrounding block."""
        return contextlib.nullcontext() if names is None else of_call(names, pool=self.pool)

    def of_call(self, given: Names) -> Names:
        """Return the names of a call: the given ones, or the default outside every block.

        Raises:
            RuntimeError: If the default is "error" and used.
        """
        if given is not None or self.default is None or current(self.handle) is not None:
            return given
        if self.default == ERROR:
            raise no_block()
        return self.default

    def of_requests(self, where: str, given: Names, count: int) -> list[str | None]:
        """Return a name per request: the given ones, those of the block, or the default.

        The base model is None or :data:`BASE`, as in a block.

        Args:
            where: name of the function, for messages.
            given: one name for all, one per request, or None.
            count: number of requests.

        Raises:
            ValueError: If the number of names differs, or the block names tokens.
            UnknownAdapterError: If the pool lacks a name.
            RuntimeError: If no names are given and the default is "error".
        """
        given = self.of_call(given)
        block = current(self.handle) if given is None else None
        if block is not None:
            shape = block.assignment.shape
            if len(shape) > 1 or not isinstance(block.assignment.places, tuple):
                raise ValueError(
                    f"{where}: expected a block with one name per request, found names of tokens, "
                    f"{list(shape)}"
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
                self.pool.acquire([name])  # raises with the reason
        return names

    def check_invoked(self, where: str, prompts: Sequence[NamedPrompt]) -> None:
        """Raise ValueError for the first prompt without the invocation of its adapter."""
        for i, prompt in enumerate(prompts):
            name, allowed = prompt.adapter, prompt.allow_base
            invocation = () if name in (None, BASE) or allowed else self.pool.invocation(name)
            if invocation and last_start(torch.tensor([prompt]), invocation) == [None]:
                raise not_invoked(f"{where}: inputs[{i}]", name, invocation)


class NamedPrompt(list[int]):
    """Prompt with its adapter, passed through ``generate_batch`` and ``add_requests``."""

    adapter: str | None
    allow_base: bool  # use the base model if the prompt lacks the adapter's invocation
    errors: list[BaseException]  # errors of all prompts, which generate_batch only logs


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
