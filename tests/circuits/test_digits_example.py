"""examples/circuits_digits.py with one epoch: trains, classifies, draws."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import missing, run_quickly

MISSING = missing("matplotlib", "sklearn", "tqdm")


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_digits_are_learned_told_apart_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_quickly(monkeypatch, "circuits_digits", tmp_path)
    for name in ("samples.png", "mended.png"):
        assert (tmp_path / name).stat().st_size > 5_000
    right = float(capsys.readouterr().out.partition("by the roots: ")[2].partition("%")[0])
    assert right > 60  # one epoch; chance is 10
