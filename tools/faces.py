"""Public names of the packages, read from their faces without an import.

A face is an ``__init__.py``. The names in its ``__all__`` are public, and the reference shows them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]
ASKED = re.compile(r"^::: (?P<name>[\w.]+)\n(?!    )", re.MULTILINE)


@lru_cache
def places(package: str) -> dict[str, str]:
    """Return the path of the definition of each name that a package's face defines or imports."""
    found: dict[str, str] = {}
    for node in _statements(ast.parse(face_file(package).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level < 2:
            here = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            for alias in node.names:
                place = f"{here}.{alias.name}"
                found[alias.asname or alias.name] = place if here == package else origin(place)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.setdefault(node.name, f"{package}.{node.name}")
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, f"{package}.{node.targets[0].id}")
    return found


def _statements(tree: ast.Module | ast.If | ast.Try) -> Iterator[ast.stmt]:
    """Yield the statements that run at import, and those under ``if TYPE_CHECKING``."""
    for node in tree.body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node)


def face(package: str) -> dict[str, str]:
    """Return the names of a package's ``__all__``, each with the place that defines it."""
    for node in ast.parse(face_file(package).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return {name: places(package)[name] for name in ast.literal_eval(node.value)}
    return {}


def face_file(package: str) -> Path:
    return ROOT / package.replace(".", "/") / "__init__.py"


def origin(place: str) -> str:
    """Return the path of a definition by following a name through the faces that re-export it."""
    package, _, name = place.rpartition(".")
    if package.startswith("lora_ext") and face_file(package).exists():
        return places(package).get(name, place)
    return place


@lru_cache
def shown() -> dict[str, str]:
    """Return a dict from definitions to the packages whose reference pages show them."""
    pages = sorted((ROOT / "docs/reference").rglob("*.md"))
    asked = [found["name"] for page in pages for found in ASKED.finditer(page.read_text())]
    found = {package: package for package in asked}
    faces = {package: face(package) for package in asked if face_file(package).exists()}
    # The deepest package shows a name; an outer package shows only the remaining names.
    for package in sorted(faces, key=lambda package: -package.count(".")):
        for place in faces[package].values():
            if place.startswith(f"{package}."):
                found.setdefault(place, package)
    for package, names in faces.items():
        for place in names.values():
            found.setdefault(place, package)
    return found
