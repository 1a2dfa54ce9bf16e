"""Insertion of the tokens of images into text, and an attention mask in which the tokens of an
image attend to each other in both directions.

Shape letters: ``B`` samples, ``S`` ids per sample, ``T`` tokens of the longest sample including
those of images, ``d`` hidden width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_ext._checks import choice, require
from lora_ext.layers import IGNORE

PLACEHOLDER = -200
TEXT = -1  # value of text and padding in image_ids

Side = Literal["left", "right"]


class Spliced(NamedTuple):
    """Batch of text and images for a decoder."""

    inputs_embeds: Tensor  # (B, T, d), zero on padding
    vision_mask: Tensor  # (B, T) bool, True for tokens of images
    image_ids: Tensor  # (B, T) int32, index of the token's image in the sample, otherwise -1
    attention_mask: Tensor  # (B, T) int64, 1 on text and images, 0 on padding
    labels: Tensor | None  # (B, T), -100 on images and padding; None without labels
    position_ids: Tensor  # (B, T) int64, max(0, cumsum(attention_mask) - 1)


def splice_images(
    input_ids: Tensor,
    embed: Callable[[Tensor], Tensor],
    image_tokens: Sequence[Sequence[Tensor] | None] | None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    placeholder: int = PLACEHOLDER,
    padding_side: Side = "right",
) -> Spliced:
    """Replace placeholders by the tokens of their images.

    Samples grow by different lengths, so the padding of the input is replaced by new padding.

    Args:
        input_ids: ids ``(B, S)``, integers, with one placeholder per image.
        embed: function from ids ``(n,)`` to embeddings ``(n, d)``, such as
            ``model.get_input_embeddings()``. It is called once with all text of the batch, without
            placeholders.
        image_tokens: one list per sample with the tokens ``(N, d)`` of its images in order. For a
            sample with one image, the image's tensor may replace the list; for a sample without
            images, pass an empty list or None. None for a batch without images.
        attention_mask: mask ``(B, S)``, bool or 0 and 1, with 0 for padding. Default is no padding.
        labels: target ids ``(B, S)``, aligned with ``input_ids``.
        placeholder: id that represents an image.
        padding_side: side of the new padding.

    Returns:
        :class:`Spliced`; its embeddings have the dtype and device of the results of ``embed``.

    Raises:
        ValueError: If a sample has different numbers of images and placeholders, or the number of
            samples, the width of tokens, a shape or ``padding_side`` is wrong.
        TypeError: If the ids are not integers.
    """
    where = "splice_images"
    shape = tuple(input_ids.shape)
    choice(where, "padding_side", padding_side, get_args(Side))
    fits = len(shape) == 2 and shape[0] > 0
    require(fits, where, "input_ids", "shape (B, S), B at least 1", shape)
    fits = not input_ids.is_floating_point() and input_ids.dtype != torch.bool
    require(fits, where, "input_ids", "integers", input_ids.dtype, TypeError)
    for name, given in (("attention_mask", attention_mask), ("labels", labels)):
        found = shape if given is None else tuple(given.shape)
        require(found == shape, where, name, f"the shape of input_ids {shape}", found)
    valid = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        valid = _as_bool(where, attention_mask)
    lists: list[Any] = [None] * shape[0] if image_tokens is None else list(image_tokens)
    expected = f"a list for each of {shape[0]} samples"
    require(len(lists) == shape[0], where, "image_tokens", expected, len(lists))
    images = [
        [] if t is None else [t] if isinstance(t, Tensor) and t.dim() == 2 else list(t)
        for t in lists
    ]
    is_image = valid & (input_ids == placeholder)
    is_text = valid & ~is_image
    where = f"{where}: image_tokens"
    # This check is before the call of `embed`, which fails if `placeholder` is not the id in use.
    for sample, (count, tokens) in enumerate(zip(is_image.sum(1).tolist(), images, strict=True)):
        expected = f"{count} images for {count} placeholders"
        require(count == len(tokens), where, f"sample {sample}", expected, len(tokens))
    text = embed(input_ids[is_text])  # (all text, d)
    expected = f"shape (N, {text.shape[1]})"
    for sample, tokens in enumerate(images):
        for number, one in enumerate(tokens):
            fits = one.dim() == 2 and one.shape[1] == text.shape[1] and len(one) > 0
            require(fits, where, f"sample {sample}, image {number}", expected, tuple(one.shape))

    rows: list[tuple[Tensor, ...]] = []
    texts = text.split(is_text.sum(1).tolist())
    for sample, tokens in enumerate(images):
        ids = input_ids[sample][valid[sample]]
        marks = None if labels is None else labels[sample][valid[sample]]
        rows.append(_row(ids == placeholder, texts[sample], tokens, marks))

    def padded(column: int, fill: int) -> Tensor:
        """Return one field of all samples, with padding."""
        return pad_sequence([row[column] for row in rows], True, fill, padding_side)

    image_ids, mask = padded(1, TEXT), padded(2, 0)
    return Spliced(
        inputs_embeds=padded(0, 0),
        vision_mask=image_ids != TEXT,
        image_ids=image_ids,
        attention_mask=mask,
        labels=None if labels is None else padded(3, IGNORE),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    )


def _as_bool(where: str, mask: Tensor) -> Tensor:
    """Convert a mask of bools, or of numbers 0 and 1, to bools."""
    if mask.dtype != torch.bool:
        others = mask[(mask != 0) & (mask != 1)]
        if len(others):
            found = others[0].item()
            raise ValueError(f"{where}: attention_mask: expected bools, or 0 and 1, found {found}")
    return mask.bool()


def _row(
    is_image: Tensor, text: Tensor, images: list[Tensor], labels: Tensor | None
) -> tuple[Tensor, ...]:
    """Return a sample without padding: embeddings, image ids, attention mask and labels (if given).

    Args:
        is_image: ``(n,)`` bool, True for placeholders.
        text: embeddings of the ids that are not placeholders.
        images: tokens of each image.
        labels: target ids ``(n,)``, or None.
    """
    sizes = torch.ones_like(is_image, dtype=torch.int64)
    sizes[is_image] = sizes.new_tensor([len(one) for one in images])
    number = torch.where(is_image, is_image.cumsum(0) - 1, TEXT)
    image_ids = number.repeat_interleave(sizes).to(torch.int32)  # (T,)

    # There is one more run of text than there are images.
    places = [-1, *is_image.nonzero()[:, 0].tolist(), len(is_image)]
    runs = text.split([after - before - 1 for before, after in itertools.pairwise(places)])
    pieces = [runs[0]]
    for one, run in zip(images, runs[1:], strict=True):
        pieces += [one.to(text), run]
    row = torch.cat(pieces), image_ids, torch.ones_like(image_ids, dtype=torch.int64)
    if labels is None:
        return row
    return *row, labels.masked_fill(is_image, IGNORE).repeat_interleave(sizes)


def build_vision_mask(
    attention_mask: Tensor,
    image_ids: Tensor,
    bidirectional: bool = True,
    dtype: torch.dtype | None = None,
    past_length: int = 0,
    window: int | None = None,
) -> Tensor:
    """Build the attention mask of a batch of text and images.

    ``allow[b, i, j] = valid[b, j] and (j <= i or image_ids[b, i] == image_ids[b, j] >= 0)``. In
    addition, ``allow[b, i, i]`` is True for a padding query i, so that no row is empty. Adjacent
    images have different ids and attend to each other in causal order only.

    Args:
        attention_mask: mask ``(B, T)``, bool or 0 and 1, with 0 for padding.
        image_ids: integers ``(B, T)`` from :func:`splice_images`: index of the token's image in its
            sample, -1 for text and padding.
        bidirectional: whether the tokens of an image attend to each other in both directions;
            otherwise images are in causal order too.
        dtype: dtype of an additive mask, with 0 for allowed pairs and the lowest finite number for
            all other pairs; None returns bools. Eager attention of transformers needs an additive
            mask: it adds bools as 0 and 1, which masks nothing.
        past_length: number of the T tokens that are in the cache; they are keys but not queries.
        window: number of tokens that a query attends to in layers with sliding attention,
            ``j > i - window``. With ``bidirectional``, the tokens of an image still attend to the
            whole image.

    Returns:
        ``(B, 1, T - past_length, T)``.

    Raises:
        ValueError: If shapes disagree; if the attention mask has values other than 0 and 1; if the
            tokens of an image are not adjacent, or are split by the end of the cache; if
            ``past_length`` is outside [0, T]; if the window is below 1; or if the dtype is not
            floating-point.

    Source: arXiv 2503.20680. The released code treats adjacent images as a single image.
    """
    where = "build_vision_mask"
    shape, found = tuple(attention_mask.shape), tuple(image_ids.shape)
    fits = found == shape and len(shape) == 2
    require(fits, where, "image_ids", f"shape (B, T), as attention_mask {shape}", found)
    length = shape[1]
    floating = dtype is None or dtype.is_floating_point
    require(floating, where, "dtype", "a floating-point dtype or None", dtype)
    require(0 <= past_length <= length, where, "past_length", f"0 to {length}", past_length)
    require(window is None or window >= 1, where, "window", "at least 1, or None", window)
    valid = _as_bool(where, attention_mask)
    past = past_length if bidirectional else 0  # With causal images, the cache may end inside one.
    for sample, ids in enumerate(image_ids.tolist()):
        which = f"sample {sample}"
        starts = [i for i, _ in itertools.groupby(ids) if i >= 0]
        apart = next((i for n, i in enumerate(starts) if i in starts[:n]), None)
        expected = f"adjacent tokens of image {apart}"
        require(apart is None, f"{where}: image_ids", which, expected, "other tokens in between")
        if 0 < past < length:
            image = ids[past]
            whole = image < 0 or ids[past - 1] != image
            expected = f"all {ids.count(image)} tokens of image {image} in one call"
            found = f"{ids[:past].count(image)} of them in the cache"
            require(whole, f"{where}: past_length", which, expected, found)

    place = torch.arange(length, device=valid.device)
    allow = place <= place[past_length:, None]  # (queries, T)
    if window is not None:
        allow &= place > place[past_length:, None] - window
    if bidirectional:
        query = image_ids[:, past_length:, None]
        allow = allow | ((query >= 0) & (query == image_ids[:, None]))  # (B, queries, T)
    allow = allow & valid[:, None]
    itself = place == place[past_length:, None]
    allow = (allow | (itself & ~valid[:, past_length:, None]))[:, None]
    if dtype is None:
        return allow
    additive = torch.zeros(allow.shape, dtype=dtype, device=allow.device)
    return additive.masked_fill_(~allow, torch.finfo(dtype).min)
