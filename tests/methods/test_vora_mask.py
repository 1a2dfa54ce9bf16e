"""`build_vision_mask`: patches attend to each other, text to earlier tokens; no row is empty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_ext.methods.vora import build_vision_mask, splice_images


def rows(*lines: str) -> Tensor:
    return torch.tensor([[c == "1" for c in line] for line in lines])


def mask_of(image_ids: list[list[int]], valid: list[list[int]] | None = None, **fields) -> Tensor:
    ids = torch.tensor(image_ids, dtype=torch.int32)
    valid_ = torch.ones_like(ids) if valid is None else torch.tensor(valid)
    return build_vision_mask(valid_, ids, **fields)


def test_mask_of_six_tokens_equals_a_known_one():
    found = mask_of([[-1, 0, 0, 0, -1, -1]])
    assert found.shape == (1, 1, 6, 6) and found.dtype == torch.bool
    expected = rows("100000", "111100", "111100", "111100", "111110", "111111")
    assert torch.equal(found[0, 0], expected)


def test_mask_without_bidirectional_is_causal():
    found = mask_of([[-1, 0, 0, 0, -1, -1]], bidirectional=False)
    assert torch.equal(found[0, 0], torch.ones(6, 6, dtype=torch.bool).tril())


def test_window_limits_earlier_tokens_but_not_an_image():
    found = mask_of([[-1, 0, 0, 0, -1, -1]], window=2)[0, 0].int().tolist()
    assert found == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


def test_adjacent_images_do_not_attend_to_each_other():
    found = mask_of([[0, 0, 1, 1, -1]])
    assert torch.equal(found[0, 0], rows("11000", "11000", "11110", "11110", "11111"))


def test_samples_do_not_attend_to_each_other():
    found = mask_of([[-1, -1, 0, 0], [0, 0, -1, -1]])
    assert torch.equal(found[0, 0], rows("1000", "1100", "1111", "1111"))
    assert torch.equal(found[1, 0], rows("1100", "1100", "1110", "1111"))


def test_padding_is_not_a_key_and_its_rows_attend_to_themselves():
    right = mask_of([[0, 0, -1, -1, -1]], [[1, 1, 1, 0, 0]])
    assert torch.equal(right[0, 0], rows("11000", "11000", "11100", "11110", "11101"))
    left = mask_of([[-1, -1, -1, 0, 0]], [[0, 0, 1, 1, 1]])
    assert torch.equal(left[0, 0], rows("10000", "01000", "00100", "00111", "00111"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_additive_mask_uses_the_least_finite_number(dtype: torch.dtype):
    ids, valid = [[-1, 0, 0, -1], [0, 0, -1, -1]], [[0, 1, 1, 1], [1, 1, 1, 0]]
    found = mask_of(ids, valid, dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found == 0, mask_of(ids, valid))
    assert set(found.unique().tolist()) == {0.0, torch.finfo(dtype).min}


@st.composite
def samples(draw, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Draw image ids and validity of samples of text and images, padded on either side."""
    ids = []
    for _ in range(batch):
        pieces = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 3)), min_size=1, max_size=4))
        number = -1
        sample = []
        for is_image, length in pieces:
            number += is_image
            sample += [number if is_image else -1] * length
        ids.append(sample)
    longest = max(map(len, ids))
    left = draw(st.booleans())
    valid = []
    for sample in ids:
        gap = [-1] * (longest - len(sample))
        mark = [0] * len(gap)
        valid.append(mark + [1] * len(sample) if left else [1] * len(sample) + mark)
        sample[:] = gap + sample if left else sample + gap
    return torch.tensor(ids), torch.tensor(valid)


@given(samples=samples())
def test_mask_equals_its_formula(samples: tuple[Tensor, Tensor]):
    ids, valid = samples
    found = build_vision_mask(valid, ids)
    assert found.any(-1).all()
    for b, sample in enumerate(ids.tolist()):
        for i, own in enumerate(sample):
            for j, other in enumerate(sample):
                allowed = bool(valid[b, j]) and (j <= i or own == other >= 0)
                assert found[b, 0, i, j] == (allowed or (i == j and not valid[b, i]))


@given(samples=samples(), data=st.data())
def test_rows_after_the_cache_equal_those_of_the_whole_mask(samples, data):
    ids, valid = samples
    past = data.draw(st.integers(0, ids.shape[1]))
    cut = 0 < past < ids.shape[1] and ((ids[:, past] == ids[:, past - 1]) & (ids[:, past] >= 0))
    if past and past < ids.shape[1] and cut.any():
        with pytest.raises(ValueError, match="past_length: sample"):
            build_vision_mask(valid, ids, past_length=past)
    else:
        found = build_vision_mask(valid, ids, past_length=past)
        assert torch.equal(found, build_vision_mask(valid, ids)[:, :, past:])


def test_decode_step_is_one_row_over_valid_keys():
    found = mask_of([[-1, -1, 0, 0, -1, -1]], [[0, 1, 1, 1, 1, 1]], past_length=5)
    assert torch.equal(found, rows("011111")[None, None])


