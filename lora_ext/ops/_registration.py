"""What the dispatcher cannot learn from C++: fake kernels and the backward of each op.

``register`` runs once for the shipped library, and in tests once more for the emulated one.
"""

from typing import Any

import torch
from torch import Tensor

from lora_ext import reference


def _plan_size(rows: Any, adapters: int) -> Any:
    # LoraPlanLayout::size() in lora_ext/lora.h. Written with torch.sym_ite so that `rows` may be
    # symbolic.
    chunk = torch.sym_ite(rows <= 256, 16, torch.sym_ite(rows < 4096, 64, 128))
    chunks = rows // chunk + torch.sym_min(rows, adapters)
    return 8 + 4 * chunks + rows + adapters + 2


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    rank = a.shape[1] if page_table is None else 8 * page_table.shape[1]
    return x.new_empty(x.shape[0], rank, dtype=_accumulator(x.dtype))


def _fake_apply(x: Tensor, a: Tensor, b: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return x.new_empty(x.shape[0], b.shape[1])


def _fake_in_place(*_args: object, **_kwargs: object) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, a, b, adapter_ids, scale, ranks, page_table, _plan = inputs
    ctx.save_for_backward(x, a, b, adapter_ids, scale, ranks, page_table)


def _apply_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The gradient of the reference formula; a fused backward is the business of training.
    x, a, b, *rest = ctx.saved_tensors
    needed = [i for i in range(3) if ctx.needs_input_grad[i]]
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate((x, a, b))]
        y = reference.lora_apply(*leaves, *rest)
        grads = torch.autograd.grad(y, [leaves[i] for i in needed], grad)
    out: list[Tensor | None] = [None] * 8
    for i, g in zip(needed, grads, strict=True):
        out[i] = g
    return tuple(out)


def register(library: str) -> None:
    """Register fake kernels and backwards for the ops of ``torch.ops.<library>``."""
    fakes = {
        "lora_plan": _fake_plan,
        "lora_segment_ids": _fake_segment_ids,
        "lora_shrink": _fake_shrink,
        "lora_expand_": _fake_in_place,
        "lora_apply": _fake_apply,
        "lora_apply_": _fake_in_place,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{library}::{name}", fake)
    torch.library.register_autograd(f"{library}::lora_apply", _apply_backward, setup_context=_save)
