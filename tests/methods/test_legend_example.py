"""examples/legend.py and the small reproduction with their smallest sizes; the pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from scripts import load_script, missing, run_quickly

from lora_ext.federated import LayerPlan
from lora_ext.methods.legend import Estimate, LegendConfigurator

MISSING = missing("matplotlib", "tqdm", "sklearn")
WITHOUT_FLOWER = missing("flwr")


@pytest.mark.skipif(bool(MISSING + WITHOUT_FLOWER), reason=f"not installed: {MISSING}, flwr?")
def test_devices_train_report_and_are_drawn(tmp_path: Path, monkeypatch, capsys):
    run_quickly(monkeypatch, "legend", tmp_path)
    assert (tmp_path / "legend.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "ranks from input to output: (1, 2, 3, 4, 5, 6)" in printed
    for device, figures in (
        (0, "f 1.00 s, mu 0.20 s, k 6, 2.24 s"),
        (4, "f 1.30 s, mu 0.30 s, k 5, 2.90 s"),
        (11, "f 1.80 s, mu 0.50 s, k 2, 2.91 s"),
    ):
        assert f"device {device:2}: {figures}" in printed


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_the_reproduction_measures_judges_and_draws(tmp_path: Path, monkeypatch, capsys):
    benchmark = load_script(monkeypatch, "benchmarks", "legend")
    arguments = ["--quick", "--seeds", "1", "--out", str(tmp_path)]
    picture = tmp_path / "legend.png"
    assert benchmark.study.run(benchmark, [*arguments, "--picture", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    rows = benchmark.study.last_run(tmp_path / "legend.csv")
    assert [(row["method"], row["partition"]) for row in rows] == [
        (method, partition) for method in benchmark.METHODS for partition in benchmark.PARTITIONS
    ]
    uniform, ours = rows[0], rows[len(benchmark.PARTITIONS)]
    assert (uniform["speedup"], uniform["saved"]) == (1, 0)
    assert ours["seconds"] < uniform["seconds"]
    assert ours["waiting"] < ours["waiting_uniform"] == uniform["waiting"]
    assert len(benchmark.criteria(rows)) == 4
    assert "three classes a device" in benchmark.verdict(rows).figure
    assert "dirichlet 0.3, median of 1 seeds" in capsys.readouterr().out


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_other_methods_are_measured_beside_it(tmp_path: Path, monkeypatch, capsys):
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])  # its own legend.py comes first
    full = load_script(monkeypatch, "benchmarks", "legend_full")
    kept = (
        "legend, ranks 6 to 1",
        "depth as count",
        "HetLoRA, ranks 4, 2, 1",
        "fast devices alone",
    )
    monkeypatch.setattr(full, "OTHERS", {name: full.OTHERS[name] for name in kept})
    assert full.study.run(full, ["--quick", "--seeds", "1", "--out", str(tmp_path)]) == 0
    rows = full.study.last_run(tmp_path / "legend_full.csv")
    assert [row["method"] for row in rows[::2]] == ["uniform", "legend", *kept]
    by_method = {row["method"]: row for row in rows}
    assert by_method["fast devices alone"]["waiting"] == 0
    assert by_method["HetLoRA, ranks 4, 2, 1"]["bytes"] < by_method["uniform"]["bytes"]
    assert by_method["depth as count"]["bytes"] > by_method["legend"]["bytes"]  # all go down
    assert "as many layers drawn at random" in capsys.readouterr().out


@pytest.mark.skipif(bool(MISSING + WITHOUT_FLOWER), reason=f"not installed: {MISSING}, flwr?")
def test_pictures_show_depths_times_and_waits(monkeypatch):
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
