"""Reading of an adapter's factors, from any kind of source, as two matrices per module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext.layers import adapted_layers, adapter_factors

from ._peft_files import AdapterSource, open_adapter
from ._peft_tensors import PREFIX, factor_keys
from ._value import LoraAdapter

#: An adapter, a model, a state dict, a folder, or (config, state dict).
Source = LoraAdapter | nn.Module | Mapping[str, Tensor] | AdapterSource
LAYOUTS = ("r_in", "in_r")


#: a ``(r, n)``, b ``(m, r)`` and scaling of one module, which has the update ``scaling * b @ a``.
#: r is the rank, n the number of inputs, m the number of outputs.
Matrices = tuple[Tensor, Tensor, float]


def factor_matrices(
    where: str, source: Source, adapter_name: str, layout: str
) -> dict[str, Matrices]:
    """Return the factors of an adapter by module name in the base model.

    See :func:`lora_ext.adapter.rank_report` for arguments and errors.
    """
    allowed = LAYOUTS if isinstance(source, Mapping) else LAYOUTS[:1]
    require(layout in allowed, where, "layout", f"one of {allowed}", repr(layout))
    if isinstance(source, Mapping):
        return _bare(where, source, adapter_name, layout)
    if isinstance(source, nn.Module):
        layers: dict[str, Any] = dict(adapted_layers(source, adapter_name))
        return {
            name.removeprefix(PREFIX): (
                *adapter_factors(layer, adapter_name),
                layer.scaling[adapter_name],
            )
            for name, layer in layers.items()
        }
    if not isinstance(source, LoraAdapter):
        with open_adapter(source) as (_, tensors):
            factor_keys(where, tensors.infos)
        source = LoraAdapter.load(source)
    return {name: (f.a.flatten(1), f.b.flatten(1), f.scaling) for name, f in source.modules.items()}


def _bare(
    where: str, state: Mapping[str, Tensor], adapter_name: str, layout: str
) -> dict[str, Matrices]:
    found: dict[str, Matrices] = {}
    for name, keys in factor_keys(where, state, adapter_name).items():
        factors: list[Any] = []
        for key in keys:
            t = state[key]
            check_floating(f"{where}: {key}", "tensor", t)
            t = t.flatten(1) if t.dim() > 2 else t  # kernel of a convolution
            factors.append(t.T if layout == "in_r" and t.dim() == 2 else t)
        found[name] = (*factors, 1.0)
    require(bool(found), where, "source", f"factors of an adapter {adapter_name!r}", "none")
    return found


def check_floating(where: str, name: str, t: Any) -> None:
    """Raise TypeError unless ``t`` is a floating-point tensor."""
    found = t.dtype if isinstance(t, Tensor) else type(t).__name__
    floating = isinstance(t, Tensor) and t.is_floating_point()
    require(floating, where, name, "a floating-point tensor", found, TypeError)
