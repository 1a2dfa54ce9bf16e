"""Learning from vLLM which slot it has just filled."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from .updates import Updates


def follow_activations() -> None:
    """Tell wrappers of lora_ext about each adapter that vLLM moves into a slot; works once.

    The adapter manager's method is wrapped, for the process. Managers with other wrappers see no
    difference.
    """
    manager: Any = importlib.import_module("vllm.lora.model_manager").LoRAModelManager
    activate = manager.activate_adapter
    if hasattr(activate, "__wrapped__"):
        return

    @functools.wraps(activate)
    def activate_adapter(self: Any, lora_id: int) -> bool:
        moved = activate(self, lora_id)
        if moved:
            slot = self.lora_index_to_id.index(lora_id)
            for wrapper in set(self.punica_wrapper_mapping.values()):
                if isinstance(wrapper, Updates):
                    wrapper.slot_changed(slot)
        return moved

    manager.activate_adapter = activate_adapter
