"""Structure of ``lora_ext``: its rooms, their order, and the imports between them.

``python tools/house.py`` prints a table and the faults, and exits with 1 if there is one;
``--json`` prints one object. ``docs/house.md`` explains the rooms. import-linter checks the order
of layers, but not what an ``__init__.py`` exports, nor sizes and argument checks; here one program
measures all of them.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from measures import WIDE, Function, code_lines, is_private, measure, nodes, span

PACKAGE = "lora_ext"
ROOT = Path(__file__).resolve().parents[1]

# Bottom to top: each room with the rooms below it that it may import.
BELOW: dict[str, str] = {
    "reference": "",
    "ops": "reference",
    "rows": "ops",
    "kinds": "ops reference",
    "layers": "kinds rows ops",
    "adapter": "layers kinds rows ops",
    "pool": "adapter layers kinds rows ops",
    "circuits": "ops reference",
    "control": "circuits rows ops",
    "serving": "pool adapter layers kinds rows control ops",
    "federated": "adapter layers kinds rows ops",
    "methods": "federated adapter layers kinds rows control circuits ops reference",
    "interop": "methods serving pool federated adapter layers kinds rows control ops",
    "nn": "methods serving adapter layers rows ops",
    "tenants": "serving pool adapter layers rows ops",
    "server": "tenants serving pool layers",
    "cli": "server methods control interop federated pool adapter layers rows circuits ops "
    "reference",
}
MOST_FILES = 15  # Python files in one folder
MOST_LINES = 60  # lines of code in one function
MOST_CODE = 37_932  # lines of code of the package, docstrings, comments and blanks not counted
MOST_CHECKS = 0.0935  # share of lines of code that check arguments
MOST_TESTS = 75_408  # lines of tests/**/*.py
MOST_LOOSE = 0  # functions and classes without underscore that are in no __all__
MOST_WIDE = 22  # functions outside ops with more than eight parameters


class Import(NamedTuple):
    """Import of one name from another file of the package."""

    file: str  # dotted names of modules, `lora_ext.rows._context`
    target: str
    name: str


def modules(root: Path) -> dict[str, Path]:
    """Return every file of the package by the dotted name that imports it."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    """Return the room of a module; a file outside all rooms counts as a room with its name."""
    return module.split(".")[1] if "." in module else "__init__"


def names_of(package: str, face: Path) -> set[str]:
    """Return the names that a package's ``__init__`` imports with ``from``.

    Such a name hides a file with the same name, unless it is that file (``from . import layouts``).
    """
    imports = [n for n in nodes(face.read_text()) if isinstance(n, ast.ImportFrom)]
    shown = [node for node in imports if node.level or node.module != package]
    return {alias.asname or alias.name for node in shown for alias in node.names}


def imports_of(
    module: str, path: Path, known: dict[str, Path], shown: dict[str, set[str]]
) -> list[Import]:
    """Return a file's imports from the package, also those in functions and for annotations."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in nodes(path.read_text()):
        if isinstance(node, ast.Import):
            pairs = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                stem = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*stem, *([base] if base else [])])
            pairs = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, name in pairs:
            inside = room_of(base) == room_of(module)
            is_file = f"{base}.{name}" in known and (inside or name not in shown.get(base, ()))
            target = f"{base}.{name}" if is_file else base
            if target in known and target != module:
                found.append(Import(module, target, name))
    return found


def imports_in_full(module: str, path: Path) -> list[str]:
    """Return the absolute imports from the file's own room, which should be relative."""
    found = []
    for node in nodes(path.read_text()):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        own = f"{PACKAGE}.{room_of(module)}"
        found += [f"{module} -> {name}" for name in names if f"{name}.".startswith(f"{own}.")]
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of files that import each other in a circle.

    These are the strongly connected components of the import graph with more than one file.
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(file: str) -> None:
        index[file] = low[file] = len(index)
        stack.append(file)
        for target in sorted(edges.get(file, ())):
            if target not in index:
                visit(target)
                low[file] = min(low[file], low[target])
            elif target in stack:
                low[file] = min(low[file], index[target])
        if low[file] == index[file]:
            group = stack[stack.index(file) :]
            del stack[stack.index(file) :]
            if len(group) > 1:
                found.append(sorted(group))

    for file in sorted(edges):
        if file not in index:
            visit(file)
    return sorted(found)


def long_functions(path: Path) -> dict[str, int]:
    """Return functions above ``MOST_LINES`` lines; comments and docstrings do not count."""
    text = path.read_text()
    functions = [node for node in nodes(text) if isinstance(node, Function)]
    lines = {node.name: len(code_lines(text) & span(node)) for node in functions}
    return {name: n for name, n in lines.items() if n > MOST_LINES}


def full_folders(root: Path) -> dict[str, int]:
    """Return folders with more than ``MOST_FILES`` Python files."""
    counts = Counter(path.parent.relative_to(root) for path in (root / PACKAGE).rglob("*.py"))
    return {str(folder): n for folder, n in sorted(counts.items()) if n > MOST_FILES}


def methods_that_meet(imports: list[Import]) -> list[str]:
    """Return imports from one method into another."""
    pairs = [(i.file.split("."), i.target.split(".")) for i in imports]
    pairs = [(a, b) for a, b in pairs if len(a) > 2 and len(b) > 2 and a[1] == b[1] == "methods"]
    return sorted({f"{'.'.join(a)} -> {'.'.join(b)}" for a, b in pairs if a[2] != b[2]})


