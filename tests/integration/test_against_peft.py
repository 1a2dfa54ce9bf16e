"""Attached models compared with PEFT on a mixed batch."""

from pathlib import Path

import pytest
import torch
from common import error_over_bound
from tiny import CONFIGS, make_pair, tokens

import lora_ext

pytestmark = pytest.mark.hosts

NAMES = ["red", "green", "__base__", "blue", "green", None]
PEFT_NAMES = [name or "__base__" for name in NAMES]


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_mixed_batch_equals_peft(family: str, tmp_path: Path) -> None:
    model, reference, _ = make_pair(family, tmp_path)
    ids = tokens(len(NAMES), 7)
    with torch.no_grad():
        with lora_ext.adapters(NAMES):
            ours = model(ids).logits
        theirs = reference(input_ids=ids, adapter_names=PEFT_NAMES).logits
        exact = reference.double()(input_ids=ids, adapter_names=PEFT_NAMES).logits
    assert error_over_bound(ours, theirs, exact) <= 1
    # The bound is small compared with the effect of an adapter.
    assert error_over_bound(theirs[0], theirs[2], exact[2]) > 10
