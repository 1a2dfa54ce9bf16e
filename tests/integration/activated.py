"""A tiny Llama with activated and ordinary adapters, attached and in PEFT's layers."""

from pathlib import Path
from typing import Any

import peft
import torch
from tiny import adapted, attach_saved, make_model
from torch import Tensor

from lora_ext.rows._pool_layer import pool_of

INVOCATIONS: dict[str, list[int] | None] = {"act": [7, 8], "other": [5], "plain": None}
NAMES = ["act", "other", "plain", "__base__"]
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]


def activated_configs(**more: Any) -> dict[str, peft.LoraConfig]:
    how: Any = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS,
        "task_type": "CAUSAL_LM",
        **more,
    }
    return {
        name: peft.LoraConfig(alora_invocation_tokens=tokens, **how)
        for name, tokens in INVOCATIONS.items()
    }


def activated_pair(folder: Path, family: str = "llama", **more: Any) -> tuple[Any, Any, Any]:
    """Return the attached model, PEFT's, and the pool loaded from PEFT's files."""
    model = make_model(family)
    reference = adapted(model, activated_configs(**more), 0.3)
    reference.save_pretrained(folder)
    model = attach_saved(model, folder, INVOCATIONS, rank=8)
    return model, reference, pool_of(model)


def words(count: int, seed: int) -> list[int]:
    """Return random tokens that invoke no adapter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(9, 97, (count,), generator=generator).tolist()


def prompts(rows: int = 4, length: int = 20, seed: int = 0) -> Tensor:
    """Return random prompts; row 0 invokes ``act`` at positions 4 and 12, row 1 ``other`` at 15."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(9, 97, (rows, length), generator=generator)
    ids[0, 4:6] = ids[0, 12:14] = torch.tensor([7, 8])
    ids[1, 15] = 5
    return ids
