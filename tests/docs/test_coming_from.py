"""Names, messages and parts that pages tell of are there."""

import importlib
import re
from typing import Any

import pytest
from scripts import ROOT

import lora_ext

DOCS = ROOT / "docs"
ROWS = re.findall(r"^\| .* \| (.*) \|$", (DOCS / "coming_from.md").read_text(), re.M)
NAMES = sorted({name for row in ROWS for name in re.findall(r"`(lora_ext(?:\.\w+)+)`", row)})
PAGE = (DOCS / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE, re.M)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_newcomers_are_told_exists(name: str) -> None:
    found: Any = lora_ext
    path = "lora_ext"
    for part in name.split(".")[1:]:
        path += f".{part}"
        if not hasattr(found, part):
            if path == "lora_ext.interop.flower":
                pytest.importorskip("flwr")
            importlib.import_module(path)
        found = getattr(found, part)


def test_there_are_names_of_all_four_packages_and_four_parts_of_navigation() -> None:
    sections = re.findall(r"^## From (\w+)$", (DOCS / "coming_from.md").read_text(), re.M)
    assert sections == ["PEFT", "vLLM", "PyJuice", "Flower"] and len(NAMES) > 30
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    parts = re.findall(r"^  - ([\w ]+):$", navigation, re.M)
    assert parts == ["Start", "How to", "Reference", "Inside"]


def test_messages_of_the_page_stand_in_the_sources() -> None:
    files = [*(ROOT / "lora_ext").rglob("*.py"), *(ROOT / "csrc").rglob("*.h")]
    files += [*(ROOT / "csrc").rglob("*.cpp")]
    text = " ".join(file.read_text() for file in files)
    joined = re.sub(r'"\s*\n\s*f?"', "", text)  # literals of several lines
    assert len(MESSAGES) > 12
    assert [each for each in MESSAGES if each not in joined] == []
