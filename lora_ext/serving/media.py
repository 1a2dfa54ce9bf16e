"""Images, videos and sounds of a batch have the adapter of the sequence that they are in, however
many it has.

Vision and audio towers, and the projectors behind them, see images and not sequences. Which
sequence an image belongs to is told by the tokens that stand for it. Where they do not tell, a
block with several names is refused, at the first layer of the tower that has adapters.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext.rows import Owners, generation_scope, mixes_names, serve_media


class _Kind(NamedTuple):
    """One kind of media, as the models of transformers call it."""

    method: str  # which runs tower and projector
    given: str  # the argument of a forward that has them
    token: str  # of the configuration, for the token that stands for a part of one


_KINDS = (
    _Kind("get_image_features", "pixel_values", "image_token_id"),
    _Kind("get_video_features", "pixel_values_videos", "video_token_id"),
    _Kind("get_audio_features", "input_features", "audio_token_id"),
)

#: Arguments that tell sizes: what differs from image to image there may differ in its tokens.
_SIZES = re.compile("image|pixel|spatial|video|audio|feature")

_noted: ContextVar[Mapping[str, Owners] | None] = ContextVar("lora_ext.media", default=None)


@contextlib.contextmanager
def media_noted(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Around a model's forward or ``generate``: whose its images, videos and sounds are.

    Raises:
        ValueError: the model has no method that runs its tower apart, its media are as many as the
            sequences and not one in each, and the block names several adapters.
    """
    found = _whose(model, args, kwargs)
    if not found:  # a part of a model, or a later step: as the whole has noted
        yield
        return
    _check_served_apart(model, found)
    token = _noted.set(found)
    try:
        yield
    finally:
        _noted.reset(token)


def has_media(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a forward is given media whose tokens are to be looked at, which no graph does."""
    config = getattr(model, "config", None)
    return any(
        kwargs.get(kind.given) is not None and getattr(config, kind.token, None) is not None
        for kind in _KINDS
    )


def media_hooks(kind: type) -> dict[str, Any]:
    """What stands in for a class's methods that run its towers: the blocks follow the media."""
    return {
        each.method: _features(getattr(kind, each.method), each)
        for each in _KINDS
        if callable(getattr(kind, each.method, None))
    }


def _features(method: Callable[..., Any], kind: _Kind) -> Any:
    @functools.wraps(method)
    def features(self: Any, *args: Any, **kwargs: Any) -> Any:  # its signature is read
        owners = (_noted.get() or {}).get(kind.method)
        if owners is None:
            return method(self, *args, **kwargs)
        given = kwargs.get(kind.given, args[0] if args else None)
        if not isinstance(given, Tensor) or len(given) != owners.given:
            owners = owners._replace(rows=None)
        token = _noted.set(None)  # they follow once: a model hands them to a part of it
        try:
            with generation_scope():
                serve_media(owners)
                return method(self, *args, **kwargs)
        finally:
            _noted.reset(token)

    return features


def _check_served_apart(model: nn.Module, found: Mapping[str, Owners]) -> None:
    for kind in _KINDS:
        owners = found.get(kind.method)
        if owners is None or owners.given != owners.sequences or owners.in_order:
            continue
        if mixes_names() and not any(
            callable(getattr(part, kind.method, None)) for part in model.modules()
        ):
            raise ValueError(
                f"adapters: names: expected one name for all sequences, or one of {kind.given} in "
                f"each of them, found several names and {owners.given} in other places: "
                f"{type(model).__name__} does not run its tower apart, in {kind.method}"
            )


def _whose(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Owners]:
    config = getattr(model, "config", None)
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    tokens = ids if isinstance(ids, Tensor) and ids.dim() == 2 else kwargs.get("inputs_embeds")
    found = {}
    for kind in _KINDS:
        mark, given = getattr(config, kind.token, None), kwargs.get(kind.given)
        if mark is None or not isinstance(given, Tensor) or not isinstance(tokens, Tensor):
            continue
        counts = (ids == mark).sum(1).tolist() if tokens is ids else None
        rows, uniform = None, False
        if counts is not None:
            rows, uniform = _rows(counts, given, kwargs)
        found[kind.method] = Owners(rows, uniform, len(given), len(tokens))
    return found


def _rows(
    counts: Sequence[int], given: Tensor, kwargs: Mapping[str, Any]
) -> tuple[list[int] | None, bool]:
    """The sequence of each of the media, and whether a tower has as many rows for each of them.

    Args:
        counts: of each sequence's tokens that stand for a part of one.
        given: ``(N, ...)`` media, or ``(patches, features)`` of all of them, one after another.
        kwargs: of the forward.
    """
    total, number = sum(counts), len(given)
    if given.dim() == 5 and "pixel_attention_mask" in kwargs and number == len(counts):
        return _of_filled(counts, given), True
    if given.dim() == 2:
        if _fill(counts, kwargs, number):
            return [row for row, count in enumerate(counts) for _ in range(count)], True
        return None, False
    each, rest = divmod(total, number) if number else (0, 1)
    if not rest and each and all(count % each == 0 for count in counts) and _alike(number, kwargs):
        return [row for row, count in enumerate(counts) for _ in range(count // each)], True
    if number == len(counts) and all(counts):
        return list(range(number)), False
    return None, False


def _of_filled(counts: Sequence[int], given: Tensor) -> list[int] | None:
    """The sequence of each image in ``(B, n, 3, H, W)``, a row for each sequence, filled up with
    blank ones that no tower sees (Idefics): all have as many tokens."""
    seen = (given != 0).flatten(2).any(-1).sum(1).tolist()
    all_seen, total = sum(seen), sum(counts)
    if not total or [n * total for n in seen] != [count * all_seen for count in counts]:
        return None
    return [row for row, images in enumerate(seen) for _ in range(images)]


def _fill(counts: Sequence[int], kwargs: Mapping[str, Any], patches: int) -> bool:
    """Whether the grids, each with tokens in proportion to its patches, fill the sequences."""
    grids = [v for k, v in kwargs.items() if k.endswith("grid_thw") and isinstance(v, Tensor)]
    total = sum(counts)
    for grid in grids:
        sizes = grid.prod(-1).tolist()
        if sum(sizes) != patches or not total or any(size * total % patches for size in sizes):
            continue
        ends = set(torch.tensor([0, *sizes]).cumsum(0).mul(total).div(patches).tolist())
        if set(torch.tensor([0, *counts]).cumsum(0).tolist()) <= ends:
            return True
    return False


def _alike(number: int, kwargs: Mapping[str, Any]) -> bool:
    """Whether no argument about the media tells them apart by their sizes."""
    for name, value in kwargs.items():
        if not _SIZES.search(name) or not isinstance(value, Tensor) or value.is_floating_point():
            continue
        if len(value) == number and value.dim() > 1 and not (value == value[:1]).all():
            return False
    return True
