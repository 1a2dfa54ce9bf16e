"""Runs the layered form: upward, backward and from a root down along one tree, in one op each.

Only the reduced precisions of a GPU go up stage by stage.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from lora_ext import ops
from lora_ext.circuits.layered import FIRST_LEAF, ONE, ZERO, Layered, ProductLayer, Stage
from lora_ext.ops import Program


class _Columns:
    """Columns of ``val``, given by index; they are read as a view where they are consecutive."""

    def __init__(self, index: Tensor):
        self.index = index.long()
        self.first = int(index[0]) if len(index) else 0
        self.consecutive = bool((index == torch.arange(len(index)) + self.first).all())

    def gather(self, val: Tensor) -> Tensor:
        if self.consecutive:
            return val[:, self.first : self.first + len(self.index)]
        return val.index_select(1, self.index)

    def to(self, device: torch.device) -> None:
        self.index = self.index.to(device)


class _Products:
    """The factors of a product layer: the first of all products, the second, and so on.

    Products with fewer factors than the longest are filled up with the unit that is always 1.
    """

    def __init__(self, layer: ProductLayer):
        ptr = layer.child_ptr.long()
        count = ptr[1:] - ptr[:-1]
        arity = int(count.max()) if len(count) else 0
        at = ptr[:-1, None] + torch.arange(arity)
        inside = torch.arange(arity) < count[:, None]
        index = layer.child_idx.long()[torch.where(inside, at, 0)] if arity else at
        self.factors = torch.where(inside, index, ONE).T.contiguous()  # (arity, P)
        self.kron = layer.kron
        if self.kron is None:
            self.columns = [_Columns(f) for f in self.factors]
        else:
            pairs = self.factors.view(2, -1, *self.kron)
            self.columns = [_Columns(pairs[0, :, :, 0].flatten())]
            self.columns += [_Columns(pairs[1, :, 0].flatten())]

    def up(self, val: Tensor) -> Tensor:
        parts = [c.gather(val) for c in self.columns]
        if self.kron is None:
            return sum(parts[1:], start=parts[0])
        n, m = self.kron
        left, right = parts[0].unflatten(1, (-1, n, 1)), parts[1].unflatten(1, (-1, 1, m))
        return (left + right).flatten(1)

    def to(self, device: torch.device) -> None:
        self.factors = self.factors.to(device)
        for c in self.columns:
            c.to(device)


class _Weights:
    """The weights of a stage as ``(G, O, I)``, a view of the parameters where they lie in order."""

    def __init__(self, stage: Stage):
        s = stage.sum
        rows = torch.arange(s.block_m)[:, None] * s.w_stride.long()[:, None, None]
        index = s.w_off.long()[:, None, None] + rows + torch.arange(s.block_k)  # (tiles, m, k)
        index[s.w_off < 0] = -1
        groups, down = len(stage.regions), stage.units // s.block_m
        index = index.view(groups, down, -1, s.block_m, s.block_k).transpose(2, 3)
        index = index.reshape(groups, stage.units, stage.width)
        self.first = int(index[0, 0, 0])
        self.shared = False  # whether another stage views the same weights
        self.shape = tuple(index.shape)
        self.key = (self.first, *self.shape)
        numel = index.numel()
        self.index: Tensor | None = index
        self.missing: Tensor | None = None
        if bool((index.flatten() == torch.arange(numel) + self.first).all()):
            self.index = None
        elif bool((index < 0).any()):
            self.missing = index < 0
            self.index = index.clamp(min=0)

    def gather(self, flat: Tensor) -> Tensor:
        if self.index is None:
            numel = self.shape[0] * self.shape[1] * self.shape[2]
            return flat[self.first : self.first + numel].view(self.shape)
        w = flat[self.index]
        return w if self.missing is None else w.masked_fill(self.missing, -torch.inf)

    def to(self, device: torch.device) -> None:
        self.index = None if self.index is None else self.index.to(device)
        self.missing = None if self.missing is None else self.missing.to(device)


class Weights:
    """The weights of one evaluation, which scales a matrix once for all stages that share it."""

    def __init__(self, flat: Tensor, norm: str, precision: str = "fp32"):
        self.flat, self.norm, self.precision = flat, norm, precision
        self._shared: dict[tuple[int, ...], ops.ScaledWeights] = {}

    def of(self, tiles: _Weights) -> tuple[Tensor, ops.ScaledWeights | None]:
        w = tiles.gather(self.flat)
        if not tiles.shared:
            return w, None
        if tiles.key not in self._shared:
            self._shared[tiles.key] = ops.log_einsum_weights(w, self.norm)
        return w, self._shared[tiles.key]


class StageRunner:
    """Runs one stage: the products of its children, and the sums of these products."""

    def __init__(self, stage: Stage):
        self.products, self.weights = _Products(stage.product), _Weights(stage)
        self.groups, self.units, self.width = len(stage.regions), stage.units, stage.width
        self.first = stage.sum.out_off
        self.span = slice(self.first, self.first + self.groups * self.units)

    def terms(self, val: Tensor) -> Tensor:
        """The products, ``(G, B, I)``."""
        return self.products.up(val).unflatten(1, (self.groups, self.width)).transpose(0, 1)

    def up(self, val: Tensor, weights: Weights) -> None:
        w, scaled = weights.of(self.weights)
        out = ops.log_einsum_exp(w, self.terms(val), weights.norm, "sum", weights.precision, scaled)
        val[:, self.span] = out.transpose(0, 1).flatten(1)

    def to(self, device: torch.device) -> None:
        self.products.to(device)
        self.weights.to(device)


class Execution:
    """The layered form with its index arrays on one device, ready to run."""

    def __init__(self, layered: Layered, program: Program, roots: list[int]):
        self.layered, self.program, self.roots = layered, program, roots
        self.num_leaves = len(layered.inputs.var)
        self.factors = _Products(layered.factors)
        self.factor_span = slice(
            FIRST_LEAF + self.num_leaves,
            FIRST_LEAF + self.num_leaves + len(layered.factors.child_ptr) - 1,
        )
        self.stages = [StageRunner(s) for s in layered.stages]
        views = [s.weights for s in self.stages if s.weights.index is None]
        places = Counter(w.key for w in views)
        for w in views:
            w.shared = places[w.key] > 1
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Move the index arrays, once per change of device."""
        if device == self.device:
            return
        self.program = self.program.to(device)
        for part in (self.factors, *self.stages):
            part.to(device)
        self.device = device

    def up(self, leaf: Tensor, weights: Weights, semiring: str = "sum") -> Tensor:
        """Values of all units, ``(B, U)``, from those of the leaves ``(B, N)``."""
        with torch._C._AutoDispatchBelowAutograd():  # Evaluate gives the gradient
            if semiring == "max" or weights.precision == "fp32":
                return ops.circuit_layers(leaf, weights.flat, self.program, weights.norm, semiring)
            return self._up_by_stages(leaf, weights)

    def _up_by_stages(self, leaf: Tensor, weights: Weights) -> Tensor:
        val = leaf.new_empty(leaf.shape[0], self.layered.num_units)
        val[:, ONE], val[:, ZERO] = 0, -torch.inf
        val[:, FIRST_LEAF : FIRST_LEAF + self.num_leaves] = leaf
        if self.factor_span.start < self.factor_span.stop:
            val[:, self.factor_span] = self.factors.up(val)
        for stage in self.stages:
            stage.up(val, weights)
        return val

    def down(
        self, droots: Tensor, val: Tensor, weights: Weights, need_weights: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of all units ``(B, U)``, of the leaves ``(B, N)`` and of the weights.

        ``droots (B, R)`` has those of the roots. What is not needed comes back empty.
        """
        with torch._C._AutoDispatchBelowAutograd():
            grad, dflat = ops.circuit_layers_backward(
                droots, val, weights.flat, self.program, weights.norm, need_weights
            )
        return grad, grad[:, FIRST_LEAF : FIRST_LEAF + self.num_leaves], dflat

    def root_values(self, val: Tensor) -> Tensor:
        """Those of the roots, ``(B, R)``, in memory of their own."""
        if len(self.roots) == 1:
            return val.narrow(1, self.roots[0], 1).clone()
        return val[:, self.roots]

    def walk(
        self, val: Tensor, weights: Weights, root: Tensor, uniforms: Tensor | None = None
    ) -> Tensor:
        """The leaf unit that each variable comes to, or -1, ``(M, n)``: ops.circuit_layers_walk."""
        with torch._C._AutoDispatchBelowAutograd():
            return ops.circuit_layers_walk(val, weights.flat, self.program, root, uniforms)


class Evaluate(torch.autograd.Function):
    """Takes leaves and weights to the roots; its backward computes flows."""

    @staticmethod
    def forward(
        ctx: Any, leaf: Tensor, flat: Tensor, execution: Execution, norm: str, precision: str
    ) -> Tensor:
        ctx.weights = Weights(flat.detach(), norm, precision)
        val = execution.up(leaf, ctx.weights)
        ctx.save_for_backward(val, flat)
        ctx.execution = execution
        return execution.root_values(val)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        val, _ = ctx.saved_tensors  # raises if somebody has changed the weights in place
        need = ctx.needs_input_grad[1]
        _, dleaf, dflat = ctx.execution.down(grads[0], val, ctx.weights, need)
        return dleaf, dflat if need else None, None, None, None
