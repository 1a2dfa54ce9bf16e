"""Old import path of ``attach`` and ``detach``, which are now in :mod:`lora_ext.serving`."""

from lora_ext.serving import attach, detach

__all__ = ["attach", "detach"]
