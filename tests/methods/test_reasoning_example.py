"""examples/reasoning.py at its smallest sizes, and the plots of the example and the study."""

import pytest
from scripts import load_script, missing, run_quickly

from lora_ext.adapter import RankReport

MISSING = missing("matplotlib", "tqdm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}"),
]


def test_example_trains_evaluates_and_plots_both_adapters(tmp_path, monkeypatch, capsys):
    run_quickly(monkeypatch, "reasoning", tmp_path)
    assert (tmp_path / "reasoning.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for task in ("planning", "reasoning"):
        assert f"{task}: accuracy " in printed


def test_heat_map_has_one_cell_per_block_and_module(monkeypatch):
    from matplotlib.figure import Figure

    example = load_script(monkeypatch, "examples", "reasoning")
    axes, other = Figure().subplots(1, 2)

    names = ("h.0.mlp.up", "h.0.mlp.down", "h.2.mlp.down", "head")
    report = RankReport(
        tuple({"module": name, "entropy": 1.5 + i, "fro": 0.0} for i, name in enumerate(names))
    )
    example.draw_report(report, "entropy", axes, 3.5)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "2"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["mlp.up", "mlp.down"]
    assert sorted(t.get_text() for t in axes.texts) == ["1.5", "2.5", "3.5"]
    assert (axes.get_xlabel(), axes.get_title()) == ("block", "entropy")
    (image,) = axes.get_images()
    assert image.get_clim() == (0, 3.5)
    example.draw_report(report, "fro", other, 0.0)
    # If all values are 0, the limits are not (0, 0).
    assert other.get_images()[0].get_clim() == (0, 1)
