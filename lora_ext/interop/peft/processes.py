"""Adapters per row where several processes train one PEFT model, each of them other rows."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lora_ext.layers import adapters_of, switched_off
from lora_ext.rows import Assignment, several_processes

from .adapters import trains


def taking_part(
    layer: Any, rows: Assignment | None
) -> tuple[tuple[str, ...], Assignment | None, tuple[int, ...]]:
    """Which adapters of a layer of PEFT's take part in a forward.

    Returns:
        The adapters that it reads; the rows, None where all have all of these; and the places of
        those that are used even without rows: on several processes all that train, for the reason
        that :func:`lora_ext.rows.rows.together` gives.
    """
    off = switched_off(layer)
    if not several_processes():
        wanted = rows.names if rows is not None else layer.active_adapters
        return tuple(n for n in wanted if n in layer.lora_A and n not in off), rows, ()
    # Each is asked for its parameters, as ZeRO-3 gathers a parameter when it is read, and all
    # processes have to take part in that.
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


def refuse_layers_of_peft(model: nn.Module, left: dict[str, str]) -> None:
    """Refuse adapters per row that PEFT itself trains, where there are several processes.

    Args:
        left: names of layers that PEFT runs, and why.

    Raises:
        NotImplementedError: naming the first of them that trains.
    """
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            own = (p for n, p in module.named_parameters() if not n.startswith("original_module."))
            if any(p.requires_grad for p in own):
                raise no_gradients_without_rows(f"{name}: PEFT runs a {type(module).__name__}")
        elif name in left and any(trains(module, adapter) for adapter in adapters_of(module)):
            raise no_gradients_without_rows(f"{name}: {left[name]}")


def no_gradients_without_rows(found: str) -> NotImplementedError:
    """Of a layer in which an adapter without rows has no gradient."""
    return NotImplementedError(
        "from_peft: adapter_names: expected trained adapters that lora_ext runs where there are "
        f"several processes, found {found}; there an adapter without rows has no gradient, and "
        "FSDP2 and ZeRO would sum gradients of different adapters"
    )
