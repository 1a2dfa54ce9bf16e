"""What the dispatcher cannot learn from C++: fake kernels and the backward of each op.

``register`` runs once for the shipped library, and in tests once more for the emulated one.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from lora_ext import reference


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


def _fake_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor, *args: object
) -> tuple[Tensor, Tensor]:
    _same_device("lora_linear", x, weight, bias, a, b, *args)
    y = x.new_empty(x.shape[0], b.shape[1])
    return y, x.new_empty(x.shape[0], a.shape[1], dtype=_accumulator(x.dtype))


def _fake_linear_backward(
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _same_device("lora_linear_backward", dy, x, v, weight, a, b, *args)
    dx, da, db = (
        t.new_empty(t.shape if need else 0) for t, need in zip((x, a, b), args[-3:], strict=True)
    )
    return dx, da, db


def _fake_dropout(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    _same_device("lora_dropout", x, seed)
    return x.new_empty(x.shape)


def _fake_circuit_leaf(leaf: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    _same_device("circuit_leaf", leaf, x)
    e = leaf.new_empty(leaf.shape[:3], dtype=_accumulator(leaf.dtype))
    return e, e.new_empty(2, *e.shape)


def _fake_circuit_leaf_backward(de: Tensor, leaf: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    _same_device("circuit_leaf_backward", leaf, de, x, norm)
    return leaf.new_empty(leaf.shape)


def _fake_emission_gather(h: Tensor, emit: Tensor, x: Tensor) -> Tensor:
    _same_device("emission_gather", h, emit, x)
    return h.new_empty(h.shape[0], *emit.shape[:2], dtype=_accumulator(h.dtype))


def _fake_emission_gather_backward(
    de: Tensor, h: Tensor, emit: Tensor, x: Tensor, need_h: bool, need_emit: bool
) -> tuple[Tensor, Tensor]:
    _same_device("emission_gather_backward", h, de, emit, x)
    dh, demit = (
        t.new_empty(t.shape if need else 0) for t, need in ((h, need_h), (emit, need_emit))
    )
    return dh, demit


def _fake_circuit_scan(
    kind: str,
    e: Tensor,
    prior: Tensor | None = None,
    trans: Tensor | None = None,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _same_device("circuit_scan", e, prior, trans)
    rows, n_token, components = e.shape
    tree = kind == "btree" and n_token > 2
    slots = 3 * (n_token - 2) if tree else n_token
    return (
        e.new_empty(rows, n_token),
        e.new_empty(rows, n_token),
        e.new_empty(e.shape),
        e.new_empty((rows, slots, components) if save else (0,)),
    )


def _fake_circuit_scan_backward(
    dprefix: Tensor | None,
    dconditional: Tensor | None,
    kind: str,
    e: Tensor,
    prior: Tensor | None,
    trans: Tensor | None,
    states: Tensor,
    need_prior: bool,
    need_trans: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _same_device("circuit_scan_backward", e, dprefix, dconditional, prior, trans, states)
    dprior, dtrans = (
        t.new_empty(t.shape) if need and t is not None else e.new_empty(0)
        for t, need in ((prior, need_prior), (trans, need_trans))
    )
    return e.new_empty(e.shape), dprior, dtrans


def _fake_conditional_dist(kind: str, leaf: Tensor, *args: object) -> Tensor:
    _same_device("circuit_conditional_dist", leaf, *args)
    return leaf.new_empty(leaf.shape[0], leaf.shape[3], dtype=_accumulator(leaf.dtype))


def _fake_sample(kind: str, leaf: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    _same_device("circuit_sample", leaf, *args)
    shape, dtype = leaf.shape, _accumulator(leaf.dtype)
    tokens = leaf.new_empty(shape[:2], dtype=torch.long)
    return tokens, leaf.new_empty(shape[:2], dtype=dtype), leaf.new_empty(shape[:3], dtype=dtype)


def _fake_argmax(kind: str, leaf: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    _same_device("circuit_argmax", leaf, *args)
    value = leaf.new_empty(leaf.shape[0], dtype=_accumulator(leaf.dtype))
    return leaf.new_empty(leaf.shape[:2], dtype=torch.long), value


def _fake_verify(target: Tensor, tokens: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    _same_device("spec_verify", target, tokens, *args)
    return tokens.new_empty(tokens.shape[0]), tokens.new_empty(tokens.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _apply_backward(library: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The backward of ``lora_linear`` without a base; pages hand back dx alone.

    For pages ``dx = a^T dv`` is the op itself with the factors exchanged.
    """
    x, a, b, adapter_ids, scale, ranks, page_table, plan = ctx.saved_tensors
    need_dx, need_da, need_db = ctx.needs_input_grad[:3]
    if any(ctx.needs_input_grad[3:]):
        raise NotImplementedError("lora_apply: scale receives no gradient")
    if page_table is not None:
        if need_da or need_db:
            raise NotImplementedError("lora_apply: pages receive no gradient; train a bank instead")
        a_t, b_t = (t.transpose(1, 2).contiguous() for t in (a, b))
        dx = library.lora_apply(dy, b_t, a_t, adapter_ids, scale, ranks, page_table, plan)
        return dx, *(None,) * 7
    if plan is None:
        plan = library.lora_plan(adapter_ids, a.shape[0])
    if need_db:
        v = library.lora_shrink(x, a, adapter_ids, scale, ranks, None, plan)
    else:
        v = x.new_empty(x.shape[0], a.shape[1], dtype=_accumulator(x.dtype))
    grads = library.lora_linear_backward(
        dy, x, v, None, a, b, adapter_ids, scale, ranks, plan, 0.0, None, need_dx, need_da, need_db
    )
    needs = (need_dx, need_da, need_db)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 5


