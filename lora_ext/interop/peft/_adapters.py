"""Adapters of a PEFT model that are used in a forward, with errors and warnings about them."""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lora_ext._checks import require
from lora_ext._torch import compiles
from lora_ext.adapter import BaseModels, model_name
from lora_ext.layers import adapter_parameters, adapters_of, refuse_float8, switched_off
from lora_ext.rows import (
    Assignment,
    PoolLayer,
    UnknownAdapterError,
    _layouts,
    innermost,
    several_processes,
)

_WHERE = "from_peft: adapter_names"
_LISTED = 8  # maximum number of layer names in a warning
_REFERENCE = "ref"  # name of the adapter copy that TRL uses as its frozen reference model


def check_values(model: nn.Module) -> None:
    """Raise ValueError if an adapter has no values, or if it or a plain base weight is float8.

    If accelerate has offloaded a base layer, an adapter that is then added to the layer is on
    ``meta`` and has no values. Adapters that accelerate has offloaded are also on ``meta``, but
    have a hook that loads their values. They cause no error.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            refuse_float8(f"from_peft: {name}", layer)
        if not isinstance(layer, LoraLayer):
            continue
        for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
            weight = getattr(factor, "weight", factor)  # a bare parameter in AdaLoRA
            lost = weight.is_meta and not hasattr(factor, "_hf_hook")
            hook = getattr(layer.get_base_layer(), "_hf_hook", None)
            if lost and getattr(hook, "offload", False):
                raise ValueError(
                    f"from_peft: {name}: expected adapters with values, found adapters on meta, "
                    "since accelerate has offloaded the base layer; add the adapters first, then "
                    "call accelerate.cpu_offload(layer.base_layer, execution_device) for each layer"
                )


def warn_of_other_bases(model: nn.Module) -> None:
    """Warn about adapters that were trained on other base models, once per name of such a model."""
    configs = getattr(model, "peft_config", None)
    bases = BaseModels(model_name(model))
    for name, config in (configs if isinstance(configs, Mapping) else {}).items():
        other = getattr(config, "base_model_name_or_path", None)
        # The warning points at the caller of lora_ext.from_peft, which calls take_over.
        bases.meet(f"from_peft: adapter {name!r}", other, stacklevel=4)


def refuse_names_of_a_reference(active: list[str], names: Assignment) -> None:
    """Raise ValueError if TRL runs its reference model with the ``adapter_names`` of the policy.

    TRL's reference model is a frozen copy of the adapter, which TRL activates. ``adapter_names``
    replace the active adapter, so the reference would be equal to the policy. The error is raised
    if the reference is the active adapter, rows name other adapters but not the reference, and
    gradients are disabled. It is not raised if all rows use the base model.
    """
    others = names.members and _REFERENCE not in names.members
    if active == [_REFERENCE] and others and not torch.is_grad_enabled():
        found = ", ".join(map(repr, names.members))
        raise ValueError(
            f"from_peft: adapter_names: expected none while TRL's {_REFERENCE!r} is active, found "
            f"{found}; pass a base model without adapters to the trainer as ref_model"
        )


def warn_of_frozen(model: nn.Module, names: Assignment) -> None:
    """Warn about named adapters that are frozen: by default, PEFT trains only the active one."""
    frozen = set(names.members) if torch.is_grad_enabled() else set()
    for layer in model.modules():
        if not frozen:
            return
        if isinstance(layer, LoraLayer):
            frozen -= {name for name in frozen if trains(layer, name)}
    if frozen:
        found = ", ".join(repr(name) for name in sorted(frozen))
        warnings.warn(
            f"from_peft: adapter_names: expected adapters that are trained, found {found} frozen; "
            "call model.set_requires_grad([...]) to train them, or model.eval()",
            stacklevel=1,
        )


def trains(layer: Any, name: str) -> bool:
    """Return whether an adapter of a layer requires a gradient.

    All parameters of the adapter are read, so that ZeRO-3 gathers them.
    """
    return any([parameter.requires_grad for parameter in adapter_parameters(layer, name)])


def taking_part(
    layer: Any, rows: Assignment | None
) -> tuple[tuple[str, ...], Assignment | None, tuple[int, ...]]:
    """Return the adapters that a PEFT layer applies in a forward.

    Args:
        layer: LoRA layer of PEFT.
        rows: adapter of each row, or None without ``adapter_names``.

    Returns:
        The names of the adapters; the adapter of each row, or None if all adapters apply to every
        row; and the positions, in the first tuple, of adapters that are computed even if no row
        uses them. These are all trained adapters if there are several processes, and none
        otherwise: see :func:`lora_ext.rows._rows.together`.
    """
    off = switched_off(layer)
    if rows is None:
        refuse_block(layer, layer.lora_A, layer.active_adapters)
    if not several_processes():
        wanted = rows.members if rows is not None else layer.active_adapters
        return tuple(n for n in wanted if n in layer.lora_A and n not in off), rows, ()
    # The parameters of every adapter are read, so that ZeRO-3 gathers them on all processes.
    asked = {name: trains(layer, name) for name in layer.lora_A}
    present = tuple(name for name in asked if name not in off)
    trained: tuple[int, ...] = ()
    if torch.is_grad_enabled():
        trained = tuple(place for place, name in enumerate(present) if asked[name])
    if rows is None:
        active = [name for name in layer.active_adapters if name in present]
        if len(active) > 1 or all(present[place] in active for place in trained):
            return tuple(active), None, ()
        rows = Assignment.of_entries(active or [None], ())
    return present, rows, trained


_warned: set[int] = set()  # handles of the pools for which a warning was issued


def refuse_block(
    module: nn.Module, names: Container[str], active: Sequence[str], *, other_names: bool = False
) -> None:
    """Raise or warn if a forward ignores the surrounding ``lora_ext.adapters`` block.

    Layers of PEFT do not read the block. Without ``adapter_names``, they use the active adapters.
    Raises if the block contains one of ``names`` and a layer of ``module`` belongs to the block's
    pool. If no layer belongs to that pool, the block may be for another model, such as the teacher
    of a student, and a warning is issued once per pool.

    Args:
        module: layer or model of PEFT.
        names: names of the adapters of ``module``.
        active: names of the active adapters.
        other_names: whether to warn also about a block that contains none of ``names``.

    Raises:
        RuntimeError: If the block contains one of ``names`` and a layer of ``module`` belongs to
            the block's pool.
    """
    block = None if compiles() else innermost()
    if block is None or block.assignment.each() == list(active):
        return
    message = (
        "adapters: names: expected a model that reads its adapters from the block, found a model "
        f"of from_peft, which uses {list(active)!r:.200} and ignores the block's names "
        f"{list(block.assignment.names)!r:.200}; pass adapter_names= to the model, or call it "
        "outside the block"
    )
    ours = any(name in names for name in block.assignment.members)
    if ours and any(
        isinstance(layer, PoolLayer) and layer.handle == block.handle for layer in module.modules()
    ):
        raise RuntimeError(message)
    # Training methods enter blocks without slots, which contain adapters of layers. Such a block
    # causes no warning unless it contains one of `names`.
    other = other_names and block.num_slots and block.assignment.names
    if (ours or other) and block.handle not in _warned:
        _warned.add(block.handle)
        warnings.warn(message, stacklevel=1)


def refuse_layers_of_peft(model: nn.Module, left: dict[str, str]) -> None:
    """Raise NotImplementedError if a layer that PEFT runs has a trained adapter.

    Call this in a training forward with ``adapter_names``, if there are several processes.

    Args:
        model: PEFT's model.
        left: reason why PEFT runs a layer, by the name of the layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            own = (p for n, p in module.named_parameters() if not n.startswith("original_module."))
            if any(p.requires_grad for p in own):
                raise no_gradients_without_rows(f"{name}: PEFT runs a {type(module).__name__}")
        elif name in left and any(trains(module, adapter) for adapter in adapters_of(module)):
            raise no_gradients_without_rows(f"{name}: {left[name]}")


