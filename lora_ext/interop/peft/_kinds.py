"""PEFT's layers of other kinds than LoRA, with a ``forward`` that uses lora_ext's kernels.

The factors are computed from the layer's parameters in every forward, so gradients reach them.
"""

from __future__ import annotations

import functools
import importlib
from collections import ChainMap
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext.kinds import Factors, Kind, kind_of
from lora_ext.layers import LoraFactors, linear_size, lora_forward

# Settings of a file that a model does not need: the model has all tensors, and each layer its own.
_LIVE = {
    "save_projection": True,
    "save_indices": True,
    "save_only_topk_weights": False,
    "weight_tying": 1.0,
}
_DROPOUTS = ("rank_dropout", "module_dropout")


class FusedKind(nn.Module if TYPE_CHECKING else object):
    """Mixin for a layer class of PEFT. It must be placed before the class, :attr:`of_peft`."""

    of_peft: ClassVar[Any]
    #: Configuration of each adapter, the dict of PEFT's model.
    configs: Mapping[str, Any]
    base_layer: nn.Module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer as PEFT does."""
        layer: Any = self
        active = [name for name in layer.active_adapters if name in self.kinds]
        simple = not (args or kwargs or layer.disable_adapters or layer.merged)
        why = next(filter(None, map(self.uncovered, active)), None)
        exact = getattr(self.base_layer, "exact", False)
        require(not (why and exact), "exact", "model", "adapters that lora_ext computes", why)
        if why or not simple:
            return self.of_peft.forward(self, x, *args, **kwargs)
        each = [found for name in active if (found := self._factors(name)) is not None]
        if any(f.a.dtype != x.dtype for f in each) or torch.is_autocast_enabled(x.device.type):
            return self.of_peft.forward(self, x, *args, **kwargs)
        for factors in each:
            if factors.before is not None:
                x = x * factors.before
        sums = [LoraFactors(f.a, f.b, f.scaling, 0.0, f.bias) for f in each if f.a.shape[0]]
        y = lora_forward(x, self.base_layer, sums, None) if sums else self.base_layer(x)
        for factors in each:
            if factors.after is not None:
                y = y * factors.after.scale
        return y

    @property
    def kinds(self) -> list[str]:
        """Names of the model's adapters of a known kind, also of those that were added later."""
        return [name for name, config in self.configs.items() if known_kind(config)]

    def uncovered(self, adapter: str) -> str | None:
        """Return why an adapter of this layer needs PEFT's forward now; None if it does not."""
        layer: Any = self
        kind = kind_of(_name(self.configs[adapter]))
        if kind.needs_weight:
            return f"adapter {adapter!r} of {kind.title} needs the base weight"
        if self.training and kind.name == "PVERA":
            return f"adapter {adapter!r} samples in training"
        drops = [getattr(layer, name, {}).get(adapter, 0.0) for name in _DROPOUTS]
        for name, module in layer.named_children():
            if name.endswith("_dropout") and isinstance(module, nn.ModuleDict):
                drops.append(getattr(module[adapter], "p", 0.0) if adapter in module else 0.0)
        if self.training and any(drops):
            return f"adapter {adapter!r} has dropout"
        if self.configs[adapter].to_dict().get("init_weights") == "bat":
            return f"adapter {adapter!r} changes with the base weight ('bat')"
        return "adapter has a full lokr_w2" if adapter in getattr(layer, "lokr_w2", ()) else None

    def _factors(self, adapter: str) -> Factors | None:
        """Return the factors of an adapter, or None if this layer does not have it."""
        layer: Any = self
        kind = kind_of(_name(self.configs[adapter]))
        size = linear_size(layer.get_base_layer())
        assert size is not None  # `swap_kinds` has excluded other base layers
        settings = [key for key in ("r", "alpha") if _has(layer, key, adapter)]
        own = {key: getattr(layer, key)[adapter] for key in settings}
        fields = ChainMap(own, _LIVE, self.configs[adapter].to_dict())
        spec = SimpleNamespace(name="", in_features=size[0], out_features=size[1], order=("",))
        parts: dict[str, Tensor] = {}
        for stem in (*kind.parts(fields, spec), *kind.shared):
            store = getattr(layer, stem.split(".")[0], None)
            if store is None or adapter not in store:
                continue
            value: Any = store[adapter]
            if stem == "tinylora_v":  # a dict, of which the layer has one key
                stem, value = f"{stem}.0", value[layer._tinylora_v_key[adapter]]
            parts[stem] = getattr(value, "weight", value)
        if not parts.keys() - {*kind.shared}:
            return None
        factors = kind.read(parts, fields, spec)
        if kind.name != "ADALORA" and _has(layer, "scaling", adapter):
            factors = factors._replace(scaling=layer.scaling[adapter])
        return factors


def _has(layer: Any, field: str, adapter: str) -> bool:
    return adapter in getattr(layer, field, {})


def _name(config: Any) -> str:
    return getattr(config.peft_type, "value", config.peft_type)


def known_kind(config: Any) -> Kind | None:
    """Return the kind of a configuration of PEFT other than LoRA's, or None if it is unknown."""
    name = _name(config)
    try:
        return None if name == "LORA" else kind_of(name)
    except NotImplementedError:
        return None


@functools.cache
def fused_kind(kind: type) -> type:
    """Return the fused subclass of a layer class of PEFT."""
    fused = type(kind.__name__, (FusedKind, kind), {"of_peft": kind})
    # Pickle finds the class with `__getattr__`; a dot would name an attribute of a class.
    found = f"{kind.__module__}:{kind.__qualname__}"
    fused.__module__, fused.__qualname__ = __name__, found.replace(".", "/")
    return fused


def __getattr__(name: str) -> Any:
    """Return a fused class by its qualified name."""
    module, _, kind = name.replace("/", ".").partition(":")
    if not (kind and module.startswith("peft.tuners.")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return fused_kind(getattr(importlib.import_module(module), kind))


def swap_kinds(model: nn.Module) -> None:
    """Change the class of each layer of a known kind with a linear base layer."""
    for tuner in model.modules():
        configs: Any = getattr(tuner, "peft_config", None)
        if not isinstance(configs, dict) or not any(map(known_kind, configs.values())):
            continue
        layer: Any
        for layer in tuner.modules():
            if not isinstance(layer, BaseTunerLayer) or isinstance(layer, FusedKind):
                continue
            # In a mixed model of PEFT, each layer has adapters of one kind, for example of LoRA.
            own = configs.keys() & layer._all_available_adapter_names()
            known = own and all(known_kind(configs[name]) for name in own)
            if known and linear_size(layer.get_base_layer()) is not None:
                vars(layer)["configs"] = configs
                layer.__class__ = fused_kind(type(layer))
