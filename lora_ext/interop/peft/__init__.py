"""PEFT models run by lora_ext's kernels: :func:`lora_ext.from_peft` and its inverse."""

from .model import Report, report, take_over, to_peft

__all__ = ["Report", "report", "take_over", "to_peft"]