def survey(root: Path = ROOT) -> dict[str, object]:
    """Return all measurements of the package as one object."""
    known = modules(root)
    shown = {m: names_of(m, path) for m, path in known.items() if path.name == "__init__.py"}
    imports = [i for m, path in known.items() for i in imports_of(m, path, known, shown)]
    edges: dict[str, set[str]] = defaultdict(set)
    for i in imports:
        edges[i.file].add(i.target)
    rooms: dict[str, dict] = {}
    for module, path in known.items():
        room = rooms.setdefault(
            room_of(module),
            {"files": 0, "lines": 0, "long_functions": {}, "arrows": Counter(), "past_the_face": 0},
        )
        room["files"] += 1
        room["lines"] += len(path.read_text().splitlines())
        for name, lines in long_functions(path).items():
            room["long_functions"][f"{module}.{name}"] = lines
    up, past = set(), set()
    for i in imports:
        here, there = room_of(i.file), room_of(i.target)
        if here == there:
            continue
        rooms[here]["arrows"][there] += 1
        if here in BELOW and there in BELOW:
            if there not in BELOW[here].split():
                up.add(f"{i.file} -> {i.target}")
            if known[i.target].name != "__init__.py":
                past.add(f"{i.file} -> {i.target}")
                rooms[here]["past_the_face"] += 1
    sizes = {module: measure(path) for module, path in known.items()}
    shown_anywhere = {name for size in sizes.values() for name in size.shown}
    bodies = [lines for size in sizes.values() for lines in size.bodies]
    return {
        "code_lines": sum(len(size.code) for size in sizes.values()),
        "check_lines": sum(len(size.checks) for size in sizes.values()),
        "test_lines": sum(
            len(path.read_text().splitlines()) for path in (root / "tests").rglob("*.py")
        ),
        "median_body": statistics.median(bodies or [0]),
        "loose_names": [
            f"{module}.{name}"
            for module, size in sizes.items()
            if not is_private(module)
            for name in size.public
            if name not in shown_anywhere
        ],
        "wide_functions": {
            f"{module}.{name}": n
            for module, size in sizes.items()
            if room_of(module) != "ops"
            for name, n in size.wide.items()
        },
        "files": len(known),
        "lines": sum(room["lines"] for room in rooms.values()),
        "circles": circles(edges),
        "arrows_up": sorted(up),
        "past_the_face": sorted(past),
        "in_full": [found for m, path in known.items() for found in imports_in_full(m, path)],
        "methods_that_meet": methods_that_meet(imports),
        "full_folders": full_folders(root),
        "rooms": {name: rooms[name] for name in sorted(rooms)},
    }


def faults(house: dict) -> dict[str, list]:
    """Return the faults of a survey, each with the places where it was found."""
    code, checks = house["code_lines"], house["check_lines"]
    wide = [f"{k}: {n}" for k, n in house["wide_functions"].items()]
    loose = house["loose_names"]
    long = {k: n for room in house["rooms"].values() for k, n in room["long_functions"].items()}
    return {
        "import cycles": [" <-> ".join(group) for group in house["circles"]],
        "imports from a higher room": house["arrows_up"],
        "imports that bypass the __init__ of a room": house["past_the_face"],
        "imports inside a room that are not relative": house["in_full"],
        "methods that import a method": house["methods_that_meet"],
        f"folders with more than {MOST_FILES} files": [
            f"{folder}: {n}" for folder, n in house["full_folders"].items()
        ],
        f"functions above {MOST_LINES} lines of code": [f"{k}: {n}" for k, n in long.items()],
        f"lines of code above {MOST_CODE}": [str(code)] if code > MOST_CODE else [],
        f"share of checks above {MOST_CHECKS:.1%}": (
            [f"{checks} of {code}"] if checks > MOST_CHECKS * code else []
        ),
        f"lines of tests above {MOST_TESTS}": (
            [str(house["test_lines"])] if house["test_lines"] > MOST_TESTS else []
        ),
        f"names in no __all__ above {MOST_LOOSE}": loose if len(loose) > MOST_LOOSE else [],
        f"functions with more than {WIDE} parameters above {MOST_WIDE}": (
            wide if len(wide) > MOST_WIDE else []
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    house = survey()
    wrong = {what: places for what, places in faults(house).items() if places}
    if parser.parse_args().json:
        print(json.dumps(house, indent=1))
        return 1 if wrong else 0
    print(f"{'room':12}{'files':>6}{'lines':>7}  imports from")
    for name in [*BELOW, *(r for r in house["rooms"] if r not in BELOW)]:
        if name in house["rooms"]:
            room = house["rooms"][name]
            arrows = ", ".join(f"{to} {n}" for to, n in sorted(room["arrows"].items()))
            print(f"{name:12}{room['files']:6}{room['lines']:7}  {arrows}")
    print(f"{'all':12}{house['files']:6}{house['lines']:7}")
    code, checks = house["code_lines"], house["check_lines"]
    print(f"lines of code {code}, checks {checks} ({checks / code:.1%}),")
    print(f"lines of tests {house['test_lines']},")
    print(f"median body of a function {house['median_body']:.0f} lines,")
    print(f"names in no __all__ {len(house['loose_names'])},")
    print(f"functions with more than {WIDE} parameters {len(house['wide_functions'])}")
    for what, places in wrong.items():
        print(f"\n{len(places)} {what}:", *places, sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
