"""States and replies of small federated rounds."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext.federated import LayerPlan, Update

INPUTS, OUTPUTS, RANK = 5, 4, 3
MODULES = ("q", "v")


def key(layer: int, factor: str, module: str = "q") -> str:
    return f"base_model.model.layers.{layer}.{module}.lora_{factor}.weight"


def make_state(
    layers: int = 3, rank: int = RANK, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for layer in range(layers):
        for module in MODULES:
            for factor, shape in (("A", (rank, INPUTS)), ("B", (OUTPUTS, rank))):
                values = torch.randn(shape, generator=generator, dtype=torch.float64)
                found[key(layer, factor, module)] = values.to(dtype)
    return found


def make_update(
    client: int | str,
    layers: Sequence[int] = (0, 1, 2),
    ranks: Sequence[int] | None = None,
    examples: int = 10,
    dtype: torch.dtype = torch.float64,
    seed: int | None = None,
) -> Update:
    generator = torch.Generator().manual_seed(
        zlib.crc32(str(client).encode()) if seed is None else seed
    )
    plan = LayerPlan(tuple(layers), None if ranks is None else tuple(ranks))
    tensors: dict[str, Tensor] = {}
    for layer in plan.layers:
        rank = plan.rank_of(layer, RANK)
        for module in MODULES:
            for factor, shape in (("A", (rank, INPUTS)), ("B", (OUTPUTS, rank))):
                values = torch.randn(shape, generator=generator, dtype=torch.float64)
                tensors[key(layer, factor, module)] = values.to(dtype)
    return Update(client, examples, tensors, plan)


def bits(value: Tensor) -> Tensor:
    return value.clone().reshape(-1).view(torch.uint8) if value.numel() else torch.empty(0)


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        (first[k].dtype, first[k].shape) == (second[k].dtype, second[k].shape)
        and torch.equal(bits(first[k]), bits(second[k]))
        for k in first
    )
