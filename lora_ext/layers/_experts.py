"""Products of a mixture-of-experts layer, which routes each token to some of its experts.

Shape letters: ``T`` tokens, ``k`` experts per token, ``P = T * k`` pairs of a token and an expert,
``E`` experts, ``H`` hidden and ``M`` intermediate features, ``I`` input and ``O`` output features
of one product, ``A`` adapters, ``R`` largest rank.

transformers stores the experts of a layer in one module. Its parameters are
``gate_up_proj (E, 2M, H)``, or ``up_proj (E, M, H)`` without a gate, and ``down_proj (E, H, M)``.
If ``is_transposed`` is True, the last two dimensions are exchanged. The other flags state whether
the module has a gate, biases and a norm. Its method ``_apply_gate`` is called between the two
products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lora_ext import ops
from lora_ext._checks import FLOATS
from lora_ext._torch import exactly
from lora_ext.ops import grouped_mm
from lora_ext.rows import _rows

from ._lora_forward import LoraFactors
from .base._dense import is_plain

#: Attributes of every experts module of transformers 5.
_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


class Routing(NamedTuple):
    """Pairs of a token and an expert in a batch, in the order of the rows of the products."""

    order: Tensor  # (P,) int64, indices p of the pairs in this order; pair p has the token p // k
    token: Tensor  # (P,) int64, token of each pair
    expert: Tensor  # (P,) int64, expert of each pair
    ends: Tensor | None  # (E,) int32, end of each expert's pairs; None if not sorted by expert
    autocast: bool  # False for transformers' grouped product, which ignores autocast


#: Function that adds the updates of adapters to one product and returns the sum. Its arguments are
#: the name of the parameter; the product ``(P, O)``, which it may change in place; the input
#: ``(P, I)`` of the product; and the routing.
Update = Callable[[str, Tensor, Tensor, Routing], Tensor]


def projections(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the input and output features of a module's expert matrices, by parameter name.

    The result is empty if ``module`` is not an experts module of transformers.
    """
    if not all(hasattr(module, flag) for flag in _FLAGS):
        return {}
    known = (up_name(module), "down_proj")
    found: dict[str, tuple[int, int]] = {}
    for name, parameter in module.named_parameters(recurse=False):
        plain = type(parameter) is nn.Parameter  # not a quantised or distributed type
        if name in known and plain and parameter.dim() == 3 and parameter.dtype in FLOATS:
            _, out, inner = parameter.shape
            found[name] = (out, inner) if module.is_transposed else (inner, out)
    return found


def obstacle_of(experts: nn.Module) -> str | None:
    """Return why :func:`experts_forward` cannot replace a module's forward; None if it can."""
    if getattr(experts, "_is_expert_parallel", False):
        return "expert parallelism"
    if not is_plain(experts):
        return "hooks, or a replaced forward, as with accelerate's offloading"
    return None


