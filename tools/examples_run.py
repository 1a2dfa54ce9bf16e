"""Find the public names that tested examples use; ``python tools/examples_run.py`` counts them.

Tests run the Python blocks of the README and of the pages, the cells of the tutorials, and the
scripts in ``examples/`` that a test names. A name counts as used if such code imports it, or reads
it from an imported package. The code is parsed, not imported.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import lru_cache

from faces import ROOT, face_file, origin, shown

_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
_RUN = re.compile(r'(?:run_quickly\(\w+, |"examples", )"(\w+)"')


def sources() -> Iterator[tuple[str, str]]:
    """Yield path and code of everything that tests run, pages first."""
    docs = ROOT / "docs"
    for page in (*sorted(docs.rglob("*.md")), ROOT / "README.md"):
        if blocks := _BLOCK.findall(page.read_text()):
            yield str(page.relative_to(ROOT)), "\n".join(blocks)
    for path in sorted((docs / "tutorials").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        yield str(path.relative_to(ROOT)), "\n".join(code)
    tests = [file.read_text() for file in (ROOT / "tests").rglob("test_*.py")]
    for name in sorted({name for text in tests for name in _RUN.findall(text)}):
        if (path := ROOT / f"examples/{name}.py").exists():
            yield str(path.relative_to(ROOT)), path.read_text()


def used(code: str) -> set[str]:
    """Return the definitions in lora_ext that the code uses."""
    tree = ast.parse(code)
    known: dict[str, list[str]] = {}  # name in the code: possible paths
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                known[alias.asname or first] = [alias.name if alias.asname else first]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                known[alias.asname or alias.name] = [f"{node.module}.{alias.name}"]
    found = {path for paths in known.values() for path in paths if path.startswith("lora_ext.")}
    for node in ast.walk(tree):  # one block for several packages: `for each in (ops, reference):`
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            several = node.iter.elts if isinstance(node.iter, ast.Tuple) else []
            paths = [p for e in several if isinstance(e, ast.Name) for p in known.get(e.id, [])]
            known.setdefault(node.target.id, []).extend(paths)
    for node in ast.walk(tree):
        chain, inner = [], node
        while isinstance(inner, ast.Attribute):
            chain.append(inner.attr)
            inner = inner.value
        if chain and isinstance(inner, ast.Name) and inner.id in known:
            for first in known[inner.id]:
                path = ".".join([first, *reversed(chain)])
                if path.startswith("lora_ext."):
                    found.add(path)
    return {_defined(path) for path in found}


def _defined(path: str) -> str:
    """Return where the first name after the packages of ``path`` is defined; ``path`` if none."""
    package, *names = path.split(".")
    while names and face_file(f"{package}.{names[0]}").exists():
        package = f"{package}.{names.pop(0)}"
    return origin(f"{package}.{names[0]}") if names else package


@lru_cache
def in_use() -> dict[str, list[str]]:
    """Return the files that use each public name, in a dict whose keys are definitions."""
    found: dict[str, list[str]] = {}
    for path, code in sources():
        for place in used(code) & shown().keys():
            found.setdefault(place, []).append(path)
    return found


def public() -> set[str]:
    """Return the definitions of all public names; packages are not counted."""
    return {place for place, package in shown().items() if place != package}


def without() -> list[str]:
    """Return the public names that no example uses."""
    return sorted(public() - in_use().keys())


if __name__ == "__main__":
    bare = without()
    count = len(public()) - len(bare)
    print(f"{count} of {len(public())} public names are used by tested code; unused:")
    print("\n".join(bare))
