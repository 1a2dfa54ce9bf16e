"""Whose names a call of an attached model goes by."""

from __future__ import annotations

from lora_ext.nn.assignment import Names
from lora_ext.nn.attachment import pool_handle
from lora_ext.nn.context import current
from lora_ext.nn.pool_layer import ERROR, no_block
from lora_ext.pool import AdapterPool


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
