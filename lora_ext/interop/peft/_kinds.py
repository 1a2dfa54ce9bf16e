"""Fused versions of PEFT's layer classes, and layers of adapters other than LoRA.

A *fused* class has a forward that calls lora_ext. For adapters other than LoRA, every forward
computes the factors from the layer's parameters, so that the parameters get gradients. PEFT's
classes for quantised base layers can be imported only if the quantiser is installed. A fused class
is therefore created when a model first needs it. The quantised base layer computes its output and
the gradient of its input, and lora_ext adds the update in one op.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections import ChainMap
from collections.abc import Container, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_ext.kinds import Factors, Kind, kind_of
from lora_ext.layers import LoraFactors, linear_size, lora_forward

from ._adapters import refuse_exact
from ._layers import Fused as Fused  # found by `__getattr__`

_DROPOUTS = ("rank_dropout", "module_dropout")
# Settings that matter only for files. In a model, each layer has all of its own tensors.
_LIVE = {"save_only_topk_weights": False, "weight_tying": 1.0}

_MODULES = "peft.tuners.lora."
_CLASSES = (
    "bnb.Linear8bitLt", "bnb.Linear4bit", "torchao.TorchaoLoraLinear", "gptq.GPTQLoraLinear",
    "awq.AwqLoraLinear", "hqq.HqqLoraLinear", "eetq.EetqLoraLinear", "aqlm.AqlmLoraLinear",
)  # fmt: skip
COVERED = f"{_MODULES}layer.Linear, layer.ParamWrapper and {', '.join(_CLASSES)}"


class _Plan(NamedTuple):
    """Values for one adapter of a layer that do not change between forwards."""

    config: Any  # configuration that the plan was made for
    kind: Kind
    fields: Mapping[str, Any]
    spec: Any
    stores: dict[str, str]  # by stem of a part's name: the layer's attribute that contains the part
    refused: str | None = None  # why lora_ext cannot compute the adapter


class FusedKind(nn.Module if TYPE_CHECKING else object):
    """Mixin for PEFT's layers of adapters other than LoRA, with a forward that uses lora_ext.

    Place the mixin before PEFT's class, :attr:`of_peft`.
    """

    of_peft: ClassVar[Any]
    #: Configuration of each adapter, the dict of PEFT's model.
    configs: Mapping[str, Any]
    #: Values of each adapter that do not change between forwards, set in its first forward.
    plans: dict[str, _Plan]
    base_layer: nn.Module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output ``(..., O)`` for ``x (..., I)``, as PEFT computes it."""
        layer: Any = self
        active = [name for name in layer.active_adapters if self._plan(name) is not None]
        simple = not (args or kwargs or layer.disable_adapters or layer.merged)
        why = next(filter(None, map(self.uncovered, active)), None)
        refuse_exact(self.base_layer, why)
        if why or not simple:
            return self.of_peft.forward(self, x, *args, **kwargs)
        parts = [self._parts(name) for name in active]
        each = [self._factors(name, own) for name, own in zip(active, parts, strict=True)]
        if any(f.a.dtype != x.dtype for f in each) or torch.is_autocast_enabled(x.device.type):
            return self.of_peft.forward(self, x, *args, **kwargs)
        for factors in each:
            if factors.before is not None:
                x = x * factors.before
        sums, updates = [], []
        trains = torch.is_grad_enabled() and not getattr(self.base_layer, "exact", False)
        for name, own, f in zip(active, parts, each, strict=True):
            plan = self.plans[name]
            if trains and (update := plan.kind.update(x, own, plan.fields)) is not None:
                updates.append(update if f.scaling == 1 else f.scaling * update)
            elif f.a.shape[0]:
                sums.append(LoraFactors(f.a, f.b, f.scaling, 0.0, f.bias))
        y = lora_forward(x, self.base_layer, sums, None) if sums else self.base_layer(x)
        for update in updates:
            y = y + update
        for factors in each:
            if factors.after is not None:
                y = y * factors.after.scale
        return y

    def left(self) -> set[str | None]:
        """Return the reasons why PEFT must run some adapters of the layer.

        The set contains None if lora_ext can run an adapter.
        """
        return {self.uncovered(name) for name in self.configs if self._plan(name) is not None}

    def uncovered(self, adapter: str) -> str | None:
        """Return why PEFT's forward must run now with an adapter; None if lora_ext can run it."""
        plan = self._plan(adapter)
        if plan is None or plan.refused or not self.training:
            return plan and plan.refused
        if plan.kind.name == "PVERA":
            return f"adapter {adapter!r} samples in training"
        layer: Any = self
        drops = [getattr(layer, name, {}).get(adapter, 0.0) for name in _DROPOUTS]
        for name, module in layer.named_children():
            if name.endswith("_dropout") and isinstance(module, nn.ModuleDict):
                drops.append(getattr(module[adapter], "p", 0.0) if adapter in module else 0.0)
        return f"adapter {adapter!r} has dropout" if any(drops) else None

    def _plan(self, adapter: str) -> _Plan | None:
        """Return the plan of an adapter, or None if the layer lacks it or its kind is unknown."""
        config, plan = self.configs.get(adapter), self.plans.get(adapter)
        if plan is not None and plan.config is config:
            return plan
        kind = None if config is None else known_kind(config)
        if kind is None or config is None:
            return None
        layer: Any = self
        own = {
            key: getattr(layer, key)[adapter] for key in ("r", "alpha") if _has(layer, key, adapter)
        }
        fields, size = ChainMap(own, _LIVE, config.to_dict()), linear_size(layer.get_base_layer())
        assert size is not None  # `swap_kinds` has excluded other base layers
        name = f"adapter {adapter!r}"
        spec = SimpleNamespace(name=name, in_features=size[0], out_features=size[1], order=(name,))
        stems = {stem: stem.split(".")[0] for stem in (*kind.parts(fields, spec), *kind.shared)}
        stores = {stem: store for stem, store in stems.items() if _has(layer, store, adapter)}
        if stores.keys() <= {*kind.shared}:
            return None
        why = f"{name} of {kind.title} needs the base weight" if kind.needs_weight else None
        why = f"{name} has a full lokr_w2" if "lokr_w2" in stores else why
        for field, reason in kind.refused(fields).items():
            why = f"{name} has {field}: {reason}"
        self.plans[adapter] = plan = _Plan(config, kind, fields, spec, stores, why)
        return plan

    def _parts(self, adapter: str) -> dict[str, Tensor]:
        layer: Any = self
        parts: dict[str, Tensor] = {}
        for stem, store in self.plans[adapter].stores.items():
            value: Any = getattr(layer, store)[adapter]
            if stem == "tinylora_v":  # a dict, of which the layer has one key
                stem, value = f"{stem}.0", value[layer._tinylora_v_key[adapter]]
            parts[stem] = getattr(value, "weight", value)
        return parts

    def _factors(self, adapter: str, parts: dict[str, Tensor]) -> Factors:
        layer: Any = self
        plan = self.plans[adapter]
        factors = plan.kind.read(parts, plan.fields, plan.spec)
        if _has(layer, "scaling", adapter):
            ranks = plan.fields["init_r"] + 1e-5 if plan.kind.name == "ADALORA" else 1
            factors = factors._replace(scaling=layer.scaling[adapter] / ranks)
        return factors


