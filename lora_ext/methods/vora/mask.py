"""Who attends to whom: text to what came before it, the patches of an image to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ext._checks import require

from .splice import as_bool


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
    if attention_mask.dim() != 2 or image_ids.shape != attention_mask.shape:
        raise ValueError(
            "build_vision_mask: image_ids: expected shape (B, T), that of attention_mask "
            f"{tuple(attention_mask.shape)}, found {tuple(image_ids.shape)}"
        )
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(
            f"build_vision_mask: dtype: expected a floating one or None, found {dtype}"
        )
    length = attention_mask.shape[1]
    expected = f"0 to {length}"
    require(0 <= past_length <= length, "build_vision_mask", "past_length", expected, past_length)
    if window is not None and window < 1:
        raise ValueError(f"build_vision_mask: window: expected at least 1 or None, found {window}")
    valid = as_bool("build_vision_mask", "attention_mask", attention_mask)
    _check_images(image_ids, past_length if bidirectional else 0)

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


def _check_images(image_ids: Tensor, past_length: int) -> None:
    """Refuse an image whose tokens are not one run, or which lies on both sides of the cache's
    end."""
    for sample, ids in enumerate(image_ids.tolist()):
        starts = [i for n, i in enumerate(ids) if i >= 0 and (n == 0 or ids[n - 1] != i)]
        apart = next((i for n, i in enumerate(starts) if i in starts[:n]), None)
        if apart is not None:
            raise ValueError(
                f"build_vision_mask: image_ids: sample {sample}: expected the tokens of image "
                f"{apart} side by side, found them apart"
            )
        if 0 < past_length < len(ids) and ids[past_length] == ids[past_length - 1] >= 0:
            image = ids[past_length]
            raise ValueError(
                f"build_vision_mask: past_length: sample {sample}: expected all "
                f"{ids.count(image)} tokens of image {image} in one call, found "
                f"{ids[:past_length].count(image)} of them in the cache"
            )