def refuse_exact(base: Any, why: str | None) -> None:
    """Raise ValueError if ``base`` is exact and PEFT must run the layer, for the reason ``why``."""
    exact = getattr(base, "exact", False)
    require(not (why and exact), "exact", "model", "adapters that lora_ext computes", why)


def refuse_mixtures(model: nn.Module, names: Assignment) -> None:
    """Raise if a mixture in ``adapter_names`` contains an adapter that cannot be mixed.

    Raises:
        NotImplementedError: If PEFT runs a layer of the adapter, or the adapter has other parts
            than factors: a magnitude, ``modules_to_save``, ``trainable_token_indices``.
        UnknownAdapterError: If no layer has the adapter.
    """
    together = {name for own in names.names if isinstance(own, tuple) for name in own}
    known: set[str] = set()
    layer: Any
    for place, layer in model.named_modules():
        wrapper, peft_layer = (isinstance(layer, k) for k in (AuxiliaryTrainingWrapper, LoraLayer))
        found = layer._adapters if wrapper else adapters_of(layer) if peft_layer else ()
        own = names.weighted & {*found}
        known |= {*found}
        for name in sorted(own):
            why = f"it has a {type(layer).__name__}"
            if hasattr(type(layer), "uncovered"):
                why = layer.uncovered(name) or layer.unmixed(name, name in together)  # pyright: ignore
            if why:
                expected = f"{name!r}: expected an adapter that lora_ext can mix, found {place}"
                raise NotImplementedError(f"{_WHERE}: {expected}: {why}")
    if unknown := sorted(names.weighted.union(names.unused) - known):
        raise UnknownAdapterError(f"{_WHERE}: no layer has an adapter named {unknown[0]!r}")


