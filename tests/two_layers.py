"""A model of two linear layers, three adapters for its pool, and its reference, row by row."""

from typing import Any

import torch
from torch import Tensor, nn

import lora_ext

Adapter = tuple[dict[str, Any], dict[str, Tensor]]
IN, MID, OUT = 24, 40, 9
RANKS = {"red": 3, "green": 8, "blue": 12}  # 6 / rank is exact, because scales are float32.


class Mlp(nn.Module):
    """Two linear layers; the second has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(IN, MID)
        self.down = nn.Linear(MID, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def random_adapter(sizes: Any, rank: int, seed: int, **fields: Any) -> Adapter:
    """Return PEFT's config and weights for modules of the given sizes ``(I, O)``. Alpha is 6.

    ``fields`` are added to the config; ``lora_bias`` and ``use_dora`` also add their tensors.
    """
    g = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for module, (i, o) in sizes.items():
        stem = f"base_model.model.{module}.lora_"
        state[stem + "A.weight"] = torch.randn(rank, i, generator=g) / 5
        state[stem + "B.weight"] = torch.randn(o, rank, generator=g)
        if fields.get("lora_bias"):
            state[stem + "B.bias"] = torch.randn(o, generator=g)
        if fields.get("use_dora"):
            state[stem + "magnitude_vector"] = torch.rand(o, generator=g) + 0.5
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": list(sizes)}
    return {**config, **fields}, state


def adapter(name: str, lora_bias: bool = False) -> Adapter:
    """Return an adapter of the model; its scale depends on its rank."""
    sizes = {"up": (IN, MID), "down": (MID, OUT)}
    return random_adapter(sizes, RANKS[name], RANKS[name], lora_bias=lora_bias)


def make(dtype: torch.dtype = torch.float32, biased: str = "") -> Mlp:
    torch.manual_seed(0)
    model = Mlp().to(dtype).eval()
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=16)
    for name in RANKS:
        pool.load(name, adapter(name, lora_bias=name == biased))
    return lora_ext.attach(model, pool)


def formula(model: Mlp, x: Tensor, rows: list[str | None], biased: str = "") -> Tensor:
    """Return the reference output in the dtype of x: ``base(x) + scale * (B A x + bias)`` for each
    row with its adapter. ``biased`` names the adapter that has biases."""
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
