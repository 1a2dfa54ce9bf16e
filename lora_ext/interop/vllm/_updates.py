"""The low-rank updates of vLLM's LoRA layers, computed by lora_ext's ops.

vLLM's LoRA layers share one *punica wrapper*. A layer passes its input, its output and its stacks
(the factors of all adapters, see :mod:`._slots`) to the wrapper, which adds the update of each
row's adapter to the output in place. Shape letters: ``T`` rows, ``I`` input features, ``O`` output
features, ``R`` the engine's ``max_lora_rank``.

Source: Punica (Chen et al. 2023), section 4, for shrink and expand; vLLM's ``PunicaWrapperABC`` for
names and arguments.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext import ops
from lora_ext._checks import require

from ._graph import in_graph, known
from ._interface import wrap
from ._slots import OwnedRows, Owners, Stack, Stacks


class Updates:
    """Mixin for vLLM's punica wrappers that computes the updates; place it before vLLM's class.

    Rows without an adapter stay unchanged, whatever the slots contain. Nothing is computed if no
    row of the step has an adapter, or if no adapter changes the layer.

    Raises:
        ValueError: If vLLM's ``lora_dtype`` is float8. vLLM's stacks have no scales.
    """

    # vLLM's buffers with the slot of each token and of each sampled position,
    # (max_num_batched_tokens,) int64.
    _token_lora_indices: Tensor
    _sampler_indices: Tensor

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)  # pyright: ignore[reportCallIssue]
        slots, dtype = kwargs["lora_config"].max_loras, kwargs["lora_config"].lora_dtype
        fits, expected = "float8" not in str(dtype), "a dtype of 16 or 32 bits"
        require(fits, "lora_ext", "lora_dtype", expected, dtype)
        self.handle = known(self)
        self._stacks = Stacks()
        self._tokens = Owners(self._token_lora_indices, slots, "tokens")
        self._samples = Owners(self._sampler_indices, slots, "samples")

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any
    ) -> None:
        """Store the adapter of each row of a new step.

        vLLM calls this if the adapters of the rows have changed since the last step.
        """
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        self._tokens.follow(mapping.index_mapping)
        self._samples.follow(mapping.prompt_mapping)

    def slot_changed(self, slot: int) -> None:
        """Update the ranks of a slot, after vLLM has copied an adapter into it."""
        self._stacks.read(slot)

    @in_graph("Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, float scale, SymInt[] widths")
    def _linear(
        self,
        y: Tensor,
        x: Tensor,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        scale: float,
        widths: Sequence[int],
    ) -> None:
        rows = self._rows_of_tokens(x)
        if rows is None:
            return
        left = 0
        for of_a, of_b, width in zip(a, b, widths, strict=True):
            part, stack = y[:, left : left + width], self._stacks.of(of_a, 1)
            _add(part, x, stack, of_b, scale, rows)
            left += width

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        scale: float,
        output_slices: Sequence[int],
        **kwargs: Any,
    ) -> None:
        """Compute ``y[:, slice i] += scale * b[i] @ (a[i] @ x)`` with the adapter of each row.

        A layer such as a merged projection of query, key and value has several output slices, each
        with separate factors.

        Args:
            y: output ``(T, O)``, with the columns of all slices.
            x: input ``(T, I)``.
            lora_a_stacked: one stack ``(slots, 1, R, I)`` per slice.
            lora_b_stacked: one stack ``(slots, 1, width, R)`` per slice.
            scale: factor of all updates. It does not include the adapters' own scales, by which
                vLLM has multiplied ``b``.
            output_slices: width of each slice.
            kwargs: ``add_inputs=False`` overwrites ``y`` instead of adding to it.

        Raises:
            RuntimeError: If ``x`` has fewer rows than the step, and the rows of the step do not all
                use the same adapter.
        """
        if not kwargs.get("add_inputs", True):
            y.zero_()
        self._linear(y, x, list(lora_a_stacked), list(lora_b_stacked), scale, list(output_slices))

    @in_graph("Tensor(a!) y, Tensor x, Tensor a, Tensor b, float scale")
    def _logits(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        stack = self._stacks.of(a, 1)
        rows = None if stack.idle() else self._rows_of_hidden_states(x)
        if rows is not None:
            _add(y, x, stack, b, scale, rows)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Add the update of an output head to the logits ``y``, as :meth:`add_lora_linear` does.

        The rows are the sampled positions, or positions of a prompt.

        Args:
            y: logits ``(T, vocabulary)``, with more columns if vLLM pads the vocabulary.
            x: hidden states ``(T, I)``.
            lora_a_stacked: stack ``(slots, 1, R, I)``.
            lora_b_stacked: stack ``(slots, 1, O, R)``.
            scale: factor of the update.
            kwargs: not used.

        Raises:
            RuntimeError: If an adapter changes the head, and the rows of ``x`` are neither sampled
                positions nor positions of a prompt.
        """
        y, x = y.view(-1, y.shape[-1]), x.flatten(0, -2)
        self._logits(y, x, lora_a_stacked, lora_b_stacked, scale)

    @in_graph("Tensor(a!) v, Tensor x, Tensor a, float scale")
    def _shrink(self, v: Tensor, x: Tensor, a: Tensor, scale: float) -> None:
        rows = self._rows_of_tokens(x)
        if rows is None:
            v.zero_()
            return
        stack = self._stacks.of(a, 1)
        rest = (stack.bank, rows.ids, _scales(scale, stack), stack.ranks)
        v.copy_(ops.lora_shrink(x.to(a.dtype), *rest, plan=rows.plan))

    def add_shrink(
        self,
        y: Sequence[Tensor] | Tensor,
        x: Tensor,
        lora_a_stacked: Sequence[Tensor],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Compute ``y[i] = scale * a[i] @ x`` for each slice ``i`` of a layer.

        Rows without an adapter are set to zero. ``y[i]`` is ``(T, R)``; for the other arguments,
        see :meth:`add_lora_linear`.
        """
        x = x.flatten(0, -2)
        for of_y, of_a in zip(y, lora_a_stacked, strict=True):
            self._shrink(of_y, x, of_a, scale)

    @in_graph("Tensor(a!) y, Tensor v, Tensor b, SymInt left, SymInt width, bool adds")
    def _expand(self, y: Tensor, v: Tensor, b: Tensor, left: int, width: int, adds: bool) -> None:
        part = y[:, left : left + width]
        if not adds:
            part.zero_()
        rows = self._rows_of_tokens(v)
        if rows is None:
            return
        stack = self._stacks.of(b, 2)
        if stack.idle():
            return
        same = part.dtype == b.dtype
        out = part if same else part.new_zeros(part.shape, dtype=b.dtype)
        ops.lora_expand_(out, v.float(), stack.bank, rows.ids, stack.ranks, plan=rows.plan)
        if not same:
            part += _exact(out, rows)

    def add_expand(
        self,
        y: Tensor,
        x: Sequence[Tensor] | Tensor,
        lora_b_stacked: Sequence[Tensor],
        output_slices: Sequence[int],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Compute ``y[:, slice i] += b[i] @ x[i]``. The slices begin at column ``offset_start``.

        ``x[i]`` is ``(T, R)``, a result of :meth:`add_shrink`. With tensor parallelism, vLLM has
        combined the results of the processes. ``add_inputs=False`` overwrites the slices.
        """
        y, left = y.view(-1, y.shape[-1]), offset_start
        for of_x, of_b, width in zip(x, lora_b_stacked, output_slices, strict=True):
            self._expand(y, of_x, of_b, left, width, add_inputs)
            left += width

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """Compute ``y += b @ x``. vLLM has looked up ``x (T, R)``, the tokens' columns of ``a``."""
        self._expand(y, x, lora_b_stacked, 0, y.shape[1], add_inputs)

    def _rows_of_tokens(self, x: Tensor) -> OwnedRows | None:
        if x.shape[0] < self._tokens.count and not self._tokens.all_alike():
            raise self._tokens.mismatch(x.shape[0])
        return self._tokens.rows(x.shape[0])

    def _rows_of_hidden_states(self, x: Tensor) -> OwnedRows | None:
        """Return the adapters of the rows of ``x``, the input of an output head.

        ``x`` has the hidden states of the sampled positions. For log-probabilities of prompts, it
        is a slice of the hidden states of all tokens. The number of rows in the storage of ``x``
        distinguishes the two cases.
        """
        held, begin = x.shape[0], 0
        if x.is_contiguous():
            held = x.untyped_storage().nbytes() // (x.shape[1] * x.element_size())
            begin = int(x.storage_offset()) // x.shape[1]
        if held == self._samples.count:
            return self._samples.rows(x.shape[0], begin)
        if held >= self._tokens.count >= begin + x.shape[0]:
            return self._tokens.rows(x.shape[0], begin)
        if self._samples.all_alike():
            return self._samples.as_first(x.shape[0])
        raise self._samples.mismatch(x.shape[0])


def follow_activations() -> None:
    """Call :meth:`Updates.slot_changed` whenever vLLM copies an adapter into a slot.

    The method ``activate_adapter`` of vLLM's adapter manager is wrapped in the whole process.
    Further calls do nothing. Managers that use other punica wrappers are not affected.
    """
    manager = importlib.import_module("vllm.lora.model_manager").LoRAModelManager
    wrap(manager, "activate_adapter", _activate)


def _activate(inner: Any, manager: Any, lora_id: int, *args: Any, **kwargs: Any) -> bool:
    moved = inner(manager, lora_id, *args, **kwargs)
    if moved:
        slot = manager.lora_index_to_id.index(lora_id)
        for wrapper in set(manager.punica_wrapper_mapping.values()):
            if isinstance(wrapper, Updates):
                wrapper.slot_changed(slot)
    return moved


def _scales(scale: float, stack: Stack) -> Tensor | None:
    return None if scale == 1 else torch.full_like(stack.ranks, scale, dtype=torch.float32)


def _add(y: Tensor, x: Tensor, a: Stack, b: Tensor, scale: float, rows: OwnedRows) -> None:
    """Compute ``y += scale * b (a x)`` with the stack ``b (slots, 1, O, R)``.

    If dtypes differ, the update is rounded to the dtype of the stacks, and the sum to the dtype
    of ``y``.
    """
    if a.idle():
        return
    b = b.flatten(0, 1)
    if y.shape[1] != b.shape[1]:  # vLLM pads the vocabulary in only one of y and b.
        width = min(y.shape[1], b.shape[1])
        y, b = y[:, :width], b[:, :width]
    rest = (a.bank, b, rows.ids, _scales(scale, a), a.ranks, None, rows.plan)
    if x.dtype == y.dtype == b.dtype:
        ops.lora_apply_(y, x, *rest)
    else:
        y += _exact(ops.lora_apply(x.to(b.dtype), *rest), rows)


def _exact(update: Tensor, rows: OwnedRows) -> Tensor:
    """Set the rows of the base model to -0.0, which does not change any number when added."""
    return update.masked_fill_((rows.ids < 0)[:, None], -0.0)
