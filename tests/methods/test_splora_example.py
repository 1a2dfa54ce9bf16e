"""examples/splora.py with its smallest sizes: trains, prunes folders and the live model, draws."""

import importlib.util
import sys
from pathlib import Path

import pytest

from lora_ext.adapter import LoraAdapter

MISSING = [n for n in ("matplotlib", "rich", "tqdm") if importlib.util.find_spec(n) is None]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_an_adapter_in_a_folder_is_pruned_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("splora_example", EXAMPLES / "splora.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the example adds the folder of the toy
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", ["splora.py", "--quick", "--out", str(tmp_path)])
    example.main()
    assert (tmp_path / "splora.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "SPLoRA pruned 4 of 8 layers" in printed
    assert printed.count("│ pruned │") == 4
    assert len(LoraAdapter.load(tmp_path / "pruned").modules) == 4
