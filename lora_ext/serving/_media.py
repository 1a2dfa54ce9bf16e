"""Assignment of adapters to images, videos and sounds, which use the adapter of their sequence.

The rows of vision and audio towers (encoders), and of their projectors, are units of media (images,
videos or sounds) and not sequences. The owner of a unit is the sequence that contains its
placeholder tokens. If these tokens do not determine the owner, a block with several names raises an
error at the first layer of the tower that has adapters.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext.rows import Assignment, Layout, _context, _generation


class _Kind(NamedTuple):
    """Media type and its names in transformers models."""

    method: str  # method of a model that runs the tower and the projector
    given: str  # argument of forward that contains the media
    token: str  # attribute of the configuration that contains the placeholder token's id


KINDS = (
    _Kind("get_image_features", "pixel_values", "image_token_id"),
    _Kind("get_video_features", "pixel_values_videos", "video_token_id"),
    _Kind("get_audio_features", "input_features", "audio_token_id"),
)


class _Owners(NamedTuple):
    """Sequences of a batch to which the media of one type (such as images) belong."""

    rows: list[int] | None  # sequence of each unit, in order; None if unknown
    uniform: bool  # True if a tower has the same number of rows for each unit
    given: int  # number of rows of the argument that contains the media
    sequences: int  # number of sequences in the batch


#: Pattern for the names of arguments that contain sizes of media. Images of different sizes may
#: have different numbers of tokens.
_SIZES = re.compile("image|pixel|spatial|video|audio|feature")

_media_owners: ContextVar[Mapping[str, _Owners] | None] = ContextVar("lora_ext.media", default=None)


@contextlib.contextmanager
def media_owners(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Store during a ``with`` block which sequence each image, video and sound belongs to.

    Raises:
        ValueError: If a block has several names, the model has no method that runs its tower
            separately, and there are as many units as sequences but not one unit per sequence.
    """
    found = _owners(model, args, kwargs)
    if not found:  # part of a model, or a later step of generate: keep the stored owners
        yield
        return
    for kind in KINDS:
        owners = found.get(kind.method)
        if owners is None or owners.given != owners.sequences:
            continue
        if owners.rows == list(range(owners.sequences)):
            continue
        apart = any(callable(getattr(part, kind.method, None)) for part in model.modules())
        blocks = _context.outwards(_context.innermost())
        if not apart and any(len(block.assignment.each()) > 1 for block in blocks):
            raise ValueError(
                "adapters: names: expected one name for all sequences, or one entry of "
                f"{kind.given} in each sequence, found several names and {owners.given} entries in "
                f"other positions: {type(model).__name__} does not run its tower in {kind.method}"
            )
    with _context.context_value(_media_owners, found):
        yield


