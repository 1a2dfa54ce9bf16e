"""examples/mtpc_bytes.py at its smallest sizes: it trains, decodes and plots."""

from pathlib import Path

import pytest
from scripts import needs, run_quickly

pytestmark = [pytest.mark.slow, needs("matplotlib", "rich", "tqdm")]


def test_four_heads_are_trained_compared_and_plotted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for known in (False, True):  # The second run loads the models of the first.
        run_quickly(monkeypatch, "mtpc_bytes", tmp_path)
        assert (tmp_path / "mtpc.png").stat().st_size > 10_000
        printed = capsys.readouterr().out
        assert ("trained before" in printed) == known
        for engine in ("plain", "ff", "cp", "hmm", "btree"):
            assert printed.count(f"│ {engine} ") == 4  # two modes, two batches
