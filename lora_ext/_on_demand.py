"""Lazy imports: an import of the package has a budget of 300 ms, and a server needs few parts."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def on_demand(package: str, **files: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for ``package`` that imports a name when it is first used.

    ``files`` maps each file to its names, separated by blanks. For type checkers, the package also
    imports the names under ``TYPE_CHECKING``.
    """
    where = {name: file for file, names in files.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{where[name]}"), name)

    return get
