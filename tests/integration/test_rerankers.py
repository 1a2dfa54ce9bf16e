"""Rerankers: pairs of any length in one batch, each scored by its own adapter and head."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import VOCAB, attach_saved, classifier, only

import lora_ext

BOUND = 1e-5
NAMES = ["law", None, "news", "news", "__base__", "law"]
LENGTHS = [9, 4, 6, 12, 7, 3]  # tokens of each pair (question, then text)
HEADS = {"encoder": "classifier", "decoder": "score"}  # Both are linear with one logit.


def make(kind: str) -> Any:
    torch.manual_seed(0)
    family = {"encoder": "Bert", "decoder": "Llama"}[kind]
    return classifier(family, num_labels=1, pad_token_id=0)().eval()


def pairs(kind: str) -> dict[str, torch.Tensor]:
    """Return right-padded pairs; an encoder also gets ``token_type_ids``."""
    tokens = torch.randint(3, VOCAB, (6, 12), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(12) < torch.tensor(LENGTHS)[:, None]).long()
    found = {"input_ids": tokens * mask, "attention_mask": mask}
    if kind == "encoder":
        found["token_type_ids"] = (torch.arange(12) >= 2).long().expand(6, -1) * mask
    return found


@pytest.fixture(scope="module", params=list(HEADS))
def served(request: Any, tmp_path_factory: Any) -> Iterator[tuple[str, Any, Any, Path]]:
    kind, folder = request.param, tmp_path_factory.mktemp("rerankers")
    targets = ["query", "value"] if kind == "encoder" else ["q_proj", "down_proj"]
    config = peft.LoraConfig(
        r=4, target_modules=targets, modules_to_save=[HEADS[kind]], init_lora_weights=False
    )
    theirs: Any = peft.get_peft_model(make(kind), config, adapter_name="law")
    theirs.add_adapter("news", config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if ".modules_to_save." in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    theirs.eval().save_pretrained(folder)
    yield kind, attach_saved(make(kind), folder, ("law", "news")), theirs, folder


def test_score_of_each_pair_in_a_mixed_batch_equals_that_alone_and_in_peft(served: Any) -> None:
    kind, model, theirs, _ = served
    batch, base = pairs(kind), make(kind)
    with torch.no_grad():
        scores = model(**batch, adapter_names=NAMES).logits
        assert scores.shape == (6, 1) and len({round(float(s), 4) for s in scores}) == 6
        for row, (name, length) in enumerate(zip(NAMES, LENGTHS, strict=True)):
            alone = {key: value[row : row + 1, :length] for key, value in batch.items()}
            assert abs(model(**alone, adapter_names=[name]).logits - scores[row]).item() < BOUND
            with only(theirs, name):
                expected = theirs(**alone).logits
            moved = abs(expected - base(**alone).logits).item()
            assert moved == 0 if name in (None, "__base__") else moved > 1000 * BOUND
            assert abs(expected - scores[row]).item() < BOUND


def test_block_ranks_the_texts_of_a_question_with_one_adapter(served: Any) -> None:
    kind, model, theirs, _ = served
    batch = pairs(kind)
    theirs.set_adapter("law")
    with torch.no_grad(), lora_ext.adapters("law"):
        found = model(**batch).logits[:, 0]
    with torch.no_grad():
        expected = theirs(**batch).logits[:, 0]
    assert (found - expected).abs().max() < BOUND
    assert torch.equal(found.argsort(), expected.argsort())
