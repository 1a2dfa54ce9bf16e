"""examples/legend.py at its smallest sizes, and its plots."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import load_script, missing, run_quickly

from lora_ext.federated import LayerPlan
from lora_ext.methods.legend import Estimate, LegendConfigurator

pytestmark = pytest.mark.slow

MISSING = missing("matplotlib", "tqdm", "transformers")
WITHOUT_FLOWER = missing("flwr")


@pytest.mark.skipif(bool(MISSING + WITHOUT_FLOWER), reason=f"not installed: {MISSING}, flwr?")
def test_example_trains_and_plots_devices(tmp_path: Path, monkeypatch, capsys):
    run_quickly(monkeypatch, "legend", tmp_path)
    assert (tmp_path / "legend.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "ranks from input to output: (1, 2, 3, 4, 5, 6)" in printed
    for device, figures in (
        (0, "f 1.00 s, mu 0.20 s, k 6, 2.22 s"),
        (4, "f 1.30 s, mu 0.30 s, k 5, 2.85 s"),
        (11, "f 1.80 s, mu 0.50 s, k 2, 2.86 s"),
    ):
        assert f"device {device:2}: {figures}" in printed


@pytest.mark.skipif(bool(MISSING + WITHOUT_FLOWER), reason=f"not installed: {MISSING}, flwr?")
def test_plots_show_depths_times_and_waits(monkeypatch):
    from matplotlib.figure import Figure

    example = load_script(monkeypatch, "examples", "legend")
    axes, beside = Figure().subplots(1, 2)
    rounds = [{0: LayerPlan((2,)), "b": LayerPlan((1, 2))}, {0: LayerPlan((0, 1, 2))}]
    example.draw_depths(rounds, 3, axes)
    shown = axes.images[0].get_array()
    assert shown.filled(-1).tolist() == [[1, 3], [2, -1]]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "b"]
    one = LegendConfigurator(3, (1, 1, 1), ranks=(1, 1, 1))
    found = one.configure({0: Estimate(1, 1, 0), 1: Estimate(2, 3, 0)}, (0, 1))
    example.draw_times(found, beside)
    assert [bar.get_height() for bar in beside.patches] == [4, 5, 1, 0]
    assert [t.get_text() for t in beside.get_xticklabels()] == ["0", "1"]
    assert [t.get_text() for t in beside.texts] == ["3", "1"]
