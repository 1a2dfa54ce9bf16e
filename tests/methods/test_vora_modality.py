"""``with modality(mask)``: layers that use the mask, and rejected masks."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_ext
from lora_ext.nn import VoraLinear, modality

MASK = torch.tensor([[True, True, False], [False, True, False]])


class Two(nn.Module):
    """Model of two layers of route "vision"."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = VoraLinear.from_linear(nn.Linear(5, 8), 2, "vision")
        self.down = VoraLinear.from_linear(nn.Linear(8, 5, bias=False), 2, "vision")
        for layer in (self.up, self.down):
            layer.base_layer.requires_grad_(False)
            nn.init.normal_(layer.B)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


def inputs() -> Tensor:
    return torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))


def masked(model: Two, x: Tensor, mask: Tensor) -> Tensor:
    """Return the output of the two layers, each called with an explicit mask."""
    return model.down(model.up(x, mask).tanh(), mask)


def test_innermost_block_applies() -> None:
    model, x = Two(), inputs()
    outer, inner = masked(model, x, MASK), masked(model, x, ~MASK)
    with modality(MASK):
        assert torch.equal(model(x), outer)
        with modality(~MASK):
            assert torch.equal(model(x), inner)
            with modality(MASK):
                assert torch.equal(model(x), outer)
        assert torch.equal(model(x), outer)
        with pytest.raises(KeyError), modality(~MASK):
            raise KeyError
        assert torch.equal(model(x), outer)
    assert not torch.equal(model(x), outer)


def test_threads_have_separate_blocks() -> None:
    model, x = Two(), inputs()
    expected = {True: masked(model, x, MASK), False: masked(model, x, ~MASK)}
    found: dict[bool, Tensor] = {}
    together = threading.Barrier(2)

    def run(first: bool) -> None:
        with modality(MASK if first else ~MASK):
            together.wait()
            found[first] = model(x).detach()
            together.wait()

    threads = [threading.Thread(target=run, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[first], expected[first]) for first in expected)


def test_rows_are_grouped_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = Two(), []
    plan = lora_ext.ops.lora_plan
    monkeypatch.setattr(lora_ext.ops, "lora_plan", lambda *a: calls.append(a) or plan(*a))
    with modality(MASK):
        model(inputs())
        model(inputs())
    assert len(calls) == 1
    calls.clear()
    for layer in (model.up, model.down):
        layer.add_adapter("text", 2)
    with modality(MASK), lora_ext.adapters(["text", None]):
        model(inputs())
        model(inputs())
    assert len(calls) == 3  # one plan each for the names, the mask, and both together


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_use_the_mask_of_their_forward(reentrant: bool) -> None:
    # Both backward passes run after both forward passes, when the blocks have ended and the masks
    # were overwritten.
    model, x = Two(), inputs().requires_grad_()
    wanted = [p for p in model.parameters() if p.requires_grad]
    expected = []
    for mask in (MASK, ~MASK):
        model.zero_grad()
        masked(model, x, mask).square().sum().backward()
        expected.append([p.grad for p in wanted])
    runs = []
    for mask in (MASK, ~MASK):
        given = mask.clone()
        with modality(given):
            runs.append(checkpoint(model, x, use_reentrant=reentrant))
        given.fill_(True)
    for run, grads in zip(runs, expected, strict=True):
        model.zero_grad()
        run.square().sum().backward()
        torch.testing.assert_close([p.grad for p in wanted], grads, rtol=0, atol=0)
    assert not torch.equal(expected[0][0], expected[1][0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8])
def test_integers_0_and_1_are_accepted_as_a_mask(dtype: torch.dtype) -> None:
    model, x = Two(), inputs()
    with modality(MASK.to(dtype)):
        assert torch.equal(model(x), masked(model, x, MASK))


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (MASK.float(), "torch.float32"),
        (MASK.long() * 2, "0 to 2"),
        (MASK.long() - 1, "-1 to 0"),
        (torch.tensor(True), "a single number"),
        (MASK.tolist(), "list"),
        (None, "NoneType"),
    ],
)
def test_invalid_masks_are_refused_on_entry(mask: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"modality: vision_mask: expected .*found {found}"):
        with modality(mask):
            pass


@pytest.mark.parametrize(
    "mask", [MASK[:1], MASK[:, :2], MASK.t(), MASK[0], MASK.flatten(), MASK[None]]
)
def test_mask_of_another_shape_is_refused_at_the_first_layer(mask: Tensor) -> None:
    shapes = r"expected .*\(2, 3\), found \(" + ", ".join(map(str, mask.shape))
    with modality(mask), pytest.raises(ValueError, match=f"modality: vision_mask: {shapes}"):
        Two()(inputs())


def test_activations_of_another_shape_inside_a_block_are_refused() -> None:
    model, x = Two(), inputs()
    with modality(MASK):
        model(x)
        with pytest.raises(ValueError, match=r"vision_mask: expected .*\(2, 1\), found \(2, 3\)"):
            model(x[:, :1])
        with pytest.raises(ValueError, match=r"vision_mask: expected .*\(6,\), found \(2, 3\)"):
            model(x.flatten(0, 1))


def test_modality_does_not_affect_other_lora_layers() -> None:
    # LoraLinear layers ignore the block, which needs no pool.
    layer, x = lora_ext.nn.LoraLinear(nn.Linear(5, 5), init_lora_weights=False), inputs()
    expected = layer(x)
    with modality(MASK):
        assert torch.equal(layer(x), expected)
