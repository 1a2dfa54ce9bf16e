"""What the dispatcher cannot learn from C++: fake kernels and the backward of each op.

``register`` runs once for the shipped library, and in tests once more for the emulated one.
"""

import functools
from typing import Any

import torch
from torch import Tensor


def _plan_size(rows: int, adapters: int) -> int:
    """``LoraPlanLayout::size()`` of ``lora_ext/lora.h``; a symbolic ``rows`` is guarded."""
    chunk = 16 if rows <= 256 else 64 if rows < 4096 else 128
    return 8 + 4 * (rows // chunk + min(rows, adapters)) + rows + adapters + 2


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _same_device(name: str, first: Tensor, *others: object) -> None:
    """Where meta tensors are mixed with others, torch runs the fake, which computes nothing."""
    for other in others:
        if isinstance(other, Tensor) and other.device != first.device:
            raise ValueError(
                f"{name}: expected all tensors on one device, found {first.device} "
                f"and {other.device}"
            )


def _fake_plan(adapter_ids: Tensor, num_adapters: int, num_valid: Tensor | None = None) -> Tensor:
    return adapter_ids.new_empty(_plan_size(adapter_ids.shape[0], num_adapters), dtype=torch.int32)


def _fake_segment_ids(seg_indptr: Tensor, seg_adapter: Tensor, num_tokens: int) -> Tensor:
    return seg_adapter.new_empty(num_tokens)


def _fake_shrink(
    x: Tensor,
    a: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
    page_table: Tensor | None = None,
    plan: Tensor | None = None,
) -> Tensor:
    _same_device("lora_shrink", x, a, adapter_ids, scale, ranks, page_table, plan)
    rank = a.shape[1] if page_table is None else 8 * page_table.shape[1]
    return x.new_empty(x.shape[0], rank, dtype=_accumulator(x.dtype))


def _fake_apply(x: Tensor, a: Tensor, b: Tensor, *args: object, **kwargs: object) -> Tensor:
    _same_device("lora_apply", x, a, b, *args, *kwargs.values())
    return x.new_empty(x.shape[0], b.shape[1])


def _fake_in_place(name: str, y: Tensor, *args: object, **kwargs: object) -> None:
    _same_device(name, y, *args, *kwargs.values())


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _per_adapter(left: Tensor, right: Tensor, adapter_ids: Tensor, adapters: int) -> Tensor:
    """``out[s] = sum of left[t]^T right[t]`` over the rows of adapter ``s``.

    Masked on both sides, so that a NaN in a row reaches its own adapter alone.
    """
    out = left.new_zeros(adapters, left.shape[1], right.shape[1])
    for s in range(adapters):
        own = (adapter_ids == s)[:, None]
        out[s] = torch.where(own, left, 0).T @ torch.where(own, right, 0)
    return out


def _apply_backward(library: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """``dv = scale * b^T dy``, ``dx = a^T dv``, and per adapter ``da = dv^T x``, ``db = dy^T v``.

    dx is the op itself with the factors exchanged. da and db visit every row once per adapter; one
    pass over the rows for all adapters is the business of training.
    """
    x, a, b, adapter_ids, scale, ranks, page_table, plan = ctx.saved_tensors
    if page_table is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
        raise NotImplementedError("lora_apply: pages receive no gradient; train a bank instead")
    if any(ctx.needs_input_grad[3:]):
        raise NotImplementedError("lora_apply: scale receives no gradient")
    tail = (adapter_ids, scale, ranks, page_table, plan)
    a_t, b_t = (t.transpose(1, 2).contiguous() for t in (a, b))
    dx = da = db = None
    if ctx.needs_input_grad[0]:
        dx = library.lora_apply(dy, b_t, a_t, *tail)
    if ctx.needs_input_grad[1]:
        dv = library.lora_shrink(dy, b_t, *tail)
        da = _per_adapter(dv, x.to(dv.dtype), adapter_ids, a.shape[0]).to(a.dtype)
    if ctx.needs_input_grad[2]:
        v = library.lora_shrink(x, a, *tail)
        db = _per_adapter(dy.to(v.dtype), v, adapter_ids, b.shape[0]).to(b.dtype)
    return dx, da, db, None, None, None, None, None


def register(library: str) -> None:
    """Register fake kernels and backwards for the ops of ``torch.ops.<library>``."""
    fakes = {
        "lora_plan": _fake_plan,
        "lora_segment_ids": _fake_segment_ids,
        "lora_shrink": _fake_shrink,
        "lora_expand_": functools.partial(_fake_in_place, "lora_expand_"),
        "lora_apply": _fake_apply,
        "lora_apply_": functools.partial(_fake_in_place, "lora_apply_"),
    }
    # torch annotates neither of the two in full.
    for name, fake in fakes.items():
        torch.library.register_fake(f"{library}::{name}", fake)  # pyright: ignore[reportUnknownMemberType]
    torch.library.register_autograd(  # pyright: ignore[reportUnknownMemberType]
        f"{library}::lora_apply",
        functools.partial(_apply_backward, getattr(torch.ops, library)),
        setup_context=_save,
    )
