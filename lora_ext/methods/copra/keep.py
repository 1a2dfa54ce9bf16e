"""Selection of the modules of an adapter to keep with :func:`lora_ext.adapter.prune_adapter`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from lora_ext._checks import integer, require
from lora_ext.adapter import PREFIX, LoraAdapter
from lora_ext.layers import block_name, matches_suffix

from .controller import CopraController
from .shapley import Shapley

#: Source of groups of module names. A controller's groups or a list of groups are used unchanged.
#: The modules of an adapter or its folder, or a list of names, are grouped by block.
Source = (
    CopraController | LoraAdapter | str | os.PathLike[str] | Sequence[str] | Sequence[Sequence[str]]
)


def every_other(source: Source, first: int = 0) -> list[str]:
    """Return the modules of every second group.

    Args:
        source: Groups of modules, see :data:`Source`.
        first: Index of the first group to return, 0 or 1.

    Returns:
        Module names as in the base model.

    Raises:
        ValueError: If ``first`` is not 0 or 1, or the source has no modules.
    """
    require(first in (0, 1), "every_other", "first", "0 or 1", repr(first))
    return [*chain(*_groups(source, "every_other")[first::2])]


def thirds(source: Source, part: Literal["low", "middle", "high"]) -> list[str]:
    """Return the modules of the first ("low"), middle or last ("high") third of the groups.

    Args:
        source: Groups of modules, see :data:`Source`.
        part: "low", "middle" or "high".

    Raises:
        ValueError: If the part is unknown, or the source has no modules.
    """
    parts = ("low", "middle", "high")
    require(part in parts, "thirds", "part", f"one of {parts}", repr(part))
    groups = _groups(source, "thirds")
    start, end = (len(groups) * (parts.index(part) + i) // 3 for i in (0, 1))
    return [*chain(*groups[start:end])]


def by_suffix(source: Source, *suffixes: str) -> list[str]:
    """Return the modules whose names end with one of the suffixes.

    For example ``by_suffix(adapter, "q_proj", "mlp.up_proj")``.

    Args:
        source: Groups of modules, see :data:`Source`.
        suffixes: Full names of modules, or endings of names that begin after a dot.

    Raises:
        ValueError: If one of the suffixes matches no module, or the source has no modules.
    """
    names = [*chain(*_groups(source, "by_suffix"))]
    kept: list[str] = []
    for suffix in suffixes:
        found = [name for name in names if matches_suffix(name, (suffix,))]
        require(found, "by_suffix", "suffixes", "the end of a module's name", repr(suffix))
        kept += found
    return [name for name in names if name in kept]


def top_by_shapley(source: Source, values: Shapley | Tensor | Sequence[float], k: int) -> list[str]:
    """Return the modules of the k groups with the largest values.

    Args:
        source: Groups of modules, see :data:`Source`.
        values: One number per group, for example from :func:`layer_shapley`.
        k: Number of groups to keep.

    Raises:
        ValueError: If the number of values is wrong, k is out of range, or the source has no
            modules.
    """
    groups = _groups(source, "top_by_shapley")
    worth = torch.as_tensor(values.values if isinstance(values, Shapley) else values).tolist()
    expected = f"one value for each of {len(groups)} groups"
    require(len(worth) == len(groups), "top_by_shapley", "values", expected, len(worth))
    integer("top_by_shapley", "k", k, 0, len(groups))
    best = sorted(range(len(groups)), key=worth.__getitem__, reverse=True)[:k]
    return [name for i in sorted(best) for name in groups[i]]


def at_random(source: Source, k: int, seed: int = 0) -> list[str]:
    """Return the modules of k groups, drawn uniformly.

    Args:
        source: Groups of modules, see :data:`Source`.
        k: Number of groups to keep.
        seed: Seed of the draw.

    Raises:
        ValueError: If k is out of range, or the source has no modules.
    """
    groups = _groups(source, "at_random")
    integer("at_random", "k", k, 0, len(groups))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(groups), generator=generator)[:k].tolist()
    return [name for i in sorted(chosen) for name in groups[i]]


def _groups(source: Source, where: str) -> list[list[str]]:
    if isinstance(source, CopraController):
        source = source.groups
    elif isinstance(source, (str, os.PathLike)):
        source = LoraAdapter.load(source)
    expected = "a CopraController, an adapter, its folder, or module names"
    known = isinstance(source, (LoraAdapter, Iterable))
    require(known, where, "source", expected, type(source).__name__)
    names: list[str] = []
    groups: list[list[str]] = []
    for entry in source.modules if isinstance(source, LoraAdapter) else source:
        if isinstance(entry, str):
            names.append(entry.removeprefix(PREFIX))
        else:
            groups.append([name.removeprefix(PREFIX) for name in entry])
    by_block: dict[str, list[str]] = {}
    for name in names:
        by_block.setdefault(block_name(name) or name, []).append(name)
    groups += (by_block[block] for block in _in_order(list(by_block)))
    require(groups, where, "source", "at least one module", "none")
    return groups


def _in_order(blocks: list[str]) -> list[str]:
    """Sort the blocks of each stack by number, since block 10 is before block 2 in files. The order
    of the stacks, and of names outside all blocks, does not change."""
    first: dict[str, int] = {}

    def place(block: str) -> tuple[int, int]:
        stack, _, number = block.rpartition(".")
        if not number.isdecimal():
            stack, number = block, "0"
        return first.setdefault(stack, len(first)), int(number)

    return sorted(blocks, key=place)
