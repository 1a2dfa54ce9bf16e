"""Last layers of the draft path, which computes the hidden states that the circuit head reads.

These layers are the verifier's own layers with LoRA, and are computed in the verifier's pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext.layers import LoraLinear, Swap, decoder_layers, linear_size
from lora_ext.rows import of_call, pool_of

NAME = "draft"


class DraftTail(nn.Module):
    """LoRA on the linear layers of the last K layers, for rows of the draft path only.

    The layers are not copied. :meth:`beside_the_verifier` duplicates the rows that enter the
    layers, and the second half of the rows uses the adapter. Outside the ``with`` blocks of the
    methods, the model's outputs do not change.

    The model's modules are replaced in place; :meth:`remove` restores the originals.

    Args:
        model: transformers causal LM.
        num_layers: K, number of last layers that get LoRA, at least 1.
        rank: rank of the LoRA.
        alpha: alpha of the LoRA.

    Raises:
        ValueError: If ``num_layers`` is below 1 or above the model's number of layers, if the
            layers already have a draft tail, or if the model is attached to a pool.

    Source: arXiv 2511.11346; the authors use a merged copy of the layers instead (docs/mtpc.md).
    """

    _model: nn.Module
    _layers: list[nn.Module]
    _holders: list[nn.Module]

    def __init__(self, model: Any, num_layers: int, rank: int = 16, alpha: float = 16.0):
        super().__init__()
        stack = decoder_layers(model)
        fits = 1 <= num_layers <= len(stack)
        require(fits, "DraftTail", "num_layers", f"a number from 1 to {len(stack)}", num_layers)
        found = "an attached model; detach it, or draft with only a head (draft_layers=0)"
        require(pool_of(model) is None, "DraftTail", "model", "a model without a pool", found)
        # Not registered as children, since these layers belong to the model.
        self.__dict__["_model"], self.__dict__["_layers"] = model, list(stack)[-num_layers:]
        inside = {module for layer in self._layers for module in layer.modules()}
        replacements: dict[str, nn.Module] = {}
        holders: list[Any] = []
        for name, base in ((n, m) for n, m in model.named_modules() if m in inside):
            new = not isinstance(base, LoraLinear) or NAME not in base.lora_A
            found = f"a draft tail at {name}; call its remove() first"
            require(new, "DraftTail", "model", "layers without a draft tail", found)
            if linear_size(base) is not None:
                lora = LoraLinear(base, NAME, r=rank, lora_alpha=alpha)
                lora.set_adapter([])  # rows without an adapter name are the verifier's
                replacements[name] = lora
                holders += [lora.lora_A[NAME], lora.lora_B[NAME]]
        self.__dict__["_holders"] = holders
        self.factors = nn.ParameterList(holder.weight for holder in holders)
        self.factors.requires_grad_(True)
        self._swap: Swap | None = Swap(model, replacements, "DraftTail")

    def remove(self) -> None:
        """Restore the model's own layers; a second call does nothing.

        Raises:
            RuntimeError: If a layer has been replaced since; the model is unchanged.
        """
        if self._swap is not None:
            self._swap.restore(self._model, "DraftTail.remove")
            self._swap = None

    @contextlib.contextmanager
    def everywhere(self) -> Iterator[None]:
        """Assign every row to the draft path in a ``with`` block, for training."""
        with self._own_factors(), of_call(NAME):
            yield

    @contextlib.contextmanager
    def beside_the_verifier(self, batch: int) -> Iterator[None]:
        """Pass a doubled batch through the tail's layers in a ``with`` block: first the rows of the
        verifier, then the same rows for the draft path.

        Args:
            batch: number of rows of the batch.
        """

        def twice(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(twice(v) for v in value)
            rows = isinstance(value, Tensor) and value.dim() > 1 and len(value) == batch
            return torch.cat([value, value]) if rows else value

        def before(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            expected = "a model that uses position_ids"
            found = "ALiBi of all heads, passed to the layers as the argument alibi"
            require(kwargs.get("alibi") is None, "DraftTail", "model", expected, found)
            # Only the first layer duplicates the hidden states; later layers receive both halves.
            return twice(args), {name: twice(value) for name, value in kwargs.items()}

        with contextlib.ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(layer.register_forward_pre_hook(before, with_kwargs=True))
            stack.enter_context(self._own_factors())
            stack.enter_context(of_call([None] * batch + [NAME] * batch))
            yield

    @contextlib.contextmanager
    def _own_factors(self) -> Iterator[None]:
        """Make the layers use this module's parameters in a ``with`` block.

        The parameters may have been replaced: permanently by ``load_state_dict(assign=True)``, or
        for one call by ``torch.func``.
        """
        before: list[tuple[Any, Any]] = []
        for holder, factor in zip(self._holders, self.factors, strict=True):
            if holder.weight is not factor:
                if not isinstance(factor, nn.Parameter):
                    before.append((holder, holder.weight))
                holder._parameters["weight"] = factor  # pyright: ignore[reportArgumentType]
        try:
            yield
        finally:
            for holder, parameter in before:
                holder._parameters["weight"] = parameter
