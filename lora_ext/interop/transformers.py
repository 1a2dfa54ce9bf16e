"""Former module of ``attach`` and ``detach``, which are in :mod:`lora_ext.serving`."""

from lora_ext.serving import attach, detach

__all__ = ["attach", "detach"]
