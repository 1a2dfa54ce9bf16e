"""A model of two linear layers on a pool of three adapters, and its formula row by row."""

from typing import Any

import torch
from torch import Tensor, nn

import lora_ext

IN, MID, OUT = 24, 40, 9
RANKS = {"red": 3, "green": 8, "blue": 12}  # 6 / rank is exact: scales are float32


class Mlp(nn.Module):
    """Two linears, one without a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(IN, MID)
        self.down = nn.Linear(MID, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def adapter(name: str, lora_bias: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config and weights. Alpha is 6, so the scale differs with the rank."""
    rank = RANKS[name]
    generator = torch.Generator().manual_seed(rank)
    state = {}
    for module, (i, o) in {"up": (IN, MID), "down": (MID, OUT)}.items():
        stem = f"base_model.model.{module}"
        state[f"{stem}.lora_A.weight"] = torch.randn(rank, i, generator=generator) / 5
        state[f"{stem}.lora_B.weight"] = torch.randn(o, rank, generator=generator)
        if lora_bias:
            state[f"{stem}.lora_B.bias"] = torch.randn(o, generator=generator)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": ["up", "down"]}
    return config | {"lora_bias": lora_bias}, state


def make(dtype: torch.dtype = torch.float32, biased: str = "") -> Mlp:
    torch.manual_seed(0)
    model = Mlp().to(dtype).eval()
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=16)
    for name in RANKS:
        pool.load(name, adapter(name, lora_bias=name == biased))
    return lora_ext.attach(model, pool)


def formula(model: Mlp, x: Tensor, rows: list[str | None], biased: str = "") -> Tensor:
    """Row by row, in the dtype of x: ``base(x) + scale * (B A x + bias)``."""
    out = []
    for t, name in enumerate(rows):
        h = x.reshape(-1, IN)[t]
        for module in ("up", "down"):
            layer: Any = getattr(model, module)
            y = nn.functional.linear(
                h, layer.weight.to(x), None if layer.bias is None else layer.bias.to(x)
            )
            if name is not None:
                config, state = adapter(name, lora_bias=name == biased)
                a, b, bias = (
                    state.get(f"base_model.model.{module}.lora_{k}", torch.zeros(())).to(x)
                    for k in ("A.weight", "B.weight", "B.bias")
                )
                y = y + config["lora_alpha"] / config["r"] * (b @ (a @ h) + bias)
            h = torch.tanh(y) if module == "up" else y
        out.append(h)
    return torch.stack(out).view(*x.shape[:-1], OUT)


def inputs(*leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*leading, IN, generator=torch.Generator().manual_seed(7)).to(dtype)


def pins(model: Mlp) -> int:
    return model.up.pool.stats()["pins"]
