"""Run examples/region_graphs.py and check that it counts the parts of every graph and draws it."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import missing, run_quickly

pytestmark = pytest.mark.slow

MISSING = missing("matplotlib")


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_region_graphs_are_counted_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_quickly(monkeypatch, "region_graphs", tmp_path)
    assert (tmp_path / "graphs.png").stat().st_size > 20_000
    assert capsys.readouterr().out.count("RegionGraph(4 variables") == 6
