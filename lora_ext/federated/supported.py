"""What a model must not have, for the rows of one client to be what they are alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_ext._checks import require
from lora_ext.layers import adapted_layers, block_index

WHERE = "BatchedClients"


class UnsupportedModule(ValueError):
    """A module under which a client's rows would not be what they are alone."""


def check_model(model: nn.Module, adapter: str, pattern: str) -> None:
    """Refuse modules in which rows meet or draw, and adapters that no payload carries.

    Raises:
        UnsupportedModule: naming the module, what was expected and what was found.
    """
    own = {
        id(layer.lora_dropout[adapter])
        for name, layer in _layers(model, adapter, pattern)
        if isinstance(layer.lora_dropout[adapter], nn.Dropout)
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            alone = not module.training and module.running_mean is not None
            supported(alone, name, "rows that do not see each other", "batch normalisation")
        for setting, p in _dropouts(module) if id(module) not in own else []:
            off = not module.training or p == 0
            supported(off, name, "no dropout of the base in training", f"{setting} = {p}")
    for name, layer in _layers(model, adapter, pattern):
        linear = adapter in layer.lora_A and layer.lora_A[adapter].weight.dim() == 2
        linear &= not hasattr(layer, "parameter_name")  # PEFT's target_parameters: of experts, say
        supported(linear, name, "a linear layer", type(layer).__name__)
        supported(not layer.use_dora[adapter], name, "LoRA", "DoRA")
        supported(not layer.lora_bias[adapter], name, "lora_A and lora_B", "a bias")
        active = [other for other in layer.active_adapters if other in layer.lora_A]
        supported({*active} <= {adapter}, name, f"no adapter active but {adapter!r}", active)
        merged_in = list(layer.merged_adapters)
        supported(not merged_in, name, "adapters apart from the weight", merged_in)


def dropout_of(layer: Any, adapter: str) -> float:
    """The probability with which a layer drops the input of an adapter, 0 outside training."""
    dropout = layer.lora_dropout[adapter]
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _layers(model: nn.Module, adapter: str, pattern: str) -> list[tuple[str, Any]]:
    """The adapted layers in a block, which a round replaces."""
    found = adapted_layers(model, adapter).items()
    return [(n, m) for n, m in found if block_index(f"{n}.lora_A.weight", pattern) is not None]


def _dropouts(module: nn.Module) -> list[tuple[str, float]]:
    """What a module may drop with, as a module of its own or in a function of its forward."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return [("p", module.p)]
    own = module.__dict__.items()  # attention_dropout, layerdrop, drop_prob of whole branches
    return [(name, p) for name, p in own if "drop" in name and isinstance(p, float)]


def supported(holds: bool, name: str, expected: object, found: object) -> None:
    """Raise :class:`UnsupportedModule` where that does not hold of a module or parameter."""
    require(holds, WHERE, name, expected, found, UnsupportedModule)
