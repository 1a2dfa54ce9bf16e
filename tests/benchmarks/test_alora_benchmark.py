"""The benchmark of activated adapters counts what it times, and the example learns what it says."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from scripts import load_script

pytest.importorskip("peft", reason="the benchmark compares with peft")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import alora


@pytest.mark.slow
def test_providers_agree_and_activated_adapters_read_their_own_tokens_alone() -> None:
    rows = {row["provider"]: row["tokens"] for row in alora.measure(alora.tiny_model(), alora.TINY)}
    assert rows == {"peft": 70, "lora": 70, "alora": 6}


@pytest.mark.slow
def test_a_wrong_count_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(alora.TINY, adapters=1)
    monkeypatch.setattr(alora.Case, "shared", 0)
    with pytest.raises(SystemExit, match="alora: expected 70 tokens computed, found"):
        alora.measure(alora.tiny_model(), case)


@pytest.mark.slow
def test_the_example_s_adapters_say_what_they_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load_script(monkeypatch, "examples", "alora")
    answers = example.main(steps=40)
    assert answers["yes"] == [5] * 4 and answers["no"] == [6] * 4
    assert answers["base"] not in (answers["yes"], answers["no"])
