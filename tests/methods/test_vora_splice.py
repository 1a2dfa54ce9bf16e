"""`splice_images`: images replace their placeholders, and padding is recomputed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_ext.methods.vora import splice_images

P = -200
WIDTH = 3


class Embedding(nn.Embedding):
    """Embedding that records its inputs."""

    def __init__(self) -> None:
        super().__init__(20, WIDTH)
        self.asked: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.asked.append(ids)
        return super().forward(ids)


def image(tokens: int, value: float = 1.0) -> Tensor:
    return torch.full((tokens, WIDTH), value) + torch.arange(tokens)[:, None]


def test_spliced_batch_equals_a_known_one():
    embed = Embedding()
    ids = torch.tensor([[5, P, 6, 7], [8, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = splice_images(ids, embed, [[image(2)], []], mask, ids)
    assert found._fields == (
        "inputs_embeds",
        "vision_mask",
        "image_ids",
        "attention_mask",
        "labels",
        "position_ids",
    )
    table, zero = embed.weight, torch.zeros(WIDTH)
    first = torch.stack([table[5], *image(2), table[6], table[7]])
    assert torch.equal(found.inputs_embeds[0], first)
    assert torch.equal(found.inputs_embeds[1], torch.stack([table[8], table[9], zero, zero, zero]))
    assert found.vision_mask.tolist() == [[False, True, True, False, False], [False] * 5]
    assert found.image_ids.tolist() == [[-1, 0, 0, -1, -1], [-1] * 5]
    assert found.image_ids.dtype == torch.int32
    assert found.attention_mask.tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert found.labels is not None
    assert found.labels.tolist() == [[5, -100, -100, 6, 7], [8, 9, -100, -100, -100]]
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 1, 1, 1]]


def test_left_padding_counts_positions_from_the_text():
    ids = torch.tensor([[5, P, 6], [0, 8, 9]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    found = splice_images(ids, Embedding(), [[image(3)], None], mask, ids, padding_side="left")
    assert found.attention_mask.tolist() == [[1] * 5, [0, 0, 0, 1, 1]]
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    assert found.labels is not None
    assert found.labels[1].tolist() == [-100, -100, -100, 8, 9]
    assert found.image_ids[0].tolist() == [-1, 0, 0, 0, -1]


def test_embedding_never_gets_placeholders_or_padding():
    embed = Embedding()
    ids = torch.tensor([[P, P, 4, 19], [3, P, -7, -7]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    splice_images(ids, embed, [[image(1), image(2)], [image(1)]], mask)
    assert [asked.tolist() for asked in embed.asked] == [[4, 19, 3]]


def test_images_without_a_placeholder_are_refused_before_the_lookup():
    embed = Embedding()
    with pytest.raises(ValueError, match="expected 0 images for 0 placeholders, found 1"):
        splice_images(torch.tensor([[5, -100]]), embed, [[image(2)]])
    assert not embed.asked


def test_adjacent_images_have_different_image_ids():
    found = splice_images(torch.tensor([[P, P]]), Embedding(), [[image(2), image(1)]])
    assert found.image_ids.tolist() == [[0, 0, 1]]
    assert torch.equal(found.inputs_embeds[0], torch.cat([image(2), image(1)]))


def test_single_image_needs_no_list():
    ids = torch.tensor([[4, P], [P, 5]])
    tokens = [image(2), image(3)]
    found = splice_images(ids, Embedding(), tokens)
    assert found.image_ids.tolist() == [[-1, 0, 0, -1], [0, 0, 0, -1]]
    assert torch.equal(found.inputs_embeds[1, :3], tokens[1])


def test_placeholder_in_the_padding_is_ignored():
    ids = torch.tensor([[4, P, P]])
    found = splice_images(ids, Embedding(), [[image(2)]], torch.tensor([[1, 1, 0]]))
    assert found.image_ids.tolist() == [[-1, 0, 0]]


def test_text_needs_no_images_and_the_placeholder_can_be_set():
    ids = torch.tensor([[4, 5], [6, 7]])
    found = splice_images(ids, Embedding(), None)
    assert not found.vision_mask.any() and found.labels is None
    found = splice_images(ids, Embedding(), [[image(3)], []], placeholder=4)
    assert found.image_ids.tolist() == [[0, 0, 0, -1], [-1] * 4]


def test_inputs_are_unchanged_and_embeds_have_the_embeddings_dtype():
    ids, labels = torch.tensor([[4, P]]), torch.tensor([[4, P]])
    embed = Embedding().to(torch.bfloat16)
    found = splice_images(ids, embed, [[image(2)]], None, labels)
    assert found.inputs_embeds.dtype == torch.bfloat16
    assert ids.tolist() == labels.tolist() == [[4, P]]


def test_gradients_reach_images_and_embedding():
    embed, one = Embedding(), image(2).requires_grad_()
    found = splice_images(torch.tensor([[4, P], [5, 6]]), embed, [[one], []])
    (found.inputs_embeds * torch.arange(18.0).view(2, 3, 3)).sum().backward()
    assert torch.equal(one.grad, torch.arange(3.0, 9).view(2, 3))
    assert embed.weight.grad[[4, 5, 6]].tolist() == [[0, 1, 2], [9, 10, 11], [12, 13, 14]]


@st.composite
def batches(draw) -> tuple[list[list[int]], list[list[int]]]:
    """Draw the token ids of several samples, and the sizes of their images."""
    ids = draw(
        st.lists(
            st.lists(st.sampled_from([P, 1, 2, 3]), min_size=1, max_size=5), min_size=1, max_size=3
        )
    )
    sizes = [[draw(st.integers(1, 3)) for i in sample if i == P] for sample in ids]
    return ids, sizes


@pytest.mark.slow
@given(batch=batches(), side=st.sampled_from(["left", "right"]), before=st.booleans())
def test_batched_sample_equals_the_sample_alone(batch, side: str, before: bool):
    rows, sizes = batch
    torch.manual_seed(0)
    embed = Embedding()
    images = [[torch.randn(n, WIDTH) for n in sample] for sample in sizes]
    longest = max(map(len, rows))
    padded = [
        ([0] * (longest - len(r)) + r if before else r + [0] * (longest - len(r)), len(r))
        for r in rows
    ]
    ids = torch.tensor([row for row, _ in padded])
    marks = [
        [0] * (longest - n) + [1] * n if before else [1] * n + [0] * (longest - n)
        for _, n in padded
    ]
    found = splice_images(ids, embed, images, torch.tensor(marks), ids, padding_side=side)
    for b, (row, own) in enumerate(zip(rows, images, strict=True)):
        alone = splice_images(torch.tensor([row]), embed, [own], None, torch.tensor([row]))
        kept = found.attention_mask[b].bool()
        for name, whole, single in zip(found._fields, found, alone, strict=True):
            assert torch.equal(whole[b][kept], single[0]), name
        assert not found.inputs_embeds[b][~kept].any() and not found.vision_mask[b][~kept].any()
        assert (found.labels[b][~kept] == -100).all() and (found.image_ids[b][~kept] == -1).all()
        places = kept.nonzero()[:, 0]
        assert places[0 if side == "right" else -1] == (0 if side == "right" else len(kept) - 1)


IDS = torch.tensor([[4, 5], [P, 6]])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([[], []], r"image_tokens: sample 1: expected 1 images for 1 placeholders, found 0"),
        ([[image(1)], [image(1)]], r"sample 0: expected 0 images for 0 placeholders, found 1"),
        ([[], [image(1), image(1)]], r"sample 1: expected 1 images for 1 placeholders, found 2"),
        (None, r"sample 1: expected 1 images for 1 placeholders, found 0"),
        ([[image(1)]], r"image_tokens: expected a list for each of 2 samples, found 1"),
        ([[], [torch.zeros(2, 4)]], r"sample 1, image 0: expected shape \(N, 3\), found \(2, 4\)"),
        ([[], [torch.zeros(1, 2, 3)]], r"expected shape \(N, 3\), found \(1, 2, 3\)"),
        ([[], [torch.zeros(0, 3)]], r"expected shape \(N, 3\), found \(0, 3\)"),
    ],
)
def test_error_for_images_that_do_not_fit_names_sample_and_counts(images, message: str):
    with pytest.raises(ValueError, match=f"splice_images: .*{message}"):
        splice_images(IDS, Embedding(), images)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"input_ids": IDS[0]}, ValueError, r"input_ids: expected shape \(B, S\), .* found \(2,\)"),
        ({"input_ids": IDS[:0]}, ValueError, r"input_ids: .* B at least 1, found \(0, 2\)"),
        ({"input_ids": IDS.float()}, TypeError, r"input_ids: expected integers, found torch.float"),
        (
            {"attention_mask": IDS[:1]},
            ValueError,
            r"attention_mask: expected the shape of input_ids",
        ),
        ({"attention_mask": IDS}, ValueError, r"attention_mask: expected bools, or 0 and 1, found"),
        ({"labels": IDS[:, :1]}, ValueError, r"labels: expected the shape .* found \(2, 1\)"),
        ({"padding_side": "both"}, ValueError, r"padding_side: expected one of .* found 'both'"),
    ],
)
def test_inconsistent_arguments_are_refused(fields: dict, error, message: str):
    arguments = {"input_ids": IDS, "embed": Embedding(), "image_tokens": [[], [image(1)]]}
    with pytest.raises(error, match=f"splice_images: {message}"):
        splice_images(**{**arguments, **fields})
