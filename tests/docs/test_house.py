"""Check docs/house.md, and the rooms (subpackages) of the package, with ``tools/house.py``."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ROOT, tool

house = tool("house")

LOOSE = f"names in no __all__ above {house.MOST_LOOSE}"


@pytest.fixture(scope="module")
def found() -> dict[str, list]:
    return house.faults(house.survey())


@pytest.mark.slow
@pytest.mark.parametrize("what", sorted(house.faults(house.survey(ROOT / "no such folder"))))
def test_package_breaks_no_rule_of_the_tool(found: dict[str, list], what: str) -> None:
    assert not found[what]


def test_rooms_import_only_rooms_below_them() -> None:
    folders = {p.parent.name for p in (ROOT / "lora_ext").glob("*/__init__.py")}
    assert folders <= house.BELOW.keys()
    order = list(house.BELOW)
    for room, below in house.BELOW.items():
        assert all(order.index(other) < order.index(room) for other in below.split()), room


def planted(tmp_path: Path, files: dict[str, str], ignored: str = LOOSE) -> dict[str, list]:
    for name, text in files.items():
        path = tmp_path / "lora_ext" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = house.faults(house.survey(tmp_path))
    return {what: places for what, places in found.items() if places and what != ignored}


CIRCLE = {
    "rows/__init__.py": "",
    "rows/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import B\n",
    "rows/b.py": "def f():\n    from . import a\n",
}
UP = {
    "ops/__init__.py": "from .lora import f\n",
    "ops/lora.py": "from lora_ext.rows import g\n\ndef f(): ...\n",
    "rows/__init__.py": "from .ids import g\n",
    "rows/ids.py": "def g():\n    from lora_ext.ops.lora import f\n",
    "layers/a.py": "from lora_ext.rows import g\nfrom lora_ext.ops import f\n",
}
INSIDE = {
    "rows/__init__.py": "from .b import g\n",
    "rows/a.py": "import lora_ext.rows.b\ndef f():\n    from lora_ext.rows.b import g\n",
    "rows/b.py": "from lora_ext import rows\nfrom lora_ext.rows_of import h\n",
}
METHODS = {f"methods/{m}/__init__.py": "" for m in ("one", "two")}
METHODS["methods/one/a.py"] = "from .. import two\n"


@pytest.mark.parametrize(
    ("files", "faults"),
    [
        (CIRCLE, {"import cycles": "rows.a <-> rows.b"}),
        (
            UP,
            {
                "import cycles": "ops.lora <-> rows <-> rows.ids",
                "imports from a higher room": "ops.lora -> rows",
                "imports that bypass the __init__ of a room": "rows.ids -> ops.lora",
            },
        ),
        (
            INSIDE,
            {
                "import cycles": "rows <-> rows.b",
                "imports inside a room that are not relative": (
                    "rows.a -> rows.b, rows.a -> rows.b.g, rows.b -> rows"
                ),
            },
        ),
        (METHODS, {"methods that import a method": "methods.one.a -> methods.two"}),
    ],
    ids=["circles", "up and past a face", "inside a room", "between methods"],
)
def test_imports_that_break_a_rule_are_found(tmp_path, files, faults) -> None:
    found = planted(tmp_path, files)
    assert {w: ", ".join(p).replace("lora_ext.", "") for w, p in found.items()} == faults


def test_full_folders_and_long_functions_are_found(tmp_path: Path) -> None:
    body = "    # said\n    x = 1\n"
    files = {f"pool/f{i}.py": "" for i in range(16)}
    files["rows/a.py"] = f'def short():\n    """\n{60 * "said"}\n    """\n{59 * body}'
    files["rows/b.py"] = f"def long():\n{60 * body}"
    assert planted(tmp_path, files) == {
        "folders with more than 15 files": ["lora_ext/pool: 16"],
        "functions above 60 lines of code": ["lora_ext.rows.b.long: 61"],
    }


def test_names_checks_and_parameters_are_counted(tmp_path: Path) -> None:
    parameters = ", ".join("abcdefghi")
    files = {
        "rows/__init__.py": "from .a import g\n\n__all__ = ['g']\n",
        "rows/a.py": f'"""Say it."""\ndef g(self, {parameters}):\n    return a\nclass H: ...\n',
        "rows/_b.py": "def f(a):\n    # a comment\n    if not a:\n        raise ValueError\n",
    }
    wrong = planted(tmp_path, files, ignored="")
    found = house.survey(tmp_path)
    assert (found["code_lines"], found["check_lines"], found["median_body"]) == (8, 2, 1.5)
    assert found["wide_functions"] == {"lora_ext.rows.a.g": 9}
    assert wrong[LOOSE] == found["loose_names"] == ["lora_ext.rows.a.H"]
    assert "lora_ext.rows.a.g: 9" not in str(wrong) and house.MOST_WIDE > 1


@pytest.mark.slow
def test_program_prints_one_object() -> None:
    command = [sys.executable, "tools/house.py", "--json"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    found = json.loads(out.stdout)
    assert {"files", "lines", "circles", "arrows_up", "rooms"} <= found.keys()
    assert found["files"] == sum(room["files"] for room in found["rooms"].values())
    assert found["lines"] == sum(room["lines"] for room in found["rooms"].values())


PAGE = (ROOT / "docs/house.md").read_text()
_STEP = re.compile(r"^\d+\. `([^`]+)`: `([^`]+)`", re.MULTILINE)


def section(title: str) -> str:
    """Return the text of a section, up to the next heading of the same level."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """Return the cells of the table in a section, without the table header."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


