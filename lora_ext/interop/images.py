"""Images of a batch have the adapter of the sequence that they are in, however many it has.

Vision towers and projectors see images, not sequences. Which sequence an image belongs to is told
by the tokens that stand for it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor

from lora_ext.nn.generation import generation_scope, select_rows


class _Images(NamedTuple):
    rows: list[int]  # of each image
    sequences: int


_images: ContextVar[_Images | None] = ContextVar("lora_ext.images", default=None)


@contextlib.contextmanager
def images_noted(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Around a model's forward or ``generate``: whose its images are."""
    token = _images.set(_whose(model, args, kwargs))
    try:
        yield
    finally:
        _images.reset(token)


def image_features(kind: type) -> Any:
    """What stands in for a class's ``get_image_features``: the blocks follow the images."""

    @functools.wraps(kind.get_image_features)  # pyright: ignore[reportAttributeAccessIssue]
    def get_image_features(self: Any, *args: Any, **kwargs: Any) -> Any:  # its signature is read
        run = functools.partial(kind.get_image_features, self)  # pyright: ignore
        noted, pixels = _images.get(), kwargs.get("pixel_values", args[0] if args else None)
        if noted is None or not isinstance(pixels, Tensor) or len(pixels) != len(noted.rows):
            return run(*args, **kwargs)
        token = _images.set(None)  # they follow once: a model hands them to a part of it
        try:
            with generation_scope():
                select_rows(noted.rows, noted.sequences)
                return run(*args, **kwargs)
        finally:
            _images.reset(token)

    return get_image_features


def _whose(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Images | None:
    """None where there are no images, or the tokens do not tell."""
    pixels = kwargs.get("pixel_values")
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    config = getattr(model, "config", None)
    token = getattr(config, "image_token_id", None)
    if token is None or not isinstance(pixels, Tensor) or not isinstance(ids, Tensor):
        return _images.get()  # a part of a model: as the whole has noted
    counts = (ids == token).sum(1).tolist()
    each, rest = divmod(sum(counts), len(pixels)) if len(pixels) else (0, 1)
    if rest or each == 0 or any(count % each for count in counts):
        return None
    rows = [row for row, count in enumerate(counts) for _ in range(count // each)]
    return _Images(rows, len(ids))
