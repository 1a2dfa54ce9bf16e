"""Attached models compute what PEFT computes for a mixed batch."""

from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, make_pair, tokens

import lora_ext

NAMES = ["red", "green", "__base__", "blue", "green", None]
PEFT_NAMES = [name or "__base__" for name in NAMES]


@pytest.mark.parametrize("family", CONFIGS)
def test_mixed_batch_equals_peft(family: str, tmp_path: Path) -> None:
    model, reference, _ = make_pair(family, tmp_path)
    ids = tokens(len(NAMES), 7)
    with torch.no_grad():
        with lora_ext.adapters(NAMES):
            ours = model(ids).logits
        theirs = reference(input_ids=ids, adapter_names=PEFT_NAMES).logits
        # Both are float32 and add the same products in other orders. What that may cost is what
        # float64 says PEFT's own float32 costs, here for any order at most a few times that.
        exact = reference.double()(input_ids=ids, adapter_names=PEFT_NAMES).logits
    own_error = (theirs - exact).abs().max()
    assert (ours - exact).abs().max() <= 4 * own_error
    assert (
        own_error < 1e-4 < (theirs[0] - theirs[2]).abs().max()
    )  # rounding is small, adapters are not
