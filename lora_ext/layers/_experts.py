"""Routed experts: products of the tokens of a mixture with the experts that they are routed to.

Letters: ``T`` tokens, ``k`` experts per token, ``P = T * k`` pairs of a token and an expert, ``E``
experts, ``H`` hidden and ``M`` intermediate features.

transformers keeps the experts of a layer in one module, whose matrices are parameters of three
dimensions: ``gate_up_proj (E, 2M, H)``, or ``up_proj (E, M, H)`` without a gate, and ``down_proj
(E, H, M)``; with ``is_transposed`` the last two dimensions are exchanged. Flags of the module
describe the rest, and its ``_apply_gate`` is computed between the two products.
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
from lora_ext.rows import constant, scales

from ._lora_forward import LoraFactors
from .base._dense import is_plain

#: Attributes of every experts module of transformers 5.
_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


class Routing(NamedTuple):
    """Pairs of token and expert in a batch, in the order in which they are multiplied."""

    order: Tensor  # (P,) int64, the pair at each place; pair p is token p // k
    token: Tensor  # (P,) int64
    expert: Tensor  # (P,) int64
    ends: Tensor | None  # (E,) int32, the end of each expert's pairs; None if not sorted by expert
    autocast: bool  # True if transformers' products follow autocast; its grouped one does not


#: Function that adds the updates of adapters to one product. Arguments: the parameter's name, the
#: product ``(P, O)``, which may be changed in place, its input ``(P, I)``, and the routing.
Update = Callable[[str, Tensor, Tensor, Routing], Tensor]


def projections(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the in and out features of a module's expert matrices, by the parameter's name.

    The result is empty if ``module`` is not an experts module of transformers.
    """
    if not all(hasattr(module, flag) for flag in _FLAGS):
        return {}
    known = (up_name(module), "down_proj")
    found: dict[str, tuple[int, int]] = {}
    for name, parameter in module.named_parameters(recurse=False):
        plain = type(parameter) is nn.Parameter  # neither quantised nor distributed
        if name in known and plain and parameter.dim() == 3 and parameter.dtype in FLOATS:
            _, out, inner = parameter.shape
            found[name] = (out, inner) if module.is_transposed else (inner, out)
    return found


def obstacle_of(experts: nn.Module) -> str | None:
    """Return the reason why :func:`experts_forward` may not replace a module's forward, or None."""
    if getattr(experts, "_is_expert_parallel", False):
        return "expert parallelism"
    if not is_plain(experts):
        return "hooks, or a replaced forward, as with accelerate's offloading"
    return None


def up_name(experts: Any) -> str:
    """Return the name of the first product's parameter."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def route(top_k_index: Tensor, num_experts: int, how: str | None = None) -> Routing:
    """Return the pairs of ``top_k_index (T, k)`` in the order of transformers' implementation.

    The bits of a product depend on this order. The pairs are computed on the device of
    ``top_k_index``, without synchronisation.

    Args:
        top_k_index: the experts of each token.
        num_experts: ``E``.
        how: "eager", which takes the first choice of all tokens before the second; "batched_mm",
            which sorts nothing; any other value is treated as "grouped_mm".
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
    """Compute an experts module of transformers with adapters on its matrices, ``(T, H)``.

    ``y[t] = sum over j of top_k_weights[t, j] * down_e(gate(up_e(x[t])))``, ``e = top_k_index[t,
    j]``, with ``update`` added to the results of ``up_e`` and ``down_e``. On the CPU, rows without
    an update equal those of the module's own forward bit for bit.

    Args:
        experts: an experts module, whose gate, biases and norm are used. Its
            ``experts_implementation`` determines how the products are computed.
        x: ``(T, H)``.
        top_k_index: ``(T, k)`` integers in ``[0, E)``.
        top_k_weights: ``(T, k)``.
        update: called once for each of the two products.

    Raises:
        NotImplementedError: If :func:`obstacle_of` finds a reason.
    """
    module: Any = experts
    obstacle = obstacle_of(experts)
    if obstacle is not None:
        where, expected = type(experts).__name__, "experts whose rows can have adapters"
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
    """Return ``weight[e] @ x[p] + bias[e]`` of every pair p, in the order of ``routing``."""
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
    """Slots of all pairs: adapter ``s`` of expert ``e`` is slot ``s * E + e``."""

    ids: Tensor  # (P,) int32, -1 for rows without an adapter
    plan: Tensor  # ops.lora_plan of the ids


def slots_of(routing: Routing, rows: Tensor | None, num_adapters: int, num_experts: int) -> Slots:
    """Compute the slots of all pairs on the device.

    ``rows (T,)`` int32 is the adapter of each row in ``[-1, num_adapters)``; with None all rows
    have the first adapter.
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
    """Return ``y[p] + scaling * B[s, e] A[s, e] x[p]``, computed in the dtype of the adapters.

    The sum is rounded once. It is differentiable once in ``x`` and the factors, by the kernels of
    ``ops.lora_linear``.

    Args:
        y: ``(P, O)``, changed in place.
        x: ``(P, I)``.
        adapters: factors in PEFT's layout: ``a (E * r, I)``, whose rows are ordered by expert, and
            ``b (O, r * E)``, whose columns are ordered by rank.
        slots: :func:`slots_of` these adapters.
        num_experts: ``E``.
    """
    dtype = functools.reduce(torch.promote_types, (f.a.dtype for f in adapters))
    all_ranks = [f.a.shape[0] // num_experts for f in adapters]
    scale = scales([f.scaling for f in adapters], x.device)
    if scale is not None and dtype == torch.float64:  # the op keeps scales in float32
        adapters, scale = [f._replace(b=f.b * f.scaling) for f in adapters], None
    ranks = None
    if min(all_ranks) < max(all_ranks):
        ranks = constant(all_ranks, torch.int32, x.device).repeat_interleave(num_experts)
    if scale is not None:
        scale = scale.repeat_interleave(num_experts)
    a, b = (t.to(dtype) for t in _bank(adapters, all_ranks, num_experts))
    rows = slots.ids, scale, ranks
    with exactly(x.device):  # PEFT ignores autocast here too
        return y.add_(ops.lora_linear(x.to(dtype), None, None, a, b, *rows, plan=slots.plan))


def _bank(
    adapters: Sequence[LoraFactors], ranks: Sequence[int], num_experts: int
) -> tuple[Tensor, Tensor]:
    """Return ``(A * E, R, I)`` and ``(A * E, O, R)``, padded with zeros beyond each rank."""
    pairs = list(zip(adapters, ranks, strict=True))
    a = [f.a.reshape(num_experts, r, -1) for f, r in pairs]
    b = [f.b.reshape(-1, r, num_experts).permute(2, 0, 1) for f, r in pairs]
    if len(adapters) == 1:
        return a[0], b[0].contiguous()
    rank = max(ranks)
    a = torch.cat([pad(t, (0, 0, 0, rank - t.shape[1])) for t in a])
    return a, torch.cat([pad(t, (0, rank - t.shape[2])) for t in b])
