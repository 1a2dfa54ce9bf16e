"""examples/splora.py at its smallest sizes: it trains, prunes a folder and a model, and plots."""

from pathlib import Path

import pytest
from methods.splora_support import blocks, made
from scripts import load_script, missing, run_quickly

from lora_ext.adapter import LoraAdapter
from lora_ext.methods import splora

pytestmark = pytest.mark.slow

MISSING = missing("matplotlib", "rich", "tqdm", "transformers")


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_example_prunes_and_plots_an_adapter_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_quickly(monkeypatch, "splora", tmp_path)
    assert (tmp_path / "splora.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "SPLoRA pruned 4 of 8 layers" in printed
    assert printed.count("│ pruned │") == 4
    assert len(LoraAdapter.load(tmp_path / "pruned").modules) == 4


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_map_marks_pruned_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    adapter, base, aligned = made({**blocks(3), "model.score": (12, 10)})
    result = splora.apply(adapter, base, aligned, splora.SploraConfig(direction="smallest", num=2))
    load_script(monkeypatch, "examples", "splora").draw_scores(result, axes)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["q_proj", "v_proj"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "1", "2"]
    crosses = {(int(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in axes.lines}
    inside = [name for name in result.pruned if name != "model.score"]
    assert crosses == {(int("v_proj" in name), int(name.split(".")[2])) for name in inside}
    assert "smallest scores pruned" in axes.get_title()
