"""Extraction of an adapter from a PEFT model, or from a model with layers of `lora_ext.nn`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext.kinds import variants
from lora_ext.layers import LoraLayer, matches_suffix

from ._config import OWN_INITS, alpha_of, patterns
from ._peft_tensors import PREFIX, parse_key

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
        ValueError: If the model has no such adapter; if ``adapter`` is None and not exactly one is
            active; or if the layers have settings that PEFT's configuration cannot express.
    """
    configs = getattr(model, "peft_config", None)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    if isinstance(configs, Mapping):
        active: Any = []
        if adapter is None:  # Read only if needed: transformers raises if only PEFT added layers.
            active = getattr(model, "active_adapters", [])
            if callable(active):  # a method in transformers, a property in PEFT
                active = active()
        adapter = _chosen(adapter, configs, active, where)
        config = configs[adapter]
        if getattr(config.peft_type, "value", config.peft_type) != "LORA":
            from peft import get_peft_model_state_dict

            return config, get_peft_model_state_dict(model, adapter_name=adapter)
        return config, _state(model, adapter)
    if not layers:
        expected = "a PEFT model, or one with layers of lora_ext.nn"
        raise ValueError(f"{where}: expected {expected}, found none in a {type(model).__name__}")
    known = dict.fromkeys(name for layer in layers.values() for name in layer.adapter_names)
    active = dict.fromkeys(name for layer in layers.values() for name in layer.active_adapters)
    adapter = _chosen(adapter, known, active, where)
    layers = {name: layer for name, layer in layers.items() if adapter in layer.adapter_names}
    names = [name for name, _ in model.named_modules()]
    return _describe(layers, adapter, names, where), _state(model, adapter)


def _chosen(adapter: str | None, known: Iterable[str], active: Iterable[str], where: str) -> str:
    if adapter is None:
        active = list(active)
        expected = f"a name, since the active adapters are {active}"
        require(len(active) == 1, where, "adapter_name", expected, "None")
        return active[0]
    require(adapter in known, where, "adapter", f"one of {list(known)}", repr(adapter))
    return adapter


def _state(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    tensors = model.state_dict()
    keys = {name: parse_key(name) for name in tensors}
    found = {n: k for n, k in keys.items() if k is not None and k.adapter == adapter}
    whole = tuple(
        f"{k.module}.base_layer."
        for k in found.values()
        if k.module.rpartition(".")[2] in _SAVED_WHOLE and hasattr(model, "peft_config")
    )
    beside = [name for name in tensors if name.removeprefix(PREFIX).startswith(whole)]
    state = {name: tensors[name] for name in (*found, *beside)}
    return state | _replacements(model, adapter, tensors)


def _replacements(
    model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the trained tensors that replace tensors of the base model, by name in PEFT's
    files."""
    own = f".modules_to_save.{adapter}."
    found = {name.replace(own, "."): value for name, value in tensors.items() if own in name}
    own, seen = f".trainable_tokens_delta.{adapter}", set()
    for name, value in tensors.items():
        if name.endswith(own) and value.data_ptr() not in seen:  # a tied head shares this tensor
            seen.add(value.data_ptr())
            found[name.removesuffix(f".{adapter}")] = value
    configs: Any = getattr(model, "peft_config", {})
    bias = getattr(configs.get(adapter), "bias", "none")
    if bias != "none":
        only = ".base_layer.bias" if bias == "lora_only" else ".bias"
        for name, value in tensors.items():
            wrapped = ".modules_to_save." in name or ".original_module." in name
            if name.endswith(only) and parse_key(name) is None and not wrapped:
                found[name] = value
    return found


def _describe(
    layers: dict[str, LoraLayer], adapter: str, names: Iterable[str], where: str
) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter in these layers, with full module names."""

    def everywhere(field: str) -> bool:
        values = {name: getattr(layer, field)[adapter] for name, layer in layers.items()}
        others = [name for name, value in values.items() if not value]
        expected = "the same value in every layer, since PEFT's configuration has one for all"
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
    # Alphas are computed from the scale, which users may change without lora_alpha.
    alphas = {n: alpha_of(x.scaling[adapter], ranks[n], rslora) for n, x in layers.items()}
    rates = {float(getattr(layer.lora_dropout[adapter], "p", 0.0)) for layer in layers.values()}
    invocations = {layer.alora_invocation_tokens.get(adapter, ()) for layer in layers.values()}
    alike, expected = len(invocations) == 1, "the same tokens in every layer"
    require(alike, where, "alora_invocation_tokens", expected, f"{invocations!r:.200}")
    r, rank_pattern = patterns(ranks)
    lora_alpha, alpha_pattern = patterns(alphas)
    others = [n for n in names if n not in layers and matches_suffix(n, frozenset(layers))]
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": rslora,
        **{kind.when: everywhere(kind.when) for kind in variants("LORA")},
        "lora_bias": everywhere("lora_bias"),
        "lora_dropout": max(rates),  # PEFT's configuration has one rate for all layers
        "fan_in_fan_out": all(layer.fan_in_fan_out for layer in layers.values()),
        "bias": "none",
        "init_lora_weights": init,
        "target_modules": sorted(layers),
        # PEFT matches the ends of names, so longer names that end like a target are excluded.
        "exclude_modules": "|".join(map(re.escape, sorted(others))) or None,
        **({"alora_invocation_tokens": list(i)} if (i := invocations.pop()) else {}),
    }
