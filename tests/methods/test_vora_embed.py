"""`VisionPatchEmbed`: patch tokens, position embeddings for any grid, images of any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext.methods.vora import VisionPatchEmbed
from lora_ext.methods.vora._embed import RMSNorm, resample_grid


def embedding(seed: int = 0, **fields) -> VisionPatchEmbed:
    """Return a small float64 module whose position embeddings are not zero."""
    torch.manual_seed(seed)
    module = VisionPatchEmbed(
        **{"hidden_size": 6, "embed_dim": 5, "patch": 4, "image_size": 12} | fields
    )
    nn.init.normal_(module.pos_embed)
    nn.init.normal_(module.patchifier["norm"].weight)
    return module.double()


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, h, w, generator=generator, dtype=torch.float64) for h, w in sizes]


def test_sizes_of_the_paper_give_its_number_of_parameters():
    with torch.device("meta"):
        module = VisionPatchEmbed(3584)
    assert sum(p.numel() for p in module.parameters()) == 7_984_128
    assert module.pos_embed.shape == (1, 1024, 1536)


def test_tokens_equal_convolution_norm_positions_and_projection():
    module = embedding()
    x = torch.stack(images((12, 12), (12, 12)))
    proj = module.patchifier["proj"]
    c = F.conv2d(x, proj.weight, proj.bias, stride=4).flatten(2).transpose(1, 2)  # (B, 9, 5)
    c = c / (c.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.patchifier["norm"].weight
    expected = (c + module.pos_embed) @ module.out_proj.weight.T
    torch.testing.assert_close(module(x), expected)


def test_positions_start_at_zero():
    assert not VisionPatchEmbed(6, 5, 4, 12).pos_embed.any()


def test_norm_is_computed_in_float32_and_rounded_before_the_weight():
    norm = RMSNorm(5).to(torch.bfloat16)
    nn.init.constant_(norm.weight, 3.0)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), wide.to(torch.bfloat16) * 3)


@pytest.mark.parametrize("mode", ["interp", "released"])
def test_stored_grid_uses_the_table_unchanged(mode: str):
    module = embedding(pos_mode=mode)
    assert torch.equal(module.positions(3, 3), module.pos_embed[0])


@given(rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_constant_table_stays_constant_on_any_grid(rows: int, columns: int):
    module = embedding()
    nn.init.constant_(module.pos_embed, 0.7)
    found = module.positions(rows, columns)
    assert found.shape == (rows * columns, 5)
    torch.testing.assert_close(found, torch.full_like(found, 0.7))


def test_positions_of_another_grid_are_interpolated():
    module = embedding()
    table = module.pos_embed[0].T.view(1, 5, 3, 3)
    expected = F.interpolate(table, size=(2, 5), mode="bilinear", align_corners=False)
    torch.testing.assert_close(module.positions(2, 5), expected[0].flatten(1).T)


def test_released_positions_are_first_rows_or_interpolated_if_too_few():
    module, interpolated = embedding(pos_mode="released"), embedding()
    assert torch.equal(module.positions(2, 4), module.pos_embed[0, :8])
    assert torch.equal(module.positions(1, 9), module.pos_embed[0])
    assert torch.equal(module.positions(4, 3), interpolated.positions(4, 3))


def test_transposed_image_and_table_give_transposed_tokens():
    module, flipped = embedding(), embedding()
    with torch.no_grad():
        flipped.patchifier["proj"].weight.copy_(module.patchifier["proj"].weight.mT)
        table = module.pos_embed.view(3, 3, 5).transpose(0, 1)
        flipped.pos_embed.copy_(table.reshape(1, 9, 5))
    x = torch.stack(images((8, 20)))
    expected = module(x).view(2, 5, 6).transpose(0, 1).reshape(1, 10, 6)
    torch.testing.assert_close(flipped(x.mT), expected)


@given(sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=5))
def test_list_of_images_equals_single_images(sizes: list[tuple[int, int]]):
    module = embedding()
    given_ = images(*((4 * h, 4 * w) for h, w in sizes))
    found = module(given_)
    assert [len(tokens) for tokens in found] == [h * w for h, w in sizes]
    for tokens, image in zip(found, given_, strict=True):
        torch.testing.assert_close(tokens, module(image[None])[0])


def test_gradients_reach_every_parameter_and_the_images():
    module = embedding()
    given_ = [image.requires_grad_() for image in images((4, 8), (12, 12))]
    sum(tokens.square().sum() for tokens in module(given_)).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    assert all(image.grad is not None and image.grad.any() for image in given_)


def test_empty_batch_has_no_tokens():
    assert embedding()(torch.zeros(0, 3, 8, 4, dtype=torch.float64)).shape == (0, 2, 6)
    assert embedding()([]) == []


def test_images_are_cast_to_the_dtype_of_the_parameters():
    module = embedding().to(torch.bfloat16)
    assert module(torch.rand(1, 3, 8, 8)).dtype == torch.bfloat16


def test_equal_grids_are_not_resampled():
    tokens = torch.rand(6, 2)
    assert resample_grid(tokens, (2, 3), (2, 3)) is tokens
    assert resample_grid(tokens.bfloat16(), (2, 3), (4, 3)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 450}, r"image_size: expected a multiple of the patch size 14, found 450"),
        ({"patch": 0}, r"patch: expected at least 1, found 0"),
        ({"embed_dim": 0}, r"embed_dim: expected at least 1, found 0"),
        (
            {"pos_mode": "nearest"},
            r"pos_mode: expected one of \('interp', 'released'\), found 'nea",
        ),
    ],
)
def test_errors_name_invalid_fields(fields: dict, message: str):
    with pytest.raises(ValueError, match=f"VisionPatchEmbed: {message}"):
        VisionPatchEmbed(8, **fields)


@pytest.mark.parametrize(
    ("given_", "error", "message"),
    [
        (torch.zeros(1, 3, 10, 8), ValueError, r"multiples of the patch size 4, found 10 x 8"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], ValueError, r"patch size 4, found 8 x 9"),
        (torch.zeros(1, 3, 0, 8), ValueError, r"patch size 4, found 0 x 8"),
        (torch.zeros(3, 8, 8), ValueError, r"shape \(B, 3, H, W\), .* found \(3, 8, 8\)"),
        ([torch.zeros(1, 3, 8, 8)], ValueError, r"list of \(3, H, W\), found \(1, 3, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), ValueError, r"three channels, .* found \(1, 1, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, r"floating-point dtype, found tor"),
    ],
)
def test_invalid_images_are_refused(given_, error, message: str):
    with pytest.raises(error, match=f"VisionPatchEmbed: images: expected .*{message}"):
        embedding()(given_)
