"""Every room and every method has a page of the reference. `make docs` builds and checks them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))
from examples_run import in_use, used, without  # noqa: E402  # tools is no package

PAGES = sorted((ROOT / "docs/reference").rglob("*.md"))
ASKED = {name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)}
ROOMS = [f"lora_ext.{p.parent.name}" for p in sorted((ROOT / "lora_ext").glob("*/__init__.py"))]
METHODS = [
    f"lora_ext.methods.{p.parent.name}"
    for p in sorted((ROOT / "lora_ext/methods").glob("*/__init__.py"))
]


@pytest.mark.parametrize("package", ["lora_ext", *ROOMS, *METHODS])
def test_a_page_of_the_reference_asks_for_the_names_of(package: str) -> None:
    assert package in ASKED, f"write docs/reference/{package.partition('.')[2]}.md with its line"


def test_the_navigation_has_every_page_of_the_reference_the_tutorials_and_the_notes() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    pages = {*PAGES, *(ROOT / "docs/notes").glob("*.md"), *(ROOT / "docs").glob("*.md")}
    pages |= {page.with_suffix(".md") for page in (ROOT / "docs/tutorials").glob("*.ipynb")}
    names = {page.relative_to(ROOT / "docs").as_posix() for page in pages}
    assert names == set(re.findall(r"^ *- ([\w/]+\.md)$", navigation, re.M))


def test_no_public_name_comes_without_an_example_that_runs() -> None:
    assert not without(), "write one as docs/ops.md and docs/reference/pool.md do"


def test_a_name_is_known_however_the_code_comes_by_it() -> None:
    code = "import lora_ext\nfrom lora_ext import nn as n, control\nimport lora_ext.ops as o\n"
    code += "lora_ext.attach(n.wrap, o.lora_plan(control.Guide.load(x)), other.adapters)"
    code += "\nfor each in (n, o):\n    each.log_bmm(x, x)"
    places = {"serving.attaching.attach", "layers.model.wrapping.wrap", "ops.lora.lora_plan"}
    places.add("ops.circuit_sum.log_bmm")
    assert {f"lora_ext.{place}" for place in places | {"control._guide.Guide"}} <= used(code)
    assert "lora_ext.rows._context.adapters" not in used(code)
    assert "docs/control.md" in in_use()["lora_ext.control.language.automaton.Constraint"]
