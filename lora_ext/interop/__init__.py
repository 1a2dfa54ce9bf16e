"""Models and formats of other packages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

if TYPE_CHECKING:
    from lora_ext.methods.copra import CopraCallback

__all__ = ["CopraCallback", "from_peft"]

Model = TypeVar("Model", bound=nn.Module)


def __getattr__(name: str) -> Any:
    """Import `CopraCallback` on first access, since it needs another package."""
    if name == "CopraCallback":
        from lora_ext.methods.copra import CopraCallback

        return CopraCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def from_peft(model: Model) -> Model:
    """Run the LoRA layers of a PEFT model with lora_ext's kernels, forward and backward.

    Changes ``model`` in place; call it again after adapting more modules. Parameters,
    ``state_dict``, ``set_adapter``, ``merge_and_unload``, ``save_pretrained`` and
    ``adapter_names=`` work as before. ``adapter_names=`` also works in training, with one name per
    sequence, and under gradient checkpointing; a frozen adapter among the names causes a warning. A
    base layer of bitsandbytes, torchao or quanto is called, and the update is fused. PEFT still
    runs the layers that lora_ext does not support, such as embeddings:
    :func:`lora_ext.interop.peft.report` lists them. A model without any supported layer causes a
    warning with the list. :func:`lora_ext.interop.peft.to_peft` undoes all changes.

    Args:
        model: a ``PeftModel`` with LoRA adapters, or any model whose layers PEFT has adapted.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If it has no LoRA layer, or adapters whose values were lost on an offloaded
            base.
        ModuleNotFoundError: If peft is not installed.

    Source: LoRA (Hu et al. 2021); https://github.com/huggingface/peft for the layers.
    """
    from .peft import take_over

    return take_over(model)
