"""Lazy imports, which keep ``import lora_ext`` below 300 ms: a server needs only a few parts."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def on_demand(package: str, **files: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for ``package`` that imports a name when it is first used.

    For type checkers, the package must also import the names under ``TYPE_CHECKING``.

    Args:
        package: full name of the package.
        files: names that are defined in each module of the package, separated by blanks.
    """
    where = {name: file for file, names in files.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{where[name]}"), name)

    return get
