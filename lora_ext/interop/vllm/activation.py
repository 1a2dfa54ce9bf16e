"""Learning from vLLM which slot it has just filled."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from .updates import Updates

_MARK = "_lora_ext_follows"


def follow_activations() -> None:
    """Tell wrappers of lora_ext about each adapter that vLLM moves into a slot; works once.

    The adapter manager's method is wrapped, for the process, whoever has wrapped it before.
    Managers with other wrappers see no difference.
    """
    manager: Any = importlib.import_module("vllm.lora.model_manager").LoRAModelManager
    activate = manager.activate_adapter
    if hasattr(activate, _MARK):  # functools.wraps hands it on to a wrapper around ours
        return

    @functools.wraps(activate)
    def activate_adapter(self: Any, lora_id: int, *args: Any, **kwargs: Any) -> bool:
        moved = activate(self, lora_id, *args, **kwargs)
        if moved:
            slot = self.lora_index_to_id.index(lora_id)
            for wrapper in set(self.punica_wrapper_mapping.values()):
                if isinstance(wrapper, Updates):
                    wrapper.slot_changed(slot)
        return moved

    setattr(activate_adapter, _MARK, True)
    manager.activate_adapter = activate_adapter
