"""`teacher_states`: hidden states of the blocks without the class token, for any image size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lora_ext.methods.vora import block_distill_loss, teacher_states


def vit(**fields) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    config = transformers.ViTConfig(**sizes | fields)
    return transformers.ViTModel(config, add_pooling_layer=False).eval()


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def test_states_are_block_outputs_or_in_released_mode_inputs():
    model, (one, two) = vit(), images((16, 16), (16, 16))
    hidden = model(torch.stack([one, two]), output_hidden_states=True).hidden_states
    outputs, grids = teacher_states(model, [one, two], 3)
    assert grids == [(4, 4), (4, 4)]
    for i in range(2):  # The last entry of the tuple may be normalised.
        torch.testing.assert_close(outputs[i], hidden[i + 1][:, 1:].reshape(32, 8))
    normed = model.layernorm(outputs[2])
    expected = model(torch.stack([one, two])).last_hidden_state[:, 1:].reshape(32, 8)
    torch.testing.assert_close(normed, expected)
    inputs, _ = teacher_states(model, [one, two], 3, "released")
    for i in range(3):
        torch.testing.assert_close(inputs[i], hidden[i][:, 1:].reshape(32, 8))


def test_images_of_any_size_keep_their_order():
    model, given = vit(), images((8, 12), (16, 16), (8, 12), (4, 4))
    found, grids = teacher_states(model, [given[:1], [], given[1:]], 2)
    assert grids == [(2, 3), (4, 4), (2, 3), (1, 1)]
    alone = [teacher_states(model, [image], 2).states for image in given]
    for i, states in enumerate(found):
        torch.testing.assert_close(states, torch.cat([one[i] for one in alone]))


def test_states_have_no_gradient_and_hooks_are_removed():
    model = vit()
    states, grids = teacher_states(model, images((16, 16)), 2)
    assert not any(state.requires_grad for state in states)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert block_distill_loss(None, states, states, grids, grids).abs() < 1e-6


def test_batch_without_images_has_empty_states():
    states, grids = teacher_states(vit(), [[], []], 3)
    assert [tuple(state.shape) for state in states] == [(0, 8)] * 3 and grids == []


def test_clip_can_be_a_teacher():
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    config = transformers.CLIPVisionConfig(
        **sizes, num_attention_heads=2, image_size=16, patch_size=4
    )
    states, grids = teacher_states(transformers.CLIPVisionModel(config).eval(), images((8, 16)), 2)
    assert states[1].shape == (8, 8) and grids == [(2, 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((images((16, 16)), 4), r"teacher: expected at least n_blocks = 4 blocks, found 3"),
        (
            (images((16, 18)), 2),
            r"images: expected .* multiples of the patch size 4, found \(3, 16, 18\)",
        ),
        ((images((16, 16)), 2, "both"), r"pairing: expected one of .* found 'both'"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message: str):
    with pytest.raises(ValueError, match=f"teacher_states: {message}"):
        teacher_states(vit(), *arguments)


def test_teacher_in_training_mode_is_refused():
    with pytest.raises(
        ValueError, match=r"teacher_states: teacher: expected a model in evaluation mode"
    ):
        teacher_states(vit().train(), images((16, 16)), 2)


def test_teacher_that_drops_patches_is_refused():
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    config = transformers.ViTMAEConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=4)
    teacher = transformers.ViTMAEModel(config).eval()
    with pytest.raises(ValueError, match=r"teacher: expected .* all 16 patches .*, found 5 tokens"):
        teacher_states(teacher, images((16, 16)), 2)
