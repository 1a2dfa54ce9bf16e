"""examples/mtpc_bytes.py with its smallest sizes: trains, decodes, draws."""

import importlib.util
import sys
from pathlib import Path

import pytest

MISSING = [n for n in ("matplotlib", "rich", "tqdm") if importlib.util.find_spec(n) is None]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_four_heads_are_trained_compared_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("mtpc_bytes", EXAMPLES / "mtpc_bytes.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mtpc_bytes", example)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the example adds the folder of the clocks
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", ["mtpc_bytes.py", "--quick", "--out", str(tmp_path)])
    example.main()
    assert (tmp_path / "mtpc.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for engine in ("plain", "ff", "cp", "hmm", "btree"):
        assert printed.count(f"│ {engine} ") == 4  # two modes, two batches
