"""Layers with the input layout (tokens, sequences): adapters per row without a pool.

Tests include batches with equal numbers of sequences and tokens, whose shape is ambiguous.
"""

from typing import Any

import peft
import pytest
import torch
from client_models import assert_close, loop, next_token
from families import TOKENS_FIRST
from tiny import tokens
from torch import Tensor

import lora_ext
from lora_ext.federated import BatchedClients, ClientSpec, LayerPlan, LoraLayerManager
from lora_ext.interop.peft import to_peft
from lora_ext.nn import LayerGroups, LoraConfig, RowwiseError, coalitions, unwrap, wrap

#: Layers with tokens first; XLNet also has an embedding with tokens first.
TARGETS = {"xlnet": ["layer_1", "layer_2"], "fsmt": ["q_proj", "v_proj", "fc1", "fc2"]}
NAMES = ["red", "blue", None, "green"]
PATTERNS = {"xlnet": r"\.layer\.(\d+)\.", "fsmt": r"decoder\.layers\.(\d+)\."}
SHAPES = [(4, 4), (4, 6), (4, 1)]
#: float32, two layers, logits of about 1.
NEAR: dict[str, float] = {"rtol": 0, "atol": 2e-5}


def wrapped(family: str, targets: list[str] | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    model, how = TOKENS_FIRST[family]().eval(), {"r": 2, "lora_alpha": 8, **settings}
    targets = targets or TARGETS[family]
    for name in ("red", "blue", "green"):
        wrap(model, LoraConfig(target_modules=targets, init_lora_weights=False, **how), name)
    return model


def of_peft(family: str, kind: str, *names: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 8, "target_modules": TARGETS[family], **settings}
    config = peft.LoraConfig(init_lora_weights=False, **settings)
    model: Any = peft.get_peft_model(TOKENS_FIRST[family](), config, names[0]).eval()
    for name in names[1:]:
        model.add_adapter(name, config)
    return lora_ext.from_peft(model) if kind == "fused" else model


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_names_reach_the_rows_of_a_wrapped_model(family: str, shape: tuple[int, int]) -> None:
    targets = [*TARGETS[family], *(["word_embedding"] if family == "xlnet" else [])]
    model, ids = wrapped(family, targets), tokens(*shape)
    with lora_ext.adapters(NAMES):
        mixed = model(ids).logits
    with lora_ext.adapters([[name] * shape[1] for name in NAMES]):
        torch.testing.assert_close(model(ids).logits, mixed, **NEAR)
    known = ["red", "blue", "green"]
    rows = torch.tensor([known.index(name) if name else -1 for name in NAMES])
    with lora_ext.adapters(known, token_ids=rows[:, None].expand(*shape)):
        torch.testing.assert_close(model(ids).logits, mixed, **NEAR)
    for row, name in enumerate(NAMES):
        with lora_ext.adapters(name):
            torch.testing.assert_close(mixed[row], model(ids).logits[row], **NEAR)
    with lora_ext.adapters("red"):
        assert (model(ids).logits - mixed)[1].abs().max() > 1e-3
    unwrap(model)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_adapter_ids_per_sequence_reach_the_rows_of_a_layer(
    shape: tuple[int, int],
) -> None:
    model = wrapped("fsmt")
    layer = model.get_submodule("model.encoder.layers.0.fc1")
    x = torch.randn(shape[1], shape[0], 32)
    found = layer(x, torch.tensor([0, 1, -1, 2]))
    for row, name in enumerate(NAMES):
        with lora_ext.adapters(name):
            torch.testing.assert_close(found[:, row], layer(x)[:, row], **NEAR)
    compiled, x = torch.compile(layer, backend="aot_eager"), torch.randn(4, 4, 32)
    with lora_ext.adapters(NAMES):
        torch.testing.assert_close(compiled(x), layer(x), **NEAR)
    unwrap(model)


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_dropout": 1.0}], ids=str)
@torch.no_grad()
def test_names_reach_the_rows_of_from_peft(
    family: str, shape: tuple[int, int], settings: dict[str, Any]
) -> None:
    """Check dropout 1 too, for which PEFT's forward runs the layer."""
    model = of_peft(family, "fused", "red", "blue", "green", **settings)
    ids, names = tokens(*shape), [name or "__base__" for name in NAMES]
    mixed = model(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        alone = model(ids, adapter_names=[name] * 4).logits
        torch.testing.assert_close(mixed[row], alone[row], **NEAR)
    assert (model(ids, adapter_names=["red"] * 4).logits - mixed)[1].abs().max() > 1e-3
    to_peft(model)
    assert not any("tokens_first" in module.__dict__ for module in model.modules())


def test_layer_run_by_peft_with_tokens_first_needs_one_name() -> None:
    model = of_peft("xlnet", "fused", "red", "blue", target_modules=["layer_1", "word_embedding"])
    ids, message = tokens(2, 2), r"adapter_names: .*word_embedding: expected one name for all rows"
    with torch.no_grad():
        red = model(ids, adapter_names=["red", "red"]).logits
        assert torch.equal(red, model(ids).logits)
        with pytest.raises(ValueError, match=message):
            model(ids, adapter_names=["red", "blue"])


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("kind", ["ours", "peft", "fused"])
@pytest.mark.parametrize("length", [6, 4])
@torch.no_grad()
def test_coalition_masks_reach_their_rows(family: str, kind: str, length: int) -> None:
    if kind == "ours":
        model = wrapped(family)
    else:
        model = of_peft(family, kind, "red")
    groups, ids = LayerGroups(model, "red"), tokens(2, length)
    masks = torch.tensor([[i == 0 or i == k for i in range(len(groups))] for k in range(3)])
    with coalitions(groups, masks, 2):
        mixed = model(input_ids=ids.repeat(3, 1)).logits
    alone = []
    for mask in masks:
        with groups.masked(mask):
            alone.append(model(input_ids=ids).logits)
    torch.testing.assert_close(mixed, torch.cat(alone), **NEAR)
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    with pytest.raises(RowwiseError, match="6 sequences in dimension 1"):
        with coalitions(groups, masks, 2):
            model(input_ids=ids.repeat(2, 1))


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("lengths", [(4, 4), (4, 3), (6, 6)])
def test_clients_train_their_own_rows(family: str, lengths: tuple[int, int]) -> None:
    """Check two clients, each with two sequences; ``lengths`` has one length per client.

    One client trains only the last layer. Below that layer, the graph need not contain its rows.
    """
    torch.manual_seed(0)
    model: Any = TOKENS_FIRST[family]().eval()
    if family == "xlnet":  # FSMT's masks do not support float64.
        model.double()
    settings = {
        "target_modules": rf".*{PATTERNS[family]}.*(layer_1|fc1|k_proj)",
        "r": 2,
        "init_lora_weights": False,
    }
    wrap(model, LoraConfig(**settings))
    manager = LoraLayerManager(model, pattern=PATTERNS[family])
    state = manager.state_slice()
    clients = [
        ClientSpec(i, [batch(family, length, i)] * 2, lr=0.05) for i, length in enumerate(lengths)
    ]
    plans = [LayerPlan((0, 1)), LayerPlan((1,))]
    found = BatchedClients(model, clients, pattern=PATTERNS[family]).run_round(plans, state)
    for update, spec, plan in zip(found, clients, plans, strict=True):
        wanted = loop(model, manager, state, spec, plan, loss_of=next_token)
        # Changes are about 0.05; the bounds are for float64, and for float32 after 2 AdamW steps.
        assert_close(update, wanted, 1e-9 if family == "xlnet" else 2e-4)
        assert all(bool(t.any()) for t in update.tensors.values())


def batch(family: str, length: int, seed: int) -> dict[str, Tensor]:
    ids = tokens(2, length, seed)
    more = {"decoder_input_ids": tokens(2, length, seed + 9)} if family == "fsmt" else {}
    return {"input_ids": ids, **more, "labels": ids, "attention_mask": torch.ones_like(ids)}
