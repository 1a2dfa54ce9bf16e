"""MultiLoraExperts: routed experts in which each row may use a different adapter of a pool."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext._torch import compiles
from lora_ext.layers import Routing, Slots, experts_forward, projections, slots_of
from lora_ext.rows import PoolLayer, Rows, _traced, current, untouched

from ._multi_lora import add_adapters


class MultiLoraExperts(PoolLayer):
    """Experts module of transformers that uses one adapter of a pool for each row.

    Adds ``scale[s] * B[s, e] A[s, e] x[t]`` to both products of an expert, where ``s`` is the slot
    of row ``t``'s adapter, and ``e`` is each of the experts that the row is routed to. The adapters
    of the rows are those of the block :func:`lora_ext.adapters`. If no row has an adapter, the
    layer only calls ``base``. The kernels treat each pair of adapter and expert as a slot, whose
    index is computed on the device from the router's choice and the row's adapter. One call of the
    op per product computes all pairs of row and expert. The router is not adapted.

    Args:
        base: experts module to replace: see :mod:`lora_ext.layers._experts`.
        pool: :class:`lora_ext.AdapterPool` that contains the adapters.
        name: name of the module in the model. The pool contains the module's parameters by name.
    """

    def __init__(self, base: nn.Module, pool: Any, name: str):
        nn.Module.__init__(self)
        self.slabs = {
            parameter: pool.experts[f"{name}.{parameter}"]
            for parameter in projections(base)
            if f"{name}.{parameter}" in pool.experts
        }
        sizes = {p: (s.experts, s.in_features, s.out_features) for p, s in self.slabs.items()}
        found = {p: (len(getattr(base, p)), *projections(base)[p]) for p in self.slabs}
        expected = f"(experts, in_features, out_features) as in the pool, {sizes}"
        of_base = f"a {type(base).__name__} with {found}"
        require(sizes and found == sizes, "MultiLoraExperts", name, expected, of_base)
        self.stand_in(base, pool, name)

    def forward(self, x: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Map ``x (T, H)`` to ``(T, H)``.

        The further arguments are the experts of each row and their weights, ``(T, k)`` each.
        """
        slabs = {name: slab for name, slab in self.slabs.items() if slab.a_pages is not None}
        if not slabs:
            if not compiles():
                untouched(self.pool, x.device)
            return self.base(x, *args, **kwargs)
        index, weights = (*args, *kwargs.values())
        if compiles():
            # The graph reads the slot of each row from the block in which it runs. `pool_rows`
            # calls the same op but also plans the rows, whereas the plan of experts is for pairs
            # of row and expert.
            where = self.handle, x.shape[:-1], x.device, self.tokens_first, False
            mixed = next(iter(slabs.values())).mixed
            slots, of_rows = _traced.slots_and_weights(*where, self.default_text, mixed)
        else:
            block = current(self.handle)
            if block is None and self.default is not None:
                return self.by_default(x, index, weights)
            rows = None if block is None else self.rows_in(block, x.shape[:-1], x.device)
            if rows is None or not rows.used:  # all rows belong to the base model
                return self.base(x, index, weights)
            slots, of_rows = rows.ids, rows.weights  # (T,), (T, K)

        def update(name: str, y: Tensor, rows: Tensor, routing: Routing) -> Tensor:
            if name not in slabs:
                return y
            if not found:
                found.append(slots_of(routing, slots, self.pool.max_slots, experts))
            own = None if of_rows is None else of_rows[routing.token]
            return add_adapters(y, rows, slabs[name], Rows((), *found[0], own))

        experts: Any = self.base.num_experts
        found: list[Slots] = []  # shared by both products
        y = experts_forward(self.base, x, index, weights, update)
        if not compiles():
            self.watch_backward(y)
        return y
