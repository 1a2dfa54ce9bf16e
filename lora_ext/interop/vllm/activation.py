"""Learning from vLLM which slot it has just filled."""

from __future__ import annotations

import importlib
from typing import Any

from .interface import wrap
from .updates import Updates


def follow_activations() -> None:
    """Tell wrappers of lora_ext about each adapter that vLLM moves into a slot; works once.

    The adapter manager's method is wrapped, for the process, whoever has wrapped it before.
    Managers with other wrappers see no difference.
    """
    manager = importlib.import_module("vllm.lora.model_manager").LoRAModelManager
    wrap(manager, "activate_adapter", _activate)


def _activate(inner: Any, manager: Any, lora_id: int, *args: Any, **kwargs: Any) -> bool:
    moved = inner(manager, lora_id, *args, **kwargs)
    if moved:
        slot = manager.lora_index_to_id.index(lora_id)
        for wrapper in set(manager.punica_wrapper_mapping.values()):
            if isinstance(wrapper, Updates):
                wrapper.slot_changed(slot)
    return moved