def _has(layer: Any, field: str, adapter: str) -> bool:
    return adapter in getattr(layer, field, ())


def known_kind(config: Any) -> Kind | None:
    """Return the kind of a configuration of PEFT other than LoRA's, or None if it is unknown."""
    name = getattr(config.peft_type, "value", config.peft_type)
    try:
        return None if name == "LORA" else kind_of(name)
    except NotImplementedError:
        return None


@functools.cache
def fused_class(mixin: type, kind: type) -> type:
    """Return the subclass of ``mixin`` and of ``kind``, a layer class of PEFT. The subclass keeps
    the name of ``kind``, which ``repr`` and model cards print."""
    names = "kwargs" in inspect.signature(kind.forward).parameters  # pyright: ignore
    body = {"of_peft": kind, "peft_takes_names": names}
    fused = type(kind.__name__, (mixin, kind), body)
    # Pickle finds the class with `__getattr__`. A dot in the name would mean a nested class.
    found = f"{mixin.__name__}:{kind.__module__}:{kind.__qualname__}"
    fused.__module__, fused.__qualname__ = __name__, found.replace(".", "/")
    return fused


def full_name(kind: type) -> str:
    """Return the name of a class with its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def fused_version(kind: type) -> type:
    """Return the fused version of a class of PEFT, or ``kind`` if it has no fused version."""
    covered = full_name(kind).removeprefix(_MODULES) in _CLASSES
    return fused_class(Fused, kind) if covered else kind


def __getattr__(name: str) -> Any:
    """Return a fused class by its qualified name."""
    mixin, *found = name.replace("/", ".").split(":")
    if len(found) != 2 or not found[0].startswith("peft.tuners."):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return fused_class(globals()[mixin], getattr(importlib.import_module(found[0]), found[1]))


def swap_kinds(model: nn.Module, never_called: Container[Any]) -> None:
    """Set a fused class on linear layers with adapters of known kinds, except ``never_called``."""
    for tuner in model.modules():
        configs: Any = getattr(tuner, "peft_config", None)
        if not isinstance(configs, dict) or not any(map(known_kind, configs.values())):
            continue
        layer: Any
        for layer in tuner.modules():
            tuned = isinstance(layer, BaseTunerLayer) and layer not in never_called
            if not tuned or isinstance(layer, FusedKind):
                continue
            # In a mixed model of PEFT, each layer has adapters of one kind, for example of LoRA.
            own = configs.keys() & layer._all_available_adapter_names()
            known = own and all(known_kind(configs[name]) for name in own)
            if known and linear_size(layer.get_base_layer()) is not None:
                vars(layer).update(configs=configs, plans={})
                layer.__class__ = fused_class(FusedKind, type(layer))
