"""Block-wise distillation: known values, gradients, different grids, and text-only batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lora_ext.methods.vora import DistillHeads, block_distill_loss

BLOCKS, TOKENS, WIDTH, TEACHER = 3, 7, 6, 4


def tensors(width: int, tokens: int = TOKENS, seed: int = 0, blocks: int = BLOCKS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, width, generator=generator) for _ in range(blocks)]


def heads(seed: int = 0) -> DistillHeads:
    torch.manual_seed(seed)
    return DistillHeads(BLOCKS, WIDTH, TEACHER)


def test_heads_are_a_norm_and_a_projection():
    module, hiddens = heads(), tensors(WIDTH)
    found = module(hiddens)
    for head, hidden, out in zip(module, hiddens, found, strict=True):
        normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-5)
        torch.testing.assert_close(out, normed @ head[1].weight.T)
    assert sum(p.numel() for p in module.parameters()) == BLOCKS * (WIDTH + WIDTH * TEACHER)


@pytest.mark.parametrize(("sign", "expected"), [(1, 0.0), (-1, 2.0)])
def test_equal_and_opposite_teachers_give_losses_zero_and_two(sign: int, expected: float):
    module, hiddens = heads(), tensors(WIDTH)
    teachers = [sign * out for out in module(hiddens)]
    assert block_distill_loss(module, hiddens, teachers).item() == pytest.approx(expected, abs=1e-6)


def test_orthogonal_teacher_gives_loss_one():
    hiddens = [torch.tensor([[1.0, 0.0], [0.0, 2.0]])]
    teachers = [torch.tensor([[0.0, 3.0], [1.0, 0.0]])]
    assert block_distill_loss(None, hiddens, teachers).item() == 1


def test_loss_is_the_mean_over_tokens_and_blocks():
    module, hiddens, teachers = heads(), tensors(WIDTH), tensors(TEACHER, seed=1)
    of_blocks = [
        (1 - F.cosine_similarity(out, u, dim=-1)).mean()
        for out, u in zip(module(hiddens), teachers, strict=True)
    ]
    expected = sum(of_blocks) / BLOCKS
    torch.testing.assert_close(block_distill_loss(module, hiddens, teachers), expected)


@given(scale=st.floats(1e-3, 1e3))
def test_loss_does_not_depend_on_the_teachers_scale(scale: float):
    module, hiddens, teachers = heads(), tensors(WIDTH), tensors(TEACHER, seed=1)
    scaled = [u * scale for u in teachers]
    torch.testing.assert_close(
        block_distill_loss(module, hiddens, scaled), block_distill_loss(module, hiddens, teachers)
    )


def test_gradients_reach_heads_and_hiddens_but_not_the_teacher():
    module = heads()
    hiddens, teachers = ([t.requires_grad_() for t in tensors(w, seed=w)] for w in (WIDTH, TEACHER))
    block_distill_loss(module, hiddens, teachers).backward()
    assert all(p.grad is not None and p.grad.any() for p in (*module.parameters(), *hiddens))
    assert all(u.grad is None for u in teachers)


def test_gradients_equal_finite_differences():
    module = heads().double()
    hiddens = [t.double().requires_grad_() for t in tensors(WIDTH)]
    teachers = [t.double() for t in tensors(TEACHER, seed=1)]
    assert torch.autograd.gradcheck(
        lambda *h: block_distill_loss(module, h, teachers), tuple(hiddens)
    )


@pytest.mark.parametrize("teachers", [None, "empty"])
@pytest.mark.parametrize("grids", [None, []])
def test_batch_without_images_has_zero_loss_and_gradients(teachers, grids):
    module = heads()
    whole = [t.requires_grad_() for t in tensors(WIDTH)]
    hiddens = [t[torch.zeros(TOKENS, dtype=torch.bool)] for t in whole]
    given_ = None if teachers is None else tensors(TEACHER, tokens=0)
    loss = block_distill_loss(module, hiddens, given_, grids, grids)
    assert loss.item() == 0 and loss.shape == ()
    loss.backward()
    for p in (*module.parameters(), *whole):
        assert p.grad is not None and not p.grad.any()


def test_low_precision_is_compared_in_float32():
    module, hiddens = heads().to(torch.bfloat16), [t.bfloat16() for t in tensors(WIDTH)]
    teachers = tensors(TEACHER, seed=1)
    found = block_distill_loss(module, hiddens, teachers)
    assert found.dtype == torch.float32
    expected = torch.stack(
        [
            1 - F.cosine_similarity(out.float(), u, dim=-1)
            for out, u in zip(module(hiddens), teachers, strict=True)
        ]
    ).mean()
    assert torch.equal(found, expected)


def test_different_grids_are_interpolated_as_images():
    student, teacher = [(2, 3), (4, 1)], [(4, 2), (4, 1)]
    hiddens, states = tensors(TEACHER, tokens=10), tensors(TEACHER, tokens=12, seed=1)
    resampled = []
    for u in states:
        image = u[:8].T.reshape(1, TEACHER, 4, 2)
        image = F.interpolate(image, size=(2, 3), mode="bilinear", align_corners=False)
        resampled.append(torch.cat([image[0].flatten(1).T, u[8:]]))
    found = block_distill_loss(None, hiddens, states, student, teacher)
    torch.testing.assert_close(found, block_distill_loss(None, hiddens, resampled))


def test_equal_grids_are_not_interpolated():
    hiddens, teachers = tensors(TEACHER, tokens=6), tensors(TEACHER, tokens=6, seed=1)
    grids = [(2, 2), (1, 2)]
    assert torch.equal(
        block_distill_loss(None, hiddens, teachers, grids, grids),
        block_distill_loss(None, hiddens, teachers),
    )


H, U = tensors(WIDTH), tensors(TEACHER)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((H, U[:2]), r"teachers: expected 3 tensors, one per block, found 2"),
        ((H, None), r"teachers: expected 3 tensors, one per block, found 0"),
        ((H[:2], U), r"hiddens: expected 3 tensors, one per block, found 2"),
        ((H, tensors(WIDTH)), r"teachers: expected shape \(M, 4\), found \(7, 6\)"),
        ((H, tensors(TEACHER, 8)), r"teachers: expected 7 tokens, as in .* unless .* found 8"),
        ((H, tensors(TEACHER, 8), [(7, 1)]), r"teachers: expected 7 tokens, as in hiddens"),
        ((H, U, [(7, 1)], [(7, 1)] * 2), r"teacher_grids: .* one grid for .* 1 images, found 2"),
        ((H, U, [(6, 1)], [(7, 1)]), r"student_grids: .* with 7 tokens in total, found \["),
        ((H, U, [(7, 1)], [(6, 1)]), r"teacher_grids: .* with 7 tokens in total, found \["),
        (
            ([*H[:2], H[2][1:]], U),
            r"hiddens: expected the same number of tokens in each block, found \[7, 7",
        ),
        (([h[:0] for h in H], U), r"teachers: expected 0 tokens, as in .* found 7"),
    ],
)
def test_inputs_that_cannot_be_compared_are_refused(arguments, message: str):
    with pytest.raises(ValueError, match=f"block_distill_loss: {message}"):
        block_distill_loss(heads(), *arguments)


def test_errors_name_invalid_heads():
    with pytest.raises(ValueError, match=r"DistillHeads: teacher_width: .* at least 1, found 0"):
        DistillHeads(2, 3, 0)
    with pytest.raises(ValueError, match=r"DistillHeads: hiddens: expected .*, one per block"):
        heads()(tensors(WIDTH, blocks=2))
