"""Adapters and pairs of models for SPLoRA, with random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ext.adapter import LoraAdapter

Weights = dict[str, Tensor]


def name_of(layer: int, module: str = "q_proj") -> str:
    return f"model.layers.{layer}.self_attn.{module}"


def made(
    shapes: dict[str, tuple[int, int]], r: int = 3, dtype: torch.dtype = torch.float64, **fields
) -> tuple[LoraAdapter, Weights, Weights]:
    """Return a random adapter, base and aligned weights; ``shapes`` are (m, n) by module."""
    g = torch.Generator().manual_seed(1)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    state, base, aligned = {}, {}, {}
    for name, (m, n) in shapes.items():
        state[f"base_model.model.{name}.lora_A.weight"] = draw(r, n)
        state[f"base_model.model.{name}.lora_B.weight"] = draw(m, r)
        if fields.get("lora_bias"):
            state[f"base_model.model.{name}.lora_B.bias"] = draw(m)
        stored = (n, m) if fields.get("fan_in_fan_out") else (m, n)
        base[f"{name}.weight"] = draw(*stored)
        aligned[f"{name}.weight"] = base[f"{name}.weight"] + 0.1 * draw(*stored)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": [*shapes]}
    return LoraAdapter.load(({**config, **fields}, state)), base, aligned


def blocks(count: int = 4, size: tuple[int, int] = (12, 10)) -> dict[str, tuple[int, int]]:
    """Return the shapes of two modules in each of ``count`` blocks."""
    return {name_of(i, m): size for i in range(count) for m in ("q_proj", "v_proj")}


def scaled(adapter: LoraAdapter, by: dict[str, float]) -> LoraAdapter:
    """Return a copy in which B of each module is multiplied by its factor in ``by``, if any."""
    modules = {n: f._replace(b=f.b * by.get(n, 1.0)) for n, f in adapter.modules.items()}
    return LoraAdapter(adapter.config, modules)


def dense_map(base: Tensor, aligned: Tensor, projection: str, q: int | None = None) -> Tensor:
    """Return P of the paper as an m x m matrix in float64."""
    v = aligned.double() - base.double()
    if projection == "frobenius":
        return v @ v.T / v.norm()
    u, s, _ = torch.linalg.svd(v)
    kept = int((s > max(v.shape) * torch.finfo(torch.float32).eps * s[0]).sum())
    u = u[:, : kept if q is None else q]
    return u @ u.T
