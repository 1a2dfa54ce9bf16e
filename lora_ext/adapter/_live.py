"""Extraction of an adapter from a PEFT model, or from a model with layers of ``lora_ext.nn``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext.kinds import variants
from lora_ext.layers import LoraLayer

from ._config import OWN_INITS, AdapterConfig
from ._peft_tensors import parse_key

# If target_modules contain one of these names, PEFT saves the base weight with the factors.
_SAVED_WHOLE = ("embed_tokens", "lm_head")


def live_adapter(
    model: nn.Module, adapter: str | None, where: str
) -> tuple[Any, dict[str, Tensor]]:
    """Return the configuration and the tensors of an adapter, as they would be saved.

    The configuration is a ``peft.LoraConfig`` or a dict of its fields. The tensors share the
    model's memory.

    Args:
        model: model with the adapter.
        adapter: name of the adapter; None for the active one.
        where: prefix of error messages.

    Raises:
        ValueError: If the model has no such adapter; if ``adapter`` is None and the number of
            active adapters is not 1; or if the layers have settings that PEFT's configuration
            cannot express.
    """
    configs = getattr(model, "peft_config", None)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    if isinstance(configs, Mapping):
        active: Any = []
        if adapter is None:  # transformers' method raises for adapters that PEFT itself added
            active = getattr(model, "active_adapters", [])
            if callable(active):  # a method in transformers, a property in PEFT
                active = active()
        adapter = _chosen(adapter, configs, active, where)
        from peft import get_peft_model_state_dict

        tensors = model.state_dict()
        keys = (key for name in tensors if (key := parse_key(name)))
        names = (key.module.rpartition(".")[2] for key in keys if key.adapter == adapter)
        whole = not {*_SAVED_WHOLE}.isdisjoint(names)
        # PEFT's default for the last argument would look the base model up on the Hub.
        return configs[adapter], get_peft_model_state_dict(model, tensors, adapter, False, whole)
    if not layers:
        expected = "a PEFT model, or one with layers of lora_ext.nn"
        raise ValueError(f"{where}: expected {expected}, found none in a {type(model).__name__}")
    known = dict.fromkeys(name for layer in layers.values() for name in layer.adapter_names)
    active = dict.fromkeys(name for layer in layers.values() for name in layer.active_adapters)
    adapter = _chosen(adapter, known, active, where)
    layers = {name: layer for name, layer in layers.items() if adapter in layer.adapter_names}
    names = [name for name, _ in model.named_modules()]
    tensors = model.state_dict()
    keys = ((name, parse_key(name)) for name in tensors)
    state = {name: tensors[name] for name, key in keys if key and key.adapter == adapter}
    return _describe(layers, adapter, names, where), state


def _chosen(adapter: str | None, known: Iterable[str], active: Iterable[str], where: str) -> str:
    if adapter is None:
        active = list(active)
        expected = f"a name, since the active adapters are {active}"
        require(len(active) == 1, where, "adapter_name", expected, "None")
        return active[0]
    require(adapter in known, where, "adapter", f"one of {list(known)}", repr(adapter))
    return adapter


def _describe(
    layers: dict[str, LoraLayer], adapter: str, names: Iterable[str], where: str
) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter in these layers, with full module names."""

    def everywhere(field: str) -> bool:
        values = {name: getattr(layer, field)[adapter] for name, layer in layers.items()}
        others = [name for name, value in values.items() if not value]
        expected = "one value for all layers, as PEFT's configuration requires"
        found = f"False in {', '.join(others[:4])} only"
        require(len(others) in (0, len(values)), where, field, expected, found)
        return not others

    for name, layer in layers.items():
        expected = "an unchanged base weight"
        found = f"one that the initialisation {layer.init_lora_weights[adapter]!r} changed"
        require(layer.base_changed_by != adapter, where, name, expected, found, NotImplementedError)
    inits = {layer.init_lora_weights[adapter] for layer in layers.values()}
    inits = {init.lower() if isinstance(init, str) else init for init in inits}
    init = inits.pop() if len(inits) == 1 and inits <= {False, *OWN_INITS} else True
    rslora = all(layer.use_rslora[adapter] for layer in layers.values())
    ranks = {name: layer.r[adapter] for name, layer in layers.items()}
    # Alphas are computed from the scales, since users may change a scale but not lora_alpha.
    scalings = {name: layer.scaling[adapter] for name, layer in layers.items()}
    rates = {float(getattr(layer.lora_dropout[adapter], "p", 0.0)) for layer in layers.values()}
    invocations = {layer.alora_invocation_tokens.get(adapter, ()) for layer in layers.values()}
    alike, expected = len(invocations) == 1, "the same tokens in every layer"
    require(alike, where, "alora_invocation_tokens", expected, f"{invocations!r:.200}")
    raw = {
        "peft_type": "LORA",
        **{kind.when: everywhere(kind.when) for kind in variants("LORA")},
        "lora_bias": everywhere("lora_bias"),
        "lora_dropout": max(rates),  # PEFT's configuration has one dropout rate for all layers
        "fan_in_fan_out": all(layer.fan_in_fan_out for layer in layers.values()),
        "init_lora_weights": init,
        **({"alora_invocation_tokens": list(i)} if (i := invocations.pop()) else {}),
    }
    config = AdapterConfig.parse(raw, where).fitted(ranks, scalings, names, use_rslora=rslora)
    return config.to_dict()
