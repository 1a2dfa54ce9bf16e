"""Check that the names, messages and sections mentioned by the pages exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import lora_ext

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ROWS = re.findall(r"^\| .* \| (.*) \|$", (DOCS / "coming_from.md").read_text(), re.M)
NAMES = sorted({name for row in ROWS for name in re.findall(r"`(lora_ext(?:\.\w+)+)`", row)})
PAGE = (DOCS / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE, re.M)


@pytest.mark.parametrize("name", NAMES)
def test_name_on_the_page_for_users_of_other_packages_exists(name: str) -> None:
    found: Any = lora_ext
    path = "lora_ext"
    for part in name.split(".")[1:]:
        path += f".{part}"
        if not hasattr(found, part):
            if path == "lora_ext.interop.flower":
                pytest.importorskip("flwr")
            importlib.import_module(path)
        found = getattr(found, part)


def test_page_mentions_names_of_all_four_packages() -> None:
    sections = re.findall(r"^## From (\w+)$", (DOCS / "coming_from.md").read_text(), re.M)
    assert sections == ["PEFT", "vLLM", "PyJuice", "Flower"] and len(NAMES) > 30


def test_messages_of_the_page_are_in_the_sources() -> None:
    files = [*(ROOT / "lora_ext").rglob("*.py"), *(ROOT / "csrc").rglob("*.h")]
    files += [*(ROOT / "csrc").rglob("*.cpp")]
    text = " ".join(file.read_text() for file in files)
    joined = re.sub(r'"\s*\n\s*f?"', "", text)  # joins string literals that span lines
    assert len(MESSAGES) > 12
    assert [each for each in MESSAGES if each not in joined] == []


def test_navigation_has_a_section_for_each_task() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    parts = re.findall(r"^  - ([\w ]+):$", navigation, re.M)
    assert parts == ["Install", "Train", "Serve", "Circuits", "Methods", "Reference", "Inside"]
