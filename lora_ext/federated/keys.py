"""What the names of LoRA tensors say: which factor, of which module, in which layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from lora_ext._checks import require
from lora_ext.adapter import factor_keys, natural_order
from lora_ext.layers import block_index

#: Where the index of a layer stands in a name, as most models of transformers have it.
PATTERN = r"layers\.(\d+)\."


class LayerNotFound(ValueError):
    """A pattern that finds no layer, or layers whose indices have gaps."""


class Pair(NamedTuple):
    """The two factors of one module, by their names."""

    module: str  # in the base model
    layer: int
    a: str  # (r, I)
    b: str  # (O, r)


def layer_pairs(where: str, state: Mapping[str, Tensor], pattern: str) -> list[Pair]:
    """The factors of a state dict that lie in a layer, in the order of layers and modules.

    Args:
        where: opens the message of an error.
        state: tensors under PEFT's names, with ``base_model.model.`` in front or without.
        pattern: a regular expression whose first group is the index of the layer.

    Raises:
        KeyError: a factor without the other. LayerNotFound: no name has an index.
        ValueError: factors that do not share a rank, or are no floating matrices.
    """
    found: list[Pair] = []
    for module, (a, b) in factor_keys(where, state).items():
        layer = block_index(a, pattern)
        if layer is not None:
            _check_pair(where, module, state[a], state[b])
            found.append(Pair(module, layer, a, b))
    if not found:
        names = [*map(str, state)][:4]
        raise LayerNotFound(
            f"{where}: pattern: expected a name of LoRA factors that matches {pattern!r}, found "
            f"none among {len(state)} tensors, which begin with {names}"
        )
    return sorted(found, key=lambda pair: (pair.layer, natural_order(pair.module)))


def check_layers(where: str, layers: set[int]) -> int:
    """The number of layers, whose indices are to be 0, 1, ... without a gap.

    Raises:
        LayerNotFound: they are not, with the indices that were found.
    """
    if layers != set(range(len(layers))):
        raise LayerNotFound(
            f"{where}: pattern: expected the indices 0 to {max(layers)} without a gap, found "
            f"{sorted(layers)}"
        )
    return len(layers)


def _check_pair(where: str, module: str, a: Tensor, b: Tensor) -> None:
    for name, factor in (("lora_A", a), ("lora_B", b)):
        holds = isinstance(factor, Tensor) and factor.is_floating_point() and factor.dim() > 1
        found = (factor.dtype, list(factor.shape)) if isinstance(factor, Tensor) else type(factor)
        require(holds, where, f"{module}.{name}", "a floating matrix", found)
    require(a.shape[0] == b.shape[1], where, module, f"lora_B of rank {a.shape[0]}", list(b.shape))
