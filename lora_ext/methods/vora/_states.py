"""Hooks on a language model: they collect hidden states, or pass masks to ``generate``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._checks import require

from ._modalities import modality
from .config import Pairing


@contextlib.contextmanager
def block_states(blocks: Sequence[nn.Module], pairing: Pairing) -> Iterator[list[Any]]:
    """Collect the hidden states for the distillation during the forward in a ``with`` block.

    Yields:
        a list that the forward fills with one tensor ``(B, T, d)`` per block: the block's output,
        or its input if ``pairing`` is "released". ``B`` is the batch size, ``T`` the number of
        tokens and ``d`` the hidden width. The states are taken before the final norm, unlike the
        last entry of ``hidden_states`` in transformers. Forwards in other threads are ignored.

    Raises:
        ValueError: If a reentrant checkpoint runs a block without gradients; raised by the forward.
    """
    states: list[Any] = [None] * len(blocks)
    thread, trains = threading.get_ident(), torch.is_grad_enabled()

    def keep(index: int, _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if threading.get_ident() != thread:
            return
        fits = not trains or torch.is_grad_enabled()
        expected = "use_reentrant=False"
        found = "a reentrant checkpoint, whose hidden states have no gradient"
        require(fits, "VoraForCausalLM", "gradient_checkpointing_kwargs", expected, found)
        hidden = output
        if pairing == "released":
            hidden = args[0] if args else kwargs["hidden_states"]
        states[index] = hidden[0] if isinstance(hidden, tuple) else hidden

    with contextlib.ExitStack() as hooks:
        for index, block in enumerate(blocks):
            hooks.enter_context(block.register_forward_hook(partial(keep, index), with_kwargs=True))
        yield states


@contextlib.contextmanager
def prefill(
    model: nn.Module, mask: Tensor | dict[str, Tensor] | None, vision_mask: Tensor | None
) -> Iterator[None]:
    """Pass an attention mask and a mask of the vision tokens to the prefill of ``generate``.

    The prefill is the forward that receives embeddings. Decode steps receive token ids and process
    only text. ``generate`` repeats each sample in consecutive rows for beams and returned
    sequences; the masks are repeated in the same way.

    Args:
        model: the language model.
        mask: additive attention mask ``(B, 1, T, T)``, or a dict with one mask per type of layer;
            None keeps the model's mask.
        vision_mask: mask ``(B, T)`` of the vision tokens for layers of route "vision"; with None,
            no :func:`modality` block is opened.
    """
    thread, inside = threading.get_ident(), contextlib.ExitStack()

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or threading.get_ident() != thread:
            return None

        def each(tensor: Tensor) -> Tensor:  # repeats rows as `generate` repeats samples
            return tensor.repeat_interleave(len(embeds) // len(tensor), 0)

        if vision_mask is not None:
            inside.enter_context(modality(each(vision_mask)))
        if isinstance(mask, dict):
            kwargs = {**kwargs, "attention_mask": {kind: each(m) for kind, m in mask.items()}}
        elif mask is not None:
            kwargs = {**kwargs, "attention_mask": each(mask)}
        return args, kwargs

    def leave(*_: Any) -> None:
        if threading.get_ident() == thread:
            inside.close()

    with (
        inside,
        model.register_forward_pre_hook(enter, with_kwargs=True),
        model.register_forward_hook(leave, always_call=True),  # called even if the forward raises
    ):
        yield
