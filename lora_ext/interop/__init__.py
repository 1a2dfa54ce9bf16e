"""Other people's models and formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

if TYPE_CHECKING:
    from lora_ext.methods.copra import CopraCallback

__all__ = ["CopraCallback", "from_peft"]

Model = TypeVar("Model", bound=nn.Module)


def __getattr__(name: str) -> Any:
    """What needs another package is imported when it is asked for."""
    if name == "CopraCallback":
        from lora_ext.methods.copra import CopraCallback

        return CopraCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def from_peft(model: Model) -> Model:
    """Let lora_ext's kernels run the LoRA layers of a PEFT model, forward and backward.

    Works in place, and may be called again after more modules were adapted. Parameters,
    ``state_dict``, ``set_adapter``, ``merge_and_unload``, ``save_pretrained`` and
    ``adapter_names=`` stay what they are; ``adapter_names=`` now also works in training, one name
    per sequence, under gradient checkpointing too; a frozen adapter among them is warned of. Over a
    base layer of bitsandbytes, torchao or quanto the base is called, and the update is fused. PEFT
    still runs what lora_ext cannot, such as embeddings: :func:`lora_ext.interop.peft.report` lists
    them, and a model without any other layer is warned of, with the list.
    :func:`lora_ext.interop.peft.to_peft` undoes the whole.

    Args:
        model: a ``PeftModel`` with LoRA adapters, or any model whose layers PEFT has adapted.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module. ValueError: it has no LoRA layer, or adapters whose
            values were lost on an offloaded base. ModuleNotFoundError: peft is not installed.

    Source: LoRA (Hu et al. 2021); https://github.com/huggingface/peft for the layers.
    """
    from .peft import take_over

    return take_over(model)
