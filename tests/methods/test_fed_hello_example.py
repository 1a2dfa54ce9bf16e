"""examples/fed_hello.py at its smallest sizes, and the plots of a federation."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import load_script, missing, run_quickly

MISSING = missing("matplotlib", "rich", "tqdm", "transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}"),
]


def test_example_prints_and_plots_two_federations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_quickly(monkeypatch, "fed_hello", tmp_path)
    assert (tmp_path / "fed_hello.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "HLA(rgd, bottleneck, 6 layers of weights" in printed
    assert "all, as they can" in printed and "strong clients alone" in printed
    assert "│ 1.00" in printed  # strong clients send all layers


def test_plots_show_accuracy_bytes_and_heights(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    pictures = load_script(monkeypatch, "benchmarks", "federated_pictures")
    lines, sent, heights = Figure().subplots(1, 3)
    pictures.draw_accuracy({"a": [0.1, 0.2], "b": [0.3]}, lines)
    assert [line.get_xdata().tolist() for line in lines.lines] == [[1, 2], [1]]
    assert [t.get_text() for t in lines.get_legend().get_texts()] == ["a", "b"]
    pictures.draw_bytes({"a": [2_000_000, 5_000_000]}, sent)
    assert sent.lines[0].get_ydata().tolist() == [2, 5] and "MB" in sent.get_ylabel()
    pictures.draw_heights([(1, 0, 3), (2, 0, 1)], heights)
    assert heights.images[0].get_array().tolist() == [[1, 2], [0, 0], [3, 1]]
    assert heights.images[0].origin == "lower"
