"""examples/demo.py leaves its model and adapters under the names of the README's ten lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripts import ROOT, load_script, missing

MISSING = missing("matplotlib", "rich", "tqdm", "peft")


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_the_ten_lines_find_what_the_demo_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = load_script(monkeypatch, "examples", "demo")
    monkeypatch.setattr(demo, "converted_folder", lambda: tmp_path)
    for run in ("first", "second"):
        folders = {each.name: tmp_path / f"{each.name}-{run}" for each in demo.RECIPES}
        for folder in folders.values():
            folder.mkdir()
        demo.leave(folders, tmp_path / "out")
        assert (tmp_path / "out/adapters/pirate").resolve().name == f"pirate-{run}"
    ten = (ROOT / "README.md").read_text().split("## Ten lines")[1].split("```")[1]
    paths = re.findall(r'"((?:adapters/|base-)\w+)"', ten)
    assert len(set(paths)) == 3 and all((tmp_path / "out" / path).is_dir() for path in paths)
