"""Parts of a package that are imported when they are first asked for: an import of the whole has a
budget of 300 ms, and a server needs few of them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def on_demand(package: str, **files: str) -> Callable[[str], Any]:
    """A ``__getattr__`` for the face of a package: ``files`` are names, with blanks between, by the
    file that has them. What a face shows to type checkers it imports under ``TYPE_CHECKING``
    besides."""
    where = {name: file for file, names in files.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{where[name]}"), name)

    return get