def test_image_cut_by_the_cache_is_refused_if_bidirectional():
    message = (
        r"build_vision_mask: past_length: sample 1: expected all 3 tokens of image 0 in one call, "
        r"found 2 of them in the cache"
    )
    ids = [[0, 0, -1, -1, -1], [-1, 0, 0, 0, -1]]
    with pytest.raises(ValueError, match=message):
        mask_of(ids, past_length=3)
    assert mask_of(ids, past_length=3, bidirectional=False).shape == (2, 1, 2, 5)


@pytest.mark.parametrize(
    ("arguments", "fields", "message"),
    [
        (((2, 3), (2, 4)), {}, r"image_ids: expected shape \(B, T\), .* \(2, 3\), found \(2, 4\)"),
        (((3,), (3,)), {}, r"image_ids: expected shape \(B, T\)"),
        (((1, 3), (1, 3)), {"dtype": torch.int64}, r"dtype: .* a floating-point dtype or None"),
        (((1, 3), (1, 3)), {"past_length": 4}, r"past_length: expected 0 to 3, found 4"),
        (((1, 3), (1, 3)), {"window": 0}, r"window: expected at least 1, or None, found 0"),
        (((1, 3), (1, 3)), {"past_length": -1}, r"past_length: expected 0 to 3, found -1"),
    ],
)
def test_invalid_arguments_are_refused(arguments, fields: dict, message: str):
    valid, ids = (torch.ones(shape, dtype=torch.int64) for shape in arguments)
    with pytest.raises(ValueError, match=f"build_vision_mask: {message}"):
        build_vision_mask(valid, ids, **fields)


def test_image_whose_tokens_are_not_contiguous_is_refused():
    message = r"image_ids: sample 0: expected adjacent tokens of image 0, found other tokens"
    with pytest.raises(ValueError, match=message):
        mask_of([[0, 0, -1, 0]])
    with pytest.raises(ValueError, match=message):
        mask_of([[0, 1, 1, 0]])


def test_attention_mask_with_other_numbers_than_0_and_1_is_refused():
    message = r"build_vision_mask: attention_mask: expected bools, or 0 and 1, found 2"
    with pytest.raises(ValueError, match=message):
        mask_of([[0, 0, -1]], [[1, 1, 2]])


# -------------------------------------------------------------------------------------------------
# In a model


def llama(attention: str) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config).eval()


PROMPTS = [[1, -200, 2, 3], [-200, -200, 4]]


def image_tokens() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(n, 16, generator=generator) for n in sizes] for sizes in ((4,), (2, 3))]


def spliced(model: Any, images: list[list[Tensor]], side: str = "right") -> Any:
    ids = torch.tensor([row + [0] * (4 - len(row)) for row in PROMPTS])
    valid = torch.tensor([[1] * len(row) + [0] * (4 - len(row)) for row in PROMPTS])
    return splice_images(ids, model.get_input_embeddings(), images, valid, padding_side=side)


@torch.no_grad()
def hidden_states(model: Any, batch: Any, form: torch.dtype | None, **fields) -> Any:
    mask = build_vision_mask(batch.attention_mask, batch.image_ids, dtype=form, **fields)
    return model(
        inputs_embeds=batch.inputs_embeds,
        attention_mask=mask,
        position_ids=batch.position_ids,
        output_hidden_states=True,
        use_cache=False,
    )


@pytest.mark.parametrize(
    ("attention", "form"), [("eager", torch.float32), ("sdpa", torch.float32), ("sdpa", None)]
)
def test_left_and_right_padding_give_the_same_logits(attention: str, form: torch.dtype | None):
    model = llama(attention)
    found = {}
    for side in ("left", "right"):
        batch = spliced(model, image_tokens(), side)
        logits = hidden_states(model, batch, form).logits
        assert logits.isfinite().all()
        found[side] = logits[batch.attention_mask.bool()]
    torch.testing.assert_close(found["left"], found["right"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_last_patch_reaches_the_first_only_if_bidirectional(bidirectional: bool):
    model, images = llama("sdpa"), image_tokens()
    before = spliced(model, images)
    images[0][0] = images[0][0].clone()
    images[0][0][-1] += 1
    after = spliced(model, images)
    one, two = (
        hidden_states(model, batch, None, bidirectional=bidirectional).hidden_states[-1]
        for batch in (before, after)
    )
    assert torch.equal(one[0, 0], two[0, 0])  # text before the image is unchanged
    # The first patch changes only if attention is bidirectional.
    assert torch.equal(one[0, 1], two[0, 1]) is not bidirectional
    assert not torch.equal(one[0, 5:], two[0, 5:])  # text after the image changes
    torch.testing.assert_close(one[1], two[1], atol=1e-6, rtol=0)  # the other sample is unchanged


def test_image_does_not_attend_to_the_next_adjacent_image():
    model, images = llama("sdpa"), image_tokens()
    before = spliced(model, images)
    images[1][1] = images[1][1] + 1
    after = spliced(model, images)
    one, two = (hidden_states(model, b, None).hidden_states[-1][1] for b in (before, after))
    assert torch.equal(one[:2], two[:2]) and not torch.equal(one[2:], two[2:])
