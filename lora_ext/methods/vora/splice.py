"""Images among text: each placeholder in the token ids gives way to the tokens of its image, whose
patches then see each other."""

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
TEXT = -1  # in image_ids

Side = Literal["left", "right"]


class Spliced(NamedTuple):
    """A batch of text and images, as a decoder takes it; ``T`` is the longest sample's length."""

    inputs_embeds: Tensor  # (B, T, d), zero on padding
    vision_mask: Tensor  # (B, T) bool: the tokens of images
    image_ids: Tensor  # (B, T) int32: which image of its sample a token is of, -1 for none
    attention_mask: Tensor  # (B, T) int64: 1 on text and images, 0 on padding
    labels: Tensor | None  # (B, T): -100 on images and padding; None where none were given
    position_ids: Tensor  # (B, T) int64: cumsum(attention_mask) - 1, and 0 on padding before it


def splice_images(
    input_ids: Tensor,
    embed: Callable[[Tensor], Tensor],
    image_tokens: Sequence[Sequence[Tensor] | None] | None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    placeholder: int = PLACEHOLDER,
    padding_side: Side = "right",
) -> Spliced:
    """Put the tokens of images where the placeholders stand.

    Padding of the input is dropped and laid anew, since samples grow by different lengths.

    Args:
        input_ids: ``(B, S)`` integers, with a placeholder for each image.
        embed: ids ``(n,)`` to ``(n, d)``, such as ``model.get_input_embeddings()``; called once,
            for all text of the batch, and never with a placeholder.
        image_tokens: for each sample its images' tokens ``(N, d)`` in order, as a list or, of one
            image, as they are; an empty list or None where it has none. None for a batch of text.
        attention_mask: ``(B, S)``, bool or 0 and 1; 0 is padding. Default: no padding.
        labels: ``(B, S)``. placeholder: its id. padding_side: where the new padding is.

    Returns:
        :class:`Spliced`; embeddings have the dtype and device of ``embed``'s.

    Raises:
        ValueError: another number of images than of placeholders in a sample, which is named with
            both; another number of samples; tokens of another width; shapes that disagree; another
            ``padding_side``. TypeError: ids that are no integers.
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
    # Before the lookup: another placeholder's id is out of its range.
    for sample, (count, tokens) in enumerate(zip(is_image.sum(1).tolist(), images, strict=True)):
        expected = f"as many images as placeholders, {count}"
        require(count == len(tokens), where, f"sample {sample}", expected, len(tokens))
    text = embed(input_ids[is_text])  # (all text, d)
    expected = f"shape (N, {text.shape[1]})"
    for sample, tokens in enumerate(images):
        for number, one in enumerate(tokens):
            fits = one.dim() == 2 and one.shape[1] == text.shape[1] and len(one) > 0
            which = f"sample {sample}, image {number}"
            require(fits, where, which, expected, tuple(one.shape))

    rows: list[tuple[Tensor, ...]] = []
    texts = text.split(is_text.sum(1).tolist())
    for sample, tokens in enumerate(images):
        ids = input_ids[sample][valid[sample]]
        marks = None if labels is None else labels[sample][valid[sample]]
        rows.append(_row(ids == placeholder, texts[sample], tokens, marks))

    def laid(column: int, fill: int) -> Tensor:
        """Return one field of all samples, with padding."""
        return pad_sequence([row[column] for row in rows], True, fill, padding_side)

    image_ids, mask = laid(1, TEXT), laid(2, 0)
    return Spliced(
        inputs_embeds=laid(0, 0),
        vision_mask=image_ids != TEXT,
        image_ids=image_ids,
        attention_mask=mask,
        labels=None if labels is None else laid(3, IGNORE),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    )


def _as_bool(where: str, mask: Tensor) -> Tensor:
    """A mask of bools, or of numbers that are all 0 or 1, as bools."""
    if mask.dtype != torch.bool:
        others = mask[(mask != 0) & (mask != 1)]
        if len(others):
            found = others[0].item()
            raise ValueError(f"{where}: attention_mask: expected bools, or 0 and 1, found {found}")
    return mask.bool()


def _row(
    is_image: Tensor, text: Tensor, images: list[Tensor], labels: Tensor | None
) -> tuple[Tensor, ...]:
    """A sample without padding: embeddings, image ids, attention mask and, where given, labels.
    ``is_image (n,)`` is where the placeholders stand; ``text`` are the others' embeddings."""
    sizes = torch.ones_like(is_image, dtype=torch.int64)
    sizes[is_image] = sizes.new_tensor([len(one) for one in images])
    number = torch.where(is_image, is_image.cumsum(0) - 1, TEXT)
    image_ids = number.repeat_interleave(sizes).to(torch.int32)  # (T,)

    # Runs of text between the images, one more than there are images.
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
    """The attention mask of a batch of text and images.

    ``allow[b, i, j] = valid[b, j] and (j <= i or image_ids[b, i] == image_ids[b, j] >= 0)``, and
    besides ``allow[b, i, i]`` for a query i of padding, so that no row is empty. Two images that
    touch have different ids and do not see each other beyond the order of the sequence.

    Args:
        attention_mask: ``(B, T)``, bool or 0 and 1; 0 is padding.
        image_ids: ``(B, T)`` integers, as :func:`splice_images` makes them: which image of its
            sample a token is of, -1 for text and padding.
        bidirectional: False leaves the order of the sequence alone, for images too.
        dtype: of an additive mask, 0 where it is allowed and the least finite number elsewhere;
            None gives bools. Eager attention of transformers wants the additive form: it adds bools
            as 0 and 1, and masks nothing.
        past_length: so many of the T tokens lie in the cache: they are keys, and no queries.
        window: of layers with sliding attention, which see so many tokens, ``j > i - window``; an
            image is seen as a whole.

    Returns:
        ``(B, 1, T - past_length, T)``.

    Raises:
        ValueError: shapes that disagree, numbers other than 0 and 1 in the attention mask, an image
            whose tokens are apart, or cut by the end of the cache; a ``past_length`` outside
            [0, T]; a window below 1; a dtype that is not floating.

    Source: arXiv 2503.20680. The released code takes images that touch for one; here they are two.
    """
    where = "build_vision_mask"
    shape, found = tuple(attention_mask.shape), tuple(image_ids.shape)
    fits = found == shape and len(shape) == 2
    require(fits, where, "image_ids", f"shape (B, T), that of attention_mask {shape}", found)
    length = shape[1]
    floating = dtype is None or dtype.is_floating_point
    require(floating, where, "dtype", "a floating one or None", dtype)
    require(0 <= past_length <= length, where, "past_length", f"0 to {length}", past_length)
    require(window is None or window >= 1, where, "window", "at least 1 or None", window)
    valid = _as_bool(where, attention_mask)
    past = past_length if bidirectional else 0  # an image is not cut by the end of the cache
    for sample, ids in enumerate(image_ids.tolist()):
        which = f"sample {sample}"
        starts = [i for i, _ in itertools.groupby(ids) if i >= 0]
        apart = next((i for n, i in enumerate(starts) if i in starts[:n]), None)
        expected = f"the tokens of image {apart} side by side"
        require(apart is None, f"{where}: image_ids", which, expected, "them apart")
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