def has_media(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a forward receives images, videos or sounds.

    Such a forward reads the values of token ids, which a compiled graph cannot do.
    """
    config = getattr(model, "config", None)
    return any(
        kwargs.get(kind.given) is not None and getattr(config, kind.token, None) is not None
        for kind in KINDS
    )


def of_media(
    kind: _Kind, _hooks: Any, model: Any, own: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Run a method of a tower in ``adapters`` blocks with one name per image, video or sound.

    Args:
        kind: type of the media.
        model: model that contains the tower.
        own: original method of ``model``, called with ``args`` and ``kwargs``.
    """
    owners = (_media_owners.get() or {}).get(kind.method)
    if owners is None:
        return own(*args, **kwargs)
    given = kwargs.get(kind.given, args[0] if args else None)
    if not isinstance(given, Tensor) or len(given) != owners.given:
        owners = owners._replace(rows=None)
    # Unset the variable during the call: the method may call the same method of a submodule, which
    # must not change the blocks again.
    with _context.context_value(_media_owners, None), _generation.generation_scope():
        _generation.change_blocks(lambda block: _assigned(block.assignment, owners))
        return own(*args, **kwargs)


def _owners(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, _Owners]:
    config = getattr(model, "config", None)
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    tokens = ids if isinstance(ids, Tensor) and ids.dim() == 2 else kwargs.get("inputs_embeds")
    found = {}
    for kind in KINDS:
        mark, given = getattr(config, kind.token, None), kwargs.get(kind.given)
        if mark is None or not isinstance(given, Tensor) or not isinstance(tokens, Tensor):
            continue
        counts = (ids == mark).sum(1).tolist() if tokens is ids else None
        rows, uniform = None, False
        if counts is not None:
            rows, uniform = _rows(counts, given, kwargs)
        found[kind.method] = _Owners(rows, uniform, len(given), len(tokens))
    return found


def _rows(
    counts: Sequence[int], given: Tensor, kwargs: Mapping[str, Any]
) -> tuple[list[int] | None, bool]:
    """Return ``rows`` and ``uniform`` of :class:`_Owners`.

    Args:
        counts: number of placeholder tokens in each sequence.
        given: N media ``(N, ...)``, or the patches of all media, ``(patches, features)``.
        kwargs: arguments of the forward.
    """
    total, number = sum(counts), len(given)
    if given.dim() == 5 and "pixel_attention_mask" in kwargs and number == len(counts):
        # Idefics: (B, n, 3, H, W), padded with blank images that the model removes. All images
        # have the same number of tokens.
        seen = (given != 0).flatten(2).any(-1).sum(1).tolist()
        if not total or [n * total for n in seen] != [count * sum(seen) for count in counts]:
            return None, True
        return [row for row, images in enumerate(seen) for _ in range(images)], True
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


def _fill(counts: Sequence[int], kwargs: Mapping[str, Any], patches: int) -> bool:
    """Return whether the grid sizes of the units match the number of tokens of each sequence.

    This assumes that a unit's number of tokens is proportional to its number of patches.
    """
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
    """Return whether each argument that ``_SIZES`` matches has equal entries for all media."""
    return all(
        len(value) != number or value.dim() <= 1 or bool((value == value[:1]).all())
        for name, value in kwargs.items()
        if _SIZES.search(name) and isinstance(value, Tensor) and not value.is_floating_point()
    )


# -------------------------------------------------------------------------------------------------
# Rows of media


class _Units(Assignment):
    """Assignment of an adapter to each image, video or sound, which has several rows in a tower.

    Args:
        entries: assignment of an adapter to each unit.
        uniform: True if all units have the same number of rows, which a layer may then pack.
    """

    def __init__(self, entries: Assignment, uniform: bool):
        super().__init__(entries.names, entries.places, entries.shape, weights=entries.weights)
        self._uniform = uniform

    def check_tokens(self, layout: Layout) -> None:
        """Raise ValueError unless an embedding's input has one entry per unit of media.

        The input of an embedding of positions, for example, has other entries.
        """
        if layout.leading[:1] != (len(self.places),):
            raise self._misfit(layout.leading)

    def spread(self, layout: Layout) -> tuple[int, int]:
        leading = layout.leading
        rows, units = math.prod(leading), len(self.places)
        # A tower may pack the rows of all units into the first dimension, or into (1, rows, ...).
        packed = leading[0] if len(leading) == 1 or leading[0] > 1 else rows
        if leading[0] == units or (self._uniform and packed % units == 0):
            return rows // units, 1
        raise self._misfit(leading)


class _Unknown(Assignment):
    """Assignment for a layer whose rows belong to unknown sequences; its use raises ValueError."""

    def spread(self, layout: Layout) -> tuple[int, int]:
        raise ValueError(
            "adapters: names: expected one name for all sequences, as the tokens do not determine "
            f"which sequence contains each image, video or sound, found {self.each()!r:.200}"
        )


def _assigned(assignment: Assignment, owners: _Owners) -> Assignment:
    places = assignment.places
    if assignment.shape == ():
        return assignment
    one_each = isinstance(places, tuple) and assignment.shape == (len(places),)
    rows = owners.rows if one_each and len(places) * assignment.repeat == owners.sequences else None
    if rows:
        assignment = assignment.select(rows, owners.sequences)
    pairs = assignment.pairs()
    if len(set(pairs)) == 1:
        (place, weights), names = pairs[0], assignment.names
        return Assignment(names, (place,), (), weights=None if weights is None else (weights,))
    if rows:
        return _Units(assignment, owners.uniform)
    return _Unknown(assignment.names, tuple(place for place, _ in pairs), (len(pairs),))
