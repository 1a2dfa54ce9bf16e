"""Choice of the adapter names for a call of an attached model.

A call uses its argument ``adapter_names=``. Without this argument it uses the names of the
surrounding block, and without a block the default of ``attach``. If a pipeline has dropped the
names of a call, the call raises an error (``_pipelines.py``) instead of using the base model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from lora_ext._checks import require
from lora_ext.pool import AdapterPool
from lora_ext.rows import ERROR, Entry, Names, _context, _entries, last_start, no_block, pool_handle


class CallNames:
    """Choice of the adapter names for calls of an attached model.

    Args:
        pool: pool of the model.
        default: see :func:`attach`.
    """

    def __init__(self, pool: AdapterPool, default: Entry):
        self.pool, self.default = pool, default
        self.handle = pool_handle(pool)

    def block(self, names: Names) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager that enters a block with these names unless they are None."""
        if names is None:
            return contextlib.nullcontext()
        return _context.of_call(names, pool=self.pool)

    def of_call(self, given: Names) -> Names:
        """Return ``given``, or the default if ``given`` is None and there is no block.

        Raises:
            RuntimeError: If the default is needed and is "error".
        """
        if given is not None or self.default is None or _context.current(self.handle) is not None:
            return given
        if self.default == ERROR:
            raise no_block()
        return self.default

    def of_requests(self, where: str, given: Names, count: int) -> list[Entry]:
        """Return one entry per request: the given names, those of the block, or the default.

        None and :data:`BASE` stand for the base model, as in a block.

        Args:
            where: name of the function, for messages.
            given: one name for all requests, one name per request, or None.
            count: number of requests.

        Raises:
            ValueError: If the number of names is not ``count``, the block has names per token, or
                an entry is invalid; TypeError if a weight is not a number.
            UnknownAdapterError: If the pool lacks a name.
            RuntimeError: If the default is needed and is "error".
        """
        given = self.of_call(given)
        block = _context.current(self.handle) if given is None else None
        if block is not None:
            shape = block.assignment.shape
            if len(shape) > 1 or not isinstance(block.assignment.places, tuple):
                raise ValueError(
                    f"{where}: expected a block with one name per request, found names per token, "
                    f"of shape {list(shape)}"
                )
            given = block.assignment.spelled()
            given = given if shape else given[0]
        names: list[Any] = [given] * count if _entries.is_entry(given) else list(given or ())
        source = "adapter_names" if block is None else "names of the block"
        expected = f"one name for each of {count} requests"
        require(len(names) == count, where, source, expected, len(names))
        for entry in names:
            fits = _entries.is_entry(entry)
            require(fits, where, "adapter_names", "str or None", f"{entry!r:.200}")
            _entries.members_of(entry, f"{where}: adapter_names")  # raises for an invalid entry
            for name in _entries.names_in(entry):
                if name not in self.pool:
                    self.pool.acquire([name])  # raises an error with close matches
        return names

    def check_invoked(self, where: str, prompts: Sequence[NamedPrompt]) -> None:
        """Raise ValueError if a prompt lacks the tokens (invocation) that activate its adapter.

        Prompts with ``allow_base`` are not checked.
        """
        for i, prompt in enumerate(prompts):
            members = () if prompt.allow_base else _entries.members_of(prompt.adapter, where)
            for name, _ in members:
                invocation = self.pool.invocation(name)
                if invocation and last_start(torch.tensor([prompt]), invocation) == [None]:
                    raise not_invoked(f"{where}: inputs[{i}]", name, invocation)


class NamedPrompt(list[int]):
    """Prompt with an adapter name, passed through ``generate_batch`` and ``add_requests``."""

    adapter: Entry
    allow_base: bool  # whether to use the base model if the prompt lacks the invocation
    errors: list[BaseException]  # errors of all prompts; transformers would only log them


def not_invoked(where: str, name: Entry, invocation: Sequence[int]) -> ValueError:
    """Return the error for a prompt without the invocation of its activated adapter."""
    return ValueError(
        f"{where}: expected the invocation {list(invocation)!r:.200} of adapter {name!r} in the "
        "prompt, found none; pass allow_base=True to use the base model for such prompts"
    )


def named_prompts(
    inputs: Sequence[Sequence[int]], names: Sequence[Entry], allow_base: bool = False
) -> list[NamedPrompt]:
    """Return prompts with their adapter names and one shared list of errors."""
    prompts = [NamedPrompt(map(int, ids)) for ids in inputs]
    errors: list[BaseException] = []
    for prompt, name in zip(prompts, names, strict=True):
        prompt.adapter, prompt.allow_base, prompt.errors = name, allow_base, errors
    return prompts
