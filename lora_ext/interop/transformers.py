"""``attach`` and ``detach`` under the name they had: they are of :mod:`lora_ext.serving`."""

from lora_ext.serving import attach, detach

__all__ = ["attach", "detach"]
