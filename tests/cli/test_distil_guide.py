"""``lora-ext distil-guide`` writes a guide that loads, and prints its measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_ext import cli
from lora_ext.control import Guide

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from control_tokenizer import tokenizer

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config: Any = transformers.LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_command_writes_a_guide_that_loads_and_prints_its_measures(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "guide"
    arguments = ["--states", "4", "--samples", "6", "--length", "5", "--out", str(out), "--json"]
    assert cli.main(["distil-guide", str(model_folder), *arguments]) == 0
    said = json.loads(capsys.readouterr().out)
    guide = Guide.load(out)
    assert guide.num_states == 4 == said["states"]
    assert guide.measures["held_out_nats"] == said["held_out_nats"] > 0
    assert guide.measures["prior_nats"] == said["prior_nats"] > 0
    assert guide.prior is not None and guide.prior.shape == (4, 16)


def test_missing_model_folder_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "none")
    assert cli.main(["distil-guide", missing, "--out", str(tmp_path / "g")]) == 2
    assert "MODEL: expected a folder" in capsys.readouterr().err
