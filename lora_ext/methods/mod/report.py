"""How many parameters are trained, and whose they are."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_ext.layers import adapted_layers, adapter_parameters, adapters_of

from .files import mod_parameters
from .model import applied


def trainable_report(model: nn.Module) -> dict[str, Any]:
    """Count the parameters of a model with MoD that are trained.

    Returns:
        By name: ``lora``, of adapters; ``mod``, of the mixture, the final norm with it where it is
        trained; ``head``, of the output layer, tied embeddings with it; ``other``; ``total``, their
        sum; ``all``, the model's parameters, trained or not; ``ratio``, total / all.

    Raises:
        RuntimeError: a model without MoD.
    """
    lm, _ = applied(model, "trainable_report")
    trained = {p: p.numel() for p in model.parameters() if p.requires_grad}
    groups = {
        "lora": [
            p
            for layer in adapted_layers(model).values()
            for name in adapters_of(layer)
            for p in adapter_parameters(layer, name)
        ],
        "mod": mod_parameters(model, "trainable_report").values(),
        "head": lm.get_output_embeddings().parameters(),
    }
    counts = {name: sum(trained.pop(p, 0) for p in found) for name, found in groups.items()}
    counts["other"] = sum(trained.values())
    total, everything = sum(counts.values()), sum(p.numel() for p in model.parameters())
    return {**counts, "total": total, "all": everything, "ratio": total / everything}
