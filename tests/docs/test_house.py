"""docs/house.md says what is so: its rooms are the tool's, its steps name code that is there."""

import ast
import re
import sys

import pytest
from scripts import ROOT

sys.path.append(str(ROOT / "tools"))
import house

PAGE = (ROOT / "docs/house.md").read_text()
_STEP = re.compile(r"^\d+\. `([^`]+)`: `([^`]+)`", re.MULTILINE)


def section(title: str) -> str:
    """The text of the section, without those below the next heading of its level."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of the section's table, without its head."""
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


def test_the_table_of_rooms_is_that_of_the_tool() -> None:
    told = {room.strip("`"): set(re.findall(r"\w+", below)) for room, _, below in rows("Rooms")}
    assert told == {room: set(below.split()) for room, below in house.BELOW.items()}


def test_a_room_that_the_page_tells_of_is_there_or_still_to_come() -> None:
    there = {p.parent.name for p in (ROOT / "lora_ext").glob("*/__init__.py")}
    assert there <= house.BELOW.keys()


@pytest.mark.parametrize(("file", "name"), sorted(set(PLACES)))
def test_code_that_the_page_names_is_there(file: str, name: str) -> None:
    text = (ROOT / file).read_text()
    if not file.endswith(".py"):
        assert re.search(rf"\b{re.escape(name)}\b", text), f"{file} has no {name}"
        return
    body: list[ast.stmt] = ast.parse(text).body
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        assert found, f"{file} defines no {name}"
        body = getattr(found[0], "body", [])


def test_there_are_five_doors_of_at_most_eight_steps() -> None:
    assert list(DOORS) == ["Serving", "Training", "Scan", "Head", "Federation"]
    for door, part in zip(DOORS, section("The five doors").split("\n### ")[1:], strict=True):
        items = re.findall(r"^\d+\.", part, re.MULTILINE)
        assert 1 < len(DOORS[door]) == len(items) <= 8, door


def test_the_way_into_a_pool_has_at_most_ten_stays_and_never_goes_back() -> None:
    files = [file for file, _ in LOADING]
    assert 1 < len(files) <= 10 and len(set(files)) == len(files)


def test_the_glossary_has_at_most_forty_words_and_each_once() -> None:
    words = [word for word, _ in rows("Words")]
    assert words == sorted(set(words)) and 30 < len(words) <= 40


def test_files_of_the_package_are_named_where_they_are() -> None:
    for file in set(re.findall(r"`((?:lora_ext|csrc|tools|tests)/[\w/.]+\.\w+)`", PAGE)):
        assert (ROOT / file).exists(), file
