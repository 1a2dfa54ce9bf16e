"""LoraLinear: a linear layer with trainable low-rank adapters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext._torch import parameter
from lora_ext.rows import Names

from ._lora_forward import lora_forward
from ._lora_layer import LoraLayer
from .base._spacing import base_product
from .base._weight import LinearWeight


class LoraLinear(LoraLayer):
    """PEFT's linear layer on fused ops: ``y = base(x) + scaling * (B A dropout(x) + bias)``.

    Parameters have PEFT's names, so state dicts can be exchanged: ``base_layer.*``,
    ``lora_A.<name>.weight (r, I)``, ``lora_B.<name>.weight (O, r)``, ``lora_B.<name>.bias``,
    ``lora_magnitude_vector.<name>.weight (O,)``, with ``I`` input and ``O`` output features and
    rank ``r``. Only :meth:`merge` and some initialisation schemes change the base weight. As in
    PEFT, the base layer stays trainable. Freeze it with ``layer.base_layer.requires_grad_(False)``,
    or adapt the model with :func:`lora_ext.nn.wrap`, which freezes everything except the adapters.

    A row ``(I,)`` of ``x`` uses the adapter that :func:`lora_ext.adapters` or ``adapter_ids``
    selects for the row, by default the sum of the active adapters (:meth:`set_adapter`). An adapter
    that is switched off (``adapter_active`` is False) or that no row uses causes no allocation, no
    kernel launch and no graph node, and its ``grad`` stays None. If torch.distributed has several
    processes, a trained adapter without rows gets zero gradients instead, because another process
    may have rows that use it.

    Under ``torch.compile``, an adapter without rows also gets zero gradients if the rows of the
    batch have different adapters. Rows of adapters with a magnitude cause a graph break.

    Args:
        base_layer: module that maps ``(..., I)`` to ``(..., O)``. ``nn.Linear`` and transformers'
            ``Conv1D`` are computed in the fused op; any other module is called.
        adapter_name: name of the first adapter, which becomes active.
        r: rank of the first adapter.
        options: other arguments of :meth:`add_adapter`.
        fan_in_fan_out: whether the base layer stores its weight as ``(I, O)``. For ``Conv1D``, True
            is set automatically.

    Raises:
        ValueError: If the sizes of the base layer cannot be determined, ``fan_in_fan_out`` is set
            for an ``nn.Linear``, or :meth:`add_adapter` raises a ValueError.

    Sources: LoRA (Hu et al. 2021); rsLoRA (Kalajdzievski 2023); PEFT.
    """

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    takes_invocation = True

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str = "default",
        r: int = 8,
        *,
        fan_in_fan_out: bool = False,
        **options: Any,
    ):
        fits = not (fan_in_fan_out and isinstance(base_layer, nn.Linear))
        expected = "False for nn.Linear, whose weight is (O, I)"
        require(fits, "LoraLinear", "fan_in_fan_out", expected, repr(fan_in_fan_out))
        fan_in_fan_out = LinearWeight(base_layer, fan_in_fan_out).fan_in_fan_out
        super().__init__(base_layer, adapter_name, r, fan_in_fan_out, **options)

    def forward(
        self,
        x: Tensor,
        adapter_ids: Tensor | Names = None,
        *,
        adapter_names: Names = None,
        adapter_weights: Tensor | None = None,
    ) -> Tensor:
        """Map ``(..., I)`` to ``(..., O)`` in the dtype of ``base_layer(x)``.

        Args:
            x: floating-point tensor ``(..., I)``.
            adapter_ids: adapters of the rows, with one entry per row or per sequence. Either an
                int64 or int32 tensor of positions in :attr:`adapter_names`, with -1 for no adapter;
                or names, with None or ``"__base__"`` for no adapter. By default, the surrounding
                :func:`lora_ext.adapters` block selects the adapters; without a block all rows use
                the active adapters. A tensor ``(T, K)`` for ``T`` rows adds the updates of K
                adapters per row.
            adapter_names: alternative to ``adapter_ids`` for names, as in PEFT.
            adapter_weights: floating-point factors of the updates, in the shape of the tensor
                ``adapter_ids``; differentiable.

        Raises:
            ValueError: If the ids, names or weights do not match the rows or the adapters, or if
                they are given while adapters are merged.
            NotImplementedError: If rows have weights or several adapters, and one of these adapters
                scales outputs (DoRA).
        """
        given = adapter_ids if adapter_names is None else adapter_names
        if adapter_names is not None or adapter_weights is not None:
            _check_given(adapter_ids, adapter_names, adapter_weights)
        names, rows = self._participants(x.shape[:-1], x.device, given)
        if adapter_weights is not None and rows is not None:
            expected = f"one weight for each of {rows.ids.numel()} entries"
            fits, found = adapter_weights.numel() == rows.ids.numel(), adapter_weights.numel()
            require(fits, "LoraLinear", "adapter_weights", expected, found)
            self._refuse_rescaled(names[i] for i in rows.used)
            rows = rows._replace(weights=adapter_weights.reshape(rows.ids.shape))
        base: nn.Module = self._modules["base_layer"]  # pyright: ignore[reportAssignmentType]
        if not names:
            return base_product(base, x)
        scaled = self._modules["lora_magnitude_vector"]._modules  # pyright: ignore[reportOptionalMemberAccess]
        if len(names) == 1 and names[0] not in scaled:
            return lora_forward(x, base, (self.factors(names[0]),), rows)
        return self._adapted(x, base, names, rows)

    @property
    def base_weight(self) -> LinearWeight:
        """View of the base layer's weight as a matrix ``(O, I)``."""
        return LinearWeight(self.base_layer, self.fan_in_fan_out)

    def _raw_factors(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        # Every forward calls this method. In the general method, base_weight and the attribute
        # lookups of nn.Module would take as long as the op.
        a, b = (self._modules[side]._modules[name] for side in ("lora_A", "lora_B"))  # pyright: ignore[reportOptionalMemberAccess]
        return parameter(a, "weight"), parameter(b, "weight"), parameter(b, "bias")  # pyright: ignore[reportArgumentType]


def _check_given(ids: Tensor | Names, names: Names, weights: Tensor | None) -> None:
    """Raise ValueError if both ids and names are given, or weights without a tensor of ids."""
    where, argument = "LoraLinear", "adapter_weights"
    both = names is not None and ids is not None
    require(not both, where, "adapter_ids", "None if adapter_names is given", ids)
    if weights is None:
        return
    fits = isinstance(ids, Tensor)
    require(fits, where, argument, "a tensor as adapter_ids", f"adapter_ids={ids!r:.200}")
    assert isinstance(ids, Tensor)
    fits = weights.shape == ids.shape and weights.is_floating_point()
    expected = f"a floating-point tensor of the shape of adapter_ids, {tuple(ids.shape)}"
    require(fits, where, argument, expected, f"{weights.dtype} {tuple(weights.shape)}")
