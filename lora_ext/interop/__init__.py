"""Support for models and formats of other packages: PEFT, vLLM and SmolLM2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

if TYPE_CHECKING:
    from lora_ext.methods.copra import CopraCallback

__all__ = ["CopraCallback", "from_peft"]

Model = TypeVar("Model", bound=nn.Module)


def __getattr__(name: str) -> Any:
    """Import ``CopraCallback`` on first access, since it needs transformers."""
    if name == "CopraCallback":
        from lora_ext.methods.copra import CopraCallback

        return CopraCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def from_peft(model: Model) -> Model:
    """Run the LoRA layers of a PEFT model with lora_ext's kernels in the forward and the backward.

    ``model`` is changed in place. Call this function again if you adapt more modules later.
    Parameters, ``state_dict``, ``set_adapter``, ``merge_and_unload``, ``save_pretrained`` and
    ``adapter_names=`` work as before. In addition, ``adapter_names=`` works in training, with one
    name per sequence, and with gradient checkpointing; if a named adapter is frozen, a warning is
    issued. A quantised base layer of bitsandbytes, torchao or quanto still computes its own output,
    to which lora_ext adds the update in one op.

    The linear layers of PEFT's X-LoRA and Arrow models, which mix several adapters per token, are
    run too.

    PEFT still runs the layers that lora_ext does not support, such as embeddings.
    :func:`lora_ext.interop.peft.report` lists them. If lora_ext supports none of the layers, a
    warning lists them. :func:`lora_ext.interop.peft.to_peft` undoes all changes.

    Args:
        model: ``PeftModel`` with LoRA adapters, or any model with layers that PEFT has adapted.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If ``model`` has no LoRA layer, or if adapters have no values, because they were
            added to a base layer that accelerate had offloaded; or if an adapter, or the weight of
            a plain base layer, is float8.
        ModuleNotFoundError: If peft is not installed.

    Source: LoRA (Hu et al. 2021); https://github.com/huggingface/peft for the layers.
    """
    from .peft import take_over

    return take_over(model)