def up_name(experts: Any) -> str:
    """Return the name of the weight in the first matrix product of an experts module."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def route(top_k_index: Tensor, num_experts: int, how: str | None = None) -> Routing:
    """Return the pairs of token and expert in the order of transformers' implementation ``how``.

    The order affects the rounding of the results. The pairs are computed on the device of
    ``top_k_index``, and the host does not wait for them.

    Args:
        top_k_index: experts of each token, ``(T, k)``.
        num_experts: number of experts, ``E``.
        how: name of the implementation. "eager" sorts by expert, and for each expert the first
            choices of all tokens precede the second choices; "batched_mm" does not sort; any other
            value is treated as "grouped_mm", which sorts by expert.
    """
    tokens, choices = top_k_index.shape
    if how == "eager":
        expert, at = top_k_index.t().reshape(-1).sort(stable=True)
        token = at % tokens
        order = token * choices + at // tokens
    else:
        expert = top_k_index.reshape(-1)
        if how == "batched_mm":
            order = torch.arange(len(expert), device=expert.device)
        else:
            expert, order = expert.sort()
        token = order // choices
    if how == "batched_mm":
        return Routing(order, token, expert, None, autocast=True)
    all_experts = torch.arange(num_experts, dtype=expert.dtype, device=expert.device)
    ends = torch.searchsorted(expert, all_experts, right=True, out_int32=True)
    return Routing(order, token, expert, ends, autocast=how == "eager")


def experts_forward(
    experts: nn.Module, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, update: Update
) -> Tensor:
    """Return the output ``(T, H)`` of transformers' experts with adapters on their matrices.

    ``y[t] = sum over j of top_k_weights[t, j] * down_e(gate(up_e(x[t])))`` with
    ``e = top_k_index[t, j]``. ``update`` adds the updates of adapters to the results of ``up_e``
    and ``down_e``. On the CPU, rows without an update equal the output of the module's own forward
    bit for bit.

    Args:
        experts: experts module of transformers. The ``experts_implementation`` in its configuration
            determines how the products are computed.
        x: hidden states ``(T, H)``.
        top_k_index: experts of each token: integers ``(T, k)`` in ``[0, E)``.
        top_k_weights: weights of these experts, ``(T, k)``.
        update: function that adds the updates to a product; it is called once per product.

    Raises:
        NotImplementedError: If :func:`obstacle_of` returns a reason.
    """
    module: Any = experts
    obstacle = obstacle_of(experts)
    if obstacle is not None:
        where, expected = type(experts).__name__, "experts that support an adapter per row"
        raise NotImplementedError(f"{where}: expected {expected}, found {obstacle}")
    how = getattr(module.config, "_experts_implementation", None)
    routing = route(top_k_index, module.num_experts, how)
    rows = x[routing.token]  # (P, H)
    up = up_name(module)
    y = update(up, routed_linear(rows, module, up, routing), rows, routing)  # (P, 2M)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)  # (P, M)
    y = update("down_proj", routed_linear(y, module, "down_proj", routing), y, routing)  # (P, H)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[routing.order].unsqueeze(-1)
    if how == "eager" and x.device.type == "cpu":
        return torch.zeros_like(x).index_add(0, routing.token, y.to(x.dtype))
    place = torch.empty_like(routing.order)
    place[routing.order] = torch.arange(len(place), device=place.device)
    return y[place].view(*top_k_index.shape, y.shape[-1]).sum(1).to(x.dtype)


def routed_linear(x: Tensor, experts: Any, name: str, routing: Routing) -> Tensor:
    """Return ``weight[e] @ x[p] + bias[e]`` for every pair p, where e is the expert of the pair."""
    weight: Tensor = getattr(experts, name)
    x = x.to(weight.dtype)
    if routing.ends is not None:
        with nullcontext() if routing.autocast else exactly(x.device):
            y = grouped_mm(x, weight if experts.is_transposed else weight.mT, routing.ends)
    elif experts.is_transposed:
        y = torch.bmm(x.unsqueeze(1), weight[routing.expert]).squeeze(1)
    else:
        y = torch.bmm(weight[routing.expert], x.unsqueeze(2)).squeeze(2)
    if experts.has_bias:
        y = y + getattr(experts, f"{name}_bias")[routing.expert]
    return y


class Slots(NamedTuple):
    """Slot of each pair of token and expert: the index of its factors among the stacked factors.

    Adapter ``s`` for expert ``e`` is slot ``s * E + e``.
    """

    ids: Tensor  # (P,) int32, -1 for pairs without an adapter
    plan: Tensor  # result of ops.lora_plan for the ids


def slots_of(routing: Routing, rows: Tensor | None, num_adapters: int, num_experts: int) -> Slots:
    """Return the slot of each pair of token and expert, computed on the device.

    ``rows (T,)`` int32 contains the adapter of each token in ``[-1, num_adapters)``, or -1 for no
    adapter. If ``rows`` is None, all tokens use the first adapter.
    """
    if rows is None:
        ids = routing.expert.int()
    else:
        row = rows[routing.token].long()  # (P,)
        ids = torch.where(row < 0, -1, row * num_experts + routing.expert).int()
    return Slots(ids, ops.lora_plan(ids, num_adapters * num_experts))


def experts_update(
    y: Tensor, x: Tensor, adapters: Sequence[LoraFactors], slots: Slots, num_experts: int
) -> Tensor:
    """Return ``y[p] + scaling * B[s, e] A[s, e] x[p]`` for adapter s and expert e of each pair p.

    The update is computed in the dtype of the adapters, and the sum is rounded once. It is
    differentiable once in ``x`` and the factors, with the gradients of ``ops.lora_linear``.

    Args:
        y: product ``(P, O)``, changed in place.
        x: input of the product, ``(P, I)``.
        adapters: factors in PEFT's layout for rank r: ``a (E * r, I)`` with rows ordered by expert
            first, and ``b (O, r * E)`` with columns ordered by rank first.
        slots: result of :func:`slots_of` for these adapters.
        num_experts: number of experts, ``E``.
    """
    dtype = functools.reduce(torch.promote_types, (f.a.dtype for f in adapters))
    all_ranks = [f.a.shape[0] // num_experts for f in adapters]
    scale = _rows.scales([f.scaling for f in adapters], x.device)
    if scale is not None and dtype == torch.float64:  # the op would round the scales to float32
        adapters, scale = [f._replace(b=f.b * f.scaling) for f in adapters], None
    ranks = None
    if min(all_ranks) < max(all_ranks):
        ranks = _rows.constant(all_ranks, torch.int32, x.device).repeat_interleave(num_experts)
    if scale is not None:
        scale = scale.repeat_interleave(num_experts)
    a, b = (t.to(dtype) for t in _bank(adapters, all_ranks, num_experts))
    rows = slots.ids, scale, ranks
    with exactly(x.device):  # as in PEFT, which ignores autocast here
        return y.add_(ops.lora_linear(x.to(dtype), None, None, a, b, *rows, plan=slots.plan))


def _bank(
    adapters: Sequence[LoraFactors], ranks: Sequence[int], num_experts: int
) -> tuple[Tensor, Tensor]:
    """Return the stacked factors ``(A * E, R, I)`` and ``(A * E, O, R)``, zero-padded to rank R."""
    pairs = list(zip(adapters, ranks, strict=True))
    a = [f.a.reshape(num_experts, r, -1) for f, r in pairs]
    b = [f.b.reshape(-1, r, num_experts).permute(2, 0, 1) for f, r in pairs]
    if len(adapters) == 1:
        return a[0], b[0].contiguous()
    rank = max(ranks)
    a = torch.cat([pad(t, (0, 0, 0, rank - t.shape[1])) for t in a])
    return a, torch.cat([pad(t, (0, rank - t.shape[2])) for t in b])
