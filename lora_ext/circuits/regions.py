"""The parts of a region graph: inputs, sums and products, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_ext.circuits.leaves import Leaf

Kind = Literal["hadamard", "kronecker"]


@dataclass(frozen=True)
class Partition:
    """A product: child regions by index, and how their units are combined."""

    children: tuple[int, ...]
    kind: Kind = "hadamard"


@dataclass(frozen=True)
class Region:
    """Either ``leaf`` and ``variables`` (a bitset), or ``partitions``.

    Regions of one ``tie`` share their parameters: the weights of sums, the distributions of inputs.
    """

    units: int
    partitions: tuple[Partition, ...] = ()
    leaf: Leaf | None = None
    variables: int = 0
    tie: str | None = None
    name: str = ""


@dataclass(frozen=True)
class Input:
    """An input region of ``RegionGraph.from_edges``."""

    variables: Sequence[int]
    leaf: Leaf
    units: int = 1
    tie: str | None = None