def _fake_log_weights(w: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    weight = w.new_empty(w.shape, dtype=_accumulator(w.dtype))
    return weight, weight.new_empty(w.shape[:-1])


def _fake_log_sum(
    w: Tensor, values: Tensor, norm: str, precision: str, *scaled: Tensor | None
) -> Tensor:
    _same_device("log_einsum_exp", w, values, *scaled)
    return values.new_empty(*values.shape[:-1], w.shape[-2])


def _fake_log_sum_backward(
    dout: Tensor,
    w: Tensor,
    values: Tensor,
    out: Tensor,
    norm: str,
    need_dw: bool,
    need_dvalues: bool,
    *scaled: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _same_device("log_einsum_exp_backward", dout, w, values, out, *scaled)
    dw = w.new_empty(w.shape if need_dw else 0)
    return dw, values.new_empty(values.shape if need_dvalues else 0)


def _fake_log_max(w: Tensor, values: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    _same_device("log_einsum_max", w, values)
    out = values.new_empty(*values.shape[:-1], w.shape[-2])
    return out, out.new_empty(out.shape, dtype=torch.int32)


def _save_log_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    w, values, ctx.norm, _, *scaled = inputs
    ctx.save_for_backward(w, values, output, *scaled)


def _log_sum_backward(library: Any, ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    w, values, out, *scaled = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    grads = library.log_einsum_exp_backward(dout, w, values, out, ctx.norm, *needs, *scaled)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 4


def _save_log_sum_backward(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    dout, w, values, _, ctx.norm, *_ = inputs
    ctx.save_for_backward(dout, w, values)
    ctx.set_materialize_grads(False)


def _log_sum_double_backward(
    ctx: Any, ddw: Tensor | None, ddvalues: Tensor | None
) -> tuple[Tensor | None, ...]:
    """By the formula itself, which torch can differentiate: all terms at once, and rarely."""
    again = torch.is_grad_enabled()  # a third derivative is wanted
    with torch.enable_grad():
        # Views: what dout is a function of does not count here.
        leaves = [
            t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in ctx.saved_tensors
        ]
        dout, w, values = leaves
        out = reference.log_einsum_exp(w, values, ctx.norm)
        first = torch.autograd.grad(out, (w, values), dout, create_graph=True)
        pairs = [
            (g, d)
            for g, d in zip(first, (ddw, ddvalues), strict=True)
            if d is not None and d.numel()
        ]
        grads = torch.autograd.grad(
            [g for g, _ in pairs],
            leaves,
            [d for _, d in pairs],
            create_graph=again,
            allow_unused=True,
        )
    # `out` is a function of w and values, and its share is in theirs.
    return *grads, *(None,) * 6


def register(library: str) -> None:
    """Register fake kernels and backwards for the ops of ``torch.ops.<library>``."""
    fakes = {
        "lora_plan": _fake_plan,
        "lora_segment_ids": _fake_segment_ids,
        "lora_shrink": _fake_shrink,
        "lora_expand_": functools.partial(_fake_in_place, "lora_expand_"),
        "lora_apply": _fake_apply,
        "lora_apply_": functools.partial(_fake_in_place, "lora_apply_"),
        "lora_linear_forward": _fake_linear,
        "lora_linear_backward": _fake_linear_backward,
        "lora_dropout": _fake_dropout,
        "circuit_leaf": _fake_circuit_leaf,
        "circuit_leaf_backward": _fake_circuit_leaf_backward,
        "emission_gather": _fake_emission_gather,
        "emission_gather_backward": _fake_emission_gather_backward,
        "circuit_scan": _fake_circuit_scan,
        "circuit_scan_backward": _fake_circuit_scan_backward,
        "circuit_conditional_dist": _fake_conditional_dist,
        "circuit_sample": _fake_sample,
        "circuit_argmax": _fake_argmax,
        "spec_verify": _fake_verify,
        "log_einsum_weights": _fake_log_weights,
        "log_einsum_exp": _fake_log_sum,
        "log_einsum_exp_backward": _fake_log_sum_backward,
        "log_einsum_max": _fake_log_max,
    }
    # torch annotates neither of the two in full.
    for name, fake in fakes.items():
        torch.library.register_fake(f"{library}::{name}", fake)  # pyright: ignore[reportUnknownMemberType]
    backwards = {
        "lora_apply": (_apply_backward, _save),
        "log_einsum_exp": (_log_sum_backward, _save_log_sum),
    }
    for name, (backward, save) in backwards.items():
        torch.library.register_autograd(  # pyright: ignore[reportUnknownMemberType]
            f"{library}::{name}",
            functools.partial(backward, getattr(torch.ops, library)),
            setup_context=save,
        )
    torch.library.register_autograd(  # pyright: ignore[reportUnknownMemberType]
        f"{library}::log_einsum_exp_backward",
        _log_sum_double_backward,
        setup_context=_save_log_sum_backward,
    )