DOORS = {
    part.split("\n")[0]: _STEP.findall(part)
    for part in section("The five doors").split("\n### ")[1:]
}
LOADING = _STEP.findall(section("How an adapter gets into a pool"))
PLACES = [
    *(step for steps in (*DOORS.values(), LOADING) for step in steps),
    *((file.strip("`"), name.strip("`")) for _, file, name in rows("Where to find it")),
]


def test_table_of_rooms_equals_the_tool_and_the_rooms_exist() -> None:
    told = {room.strip("`"): set(re.findall(r"\w+", below)) for room, _, below in rows("Rooms")}
    assert told == {room: set(below.split()) for room, below in house.BELOW.items()}
    there = {p.parent.name for p in (ROOT / "lora_ext").glob("*/__init__.py")}
    assert there <= house.BELOW.keys()


@pytest.mark.parametrize(("file", "name"), sorted(set(PLACES)))
def test_code_that_the_page_names_exists(file: str, name: str) -> None:
    text = (ROOT / file).read_text()
    if not file.endswith(".py"):
        assert re.search(rf"\b{re.escape(name)}\b", text), f"{file}: expected the text {name}"
        return
    body: list[ast.stmt] = ast.parse(text).body
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        assert found, f"{file}: expected a definition of {name}"
        body = getattr(found[0], "body", [])


def test_page_describes_five_entry_points_in_at_most_eight_steps() -> None:
    assert list(DOORS) == ["Serving", "Training", "Scan", "Head", "Federation"]
    for door, part in zip(DOORS, section("The five doors").split("\n### ")[1:], strict=True):
        items = re.findall(r"^\d+\.", part, re.MULTILINE)
        assert 1 < len(DOORS[door]) == len(items) <= 8, door


def test_path_into_a_pool_and_glossary_are_short() -> None:
    files = [file for file, _ in LOADING]
    assert 1 < len(files) <= 10 and len(set(files)) == len(files)
    words = [word for word, _ in rows("Words")]
    assert words == sorted(set(words)) and 30 < len(words) <= 40


def test_files_that_the_page_names_exist() -> None:
    for file in set(re.findall(r"`((?:lora_ext|csrc|tools|tests)/[\w/.]+\.\w+)`", PAGE)):
        assert (ROOT / file).exists(), file
