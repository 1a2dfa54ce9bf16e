"""What decides who trains what."""

from __future__ import annotations

from typing import Protocol

from lora_ext.federated import LayerPlan
from lora_ext.federated.update import Client


class Allocator(Protocol):
    """Decides who trains what."""

    def plan(self, round: int, client: Client, capability: int) -> LayerPlan:
        """The plan of one client, of at most ``capability`` layers; without any it is not asked."""
        ...
