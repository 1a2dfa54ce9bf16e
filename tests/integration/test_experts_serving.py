"""Adapters on routed experts, served from a pool, against PEFT's own ``target_parameters``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import CONFIGS, FAMILIES, make_mixture, make_peft, tokens

import lora_ext

NAMES = ["red", "green", None, "blue", "green", "red"]
CLOSE = 2e-5  # of logits of about 10 in float32; an adapter moves them by more than 0.5


def served(family: str, folder: Path, configs: Any = CONFIGS) -> tuple[Any, Any]:
    """The attached model, and PEFT's own with the same adapters, which it has saved."""
    model = make_mixture(family)
    reference = make_peft(model, configs)
    reference.save_pretrained(folder)
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=16)
    for name in configs:
        pool.load(name, folder / name)
    return lora_ext.attach(model, pool), reference


def alone(reference: Any, name: str | None, ids: torch.Tensor) -> torch.Tensor:
    """What PEFT gives one adapter, which has the batch for itself."""
    if name is None:
        with reference.disable_adapter():
            return reference(input_ids=ids).logits
    reference.set_adapter(name)
    return reference(input_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_row_of_a_mixed_batch_is_that_of_peft(family: str, tmp_path: Path) -> None:
    model, reference = served(family, tmp_path)
    ids = tokens(len(NAMES), 7)
    with lora_ext.adapters(NAMES):
        mixed = model(ids).logits
    base = alone(reference, None, ids)
    for row, name in enumerate(NAMES):
        theirs = alone(reference, name, ids)[row]
        assert (mixed[row] - theirs).abs().max() < CLOSE
        assert name is None or (theirs - base[row]).abs().max() > 0.5
