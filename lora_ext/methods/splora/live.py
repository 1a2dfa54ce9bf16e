"""SPLoRA on a model in memory: switch layers off in place, and on again."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from lora_ext._checks import require
from lora_ext.adapter import LoraAdapter, ModelSource, base_name
from lora_ext.layers import LayerGroups, adapted_layers, adapters_of, set_active

from ._weights import Progress
from .config import SploraConfig
from .pruning import SploraResult, apply
from .scores import Pairs

_KEY = "_lora_ext_splora"


class _Applied(NamedTuple):
    """Record that is stored on the model. It contains only names, so that :func:`remove` also works
    on a copy of the model."""

    adapter: str
    switched: tuple[str, ...]  # layers that were on before and are off now


def apply_to(
    model: nn.Module,
    base: ModelSource,
    aligned: ModelSource,
    config: SploraConfig,
    adapter: str = "default",
    *,
    pairs: Pairs | None = None,
    progress: Progress = iter,
) -> SploraResult:
    """Score the layers of a model's adapter, and switch off those that are selected for pruning.

    A layer that is off runs only its base layer, so that its outputs are bitwise equal to those of
    the base layer. Parameters and their ``requires_grad`` do not change.

    Args:
        model: model with layers of :class:`lora_ext.nn.LoraLinear` or of PEFT's ``lora.Linear``,
            before or after :func:`lora_ext.from_peft`.
        base, aligned, pairs, progress: as for :func:`ediem_scores`; ``model`` itself may be the
            aligned model, since the weights of its base layers are compared.
        config: settings, with num or threshold; ``mode`` is not used.
        adapter: name of the adapter.

    Returns:
        the result of :func:`apply`, with names of the base model. ``result.adapter`` is a pruned
        copy of the adapter, which can be saved.

    Raises:
        RuntimeError: If the model is pruned already: call :func:`remove` first.
        ValueError: If the model has no such adapter, or it is merged, or if :func:`apply` raises
            it. Then the model is unchanged.
    """
    new = _KEY not in model.__dict__
    found = "a pruned model; call splora.remove(model) first"
    require(new, "apply_to", "model", "a model that SPLoRA has not pruned", found, RuntimeError)
    value = LoraAdapter.from_model(model, adapter)
    result = apply(value, base, aligned, config, pairs=pairs, progress=progress)
    groups = LayerGroups(model, adapter, "module")
    names = [name for (name,) in groups.names]
    on = {name for name, is_on in zip(names, groups.mask.tolist(), strict=True) if is_on}
    pruned = set(result.pruned)
    switched = tuple(name for name in names if name in on and base_name(name) in pruned)
    groups.set_mask([name in on and name not in switched for name in names])
    model.__dict__[_KEY] = _Applied(adapter, switched)
    return result


def remove(model: nn.Module) -> None:
    """Undo :func:`apply_to`: switch on every layer that it switched off.

    Raises:
        RuntimeError: If the model is not pruned.
    """
    applied: _Applied | None = model.__dict__.pop(_KEY, None)
    if applied is None:
        found = f"a {type(model).__name__} that is not pruned"
        raise RuntimeError(f"remove: model: expected a model pruned by apply_to, found {found}")
    layers = adapted_layers(model)
    for name in applied.switched:
        layer = layers.get(name)
        if layer is not None and applied.adapter in adapters_of(layer):
            set_active(layer, applied.adapter, True)