def no_gradients_without_rows(found: str) -> NotImplementedError:
    """Return the error for a layer that computes no gradient for adapters without rows."""
    return NotImplementedError(
        "from_peft: adapter_names: expected lora_ext to run all trained layers in several "
        f"processes, found {found}; FSDP2 and ZeRO would sum gradients of different adapters"
    )


def turned_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that PEFT runs with an input ``(tokens, sequences, ...)``.

    PEFT assigns adapters along the first dimension. If there are as many tokens as sequences, PEFT
    would silently use the adapter of sequence i for all tokens at position i.
    """
    layers = {name: model.get_submodule(name) for name in _layouts.tokens_first(model)}
    return tuple(
        name
        for name, layer in layers.items()
        if isinstance(layer, LoraLayer) and not hasattr(type(layer), "tokens_first")
    )


def refuse_turned(names: Sequence[str], turned: Sequence[str]) -> None:
    """Raise ValueError if ``names`` are not all equal and there are ``turned`` layers.

    ``turned`` is the result of :func:`turned_layers`.
    """
    if turned and len(set(names)) > 1:
        raise ValueError(
            f"from_peft: adapter_names: {turned[0]}: expected one name for all rows, found "
            f"{', '.join(sorted(set(map(str, names))))!r:.200}; PEFT runs this layer, whose input "
            "has the tokens as its first dimension: remove it from target_modules"
        )


def by_reason(left: dict[str, str]) -> str:
    """Format the reasons of a report, each once with the names of at most ``_LISTED`` layers."""
    layers: dict[str, list[str]] = {}
    for name, reason in left.items():
        layers.setdefault(reason, []).append(name)
    return "; ".join(
        f"{len(names)} of them ({reason}: {', '.join(names[:_LISTED])}"
        f"{', ...' if len(names) > _LISTED else ''})"
        for reason, names in layers.items()
    )
