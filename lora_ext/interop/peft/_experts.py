"""PEFT's adapters on the parameters of routed experts, run by lora_ext's kernels.

PEFT wraps an experts module once for each adapted parameter. In each forward, PEFT's wrapper adds
the update to the weight matrices of all experts. Here, the outermost wrapper computes the whole
module, and multiplies each token only by the factors of the token's adapter for the token's
experts. Parameters have PEFT's names, and files PEFT's format.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from lora_ext.layers import (
    Routing,
    Slots,
    experts_forward,
    experts_update,
    obstacle_of,
    projections,
    slots_of,
)
from lora_ext.rows import Assignment, Batch, Layout, together

from ._adapters import no_gradients_without_rows, taking_part
from ._layers import Fused, uncovered
from ._names import names_of_layer


class FusedExperts(Fused, ParamWrapper):
    """PEFT's ``lora.ParamWrapper`` for routed experts, with one adapter per row.

    Shape letters: ``T`` tokens, ``H`` hidden size, ``k`` experts per token.
    """

    of_peft = ParamWrapper

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output that PEFT computes, with an adapter per row if there are names.

        Args:
            x: hidden states ``(T, H)``.
            args: indices of each token's experts and their routing weights, both ``(T, k)``.
            kwargs: ``adapter_names``, one name per sequence, which is also accepted in training.

        Returns:
            Output of the experts, ``(T, H)``.

        Raises:
            ValueError: If there are names but PEFT has to run this layer; PEFT raises it.
            RuntimeError: If another library's checkpoint recomputes the layer without its names.
        """
        names = kwargs.pop("adapter_names", None)
        given = names_of_layer(self, names)
        wrappers = self._wrappers()
        off = any(w._disable_adapters or w.merged for w in wrappers)
        present = {} if off else {w: taking_part(w, given) for w in wrappers}
        reasons = [w.uncovered(name) for w, (names, _, _) in present.items() for name in names]
        left = [reason for reason in reasons if reason is not None]
        if off or left or kwargs or len(args) != 2:
            if left and any(trained for _, _, trained in present.values()):
                raise no_gradients_without_rows("; ".join(left))
            if given is not None:
                kwargs["adapter_names"] = given.plain() if off else given.spelled()
            return self._forward_of_peft(x, *args, **kwargs)
        of_parameter = {w.parameter_name: w for w in wrappers}
        found: dict[Any, Slots] = {}

        def update(parameter: str, y: Tensor, inner: Tensor, routing: Routing) -> Tensor:
            layer = of_parameter.get(parameter)
            if layer is None:
                return y
            adapters, rows, trained = present[layer]
            for group, ids in _calls(adapters, rows, trained, x):
                key = None if rows is None else group
                if key not in found:
                    found[key] = slots_of(routing, ids, len(group), layer.num_experts)
                factors = [layer.factors_of(name) for name in group]
                y = experts_update(y, inner, factors, found[key], layer.num_experts)
            return y

        return experts_forward(self.get_base_layer(), x, *args, update)

    def uncovered(self, adapter: str) -> str | None:
        """Return why PEFT's forward must run with an adapter; None if lora_ext can run it."""
        experts: Any = self.get_base_layer()
        if self.parameter_name not in projections(experts):
            return (
                f"{self.parameter_name} of a {type(experts).__name__} is not a floating-point "
                "matrix of routed experts"
            )
        obstacle = obstacle_of(experts)
        return uncovered(self, adapter) if obstacle is None else f"its experts have {obstacle}"

    def _wrappers(self) -> list[FusedExperts]:
        """Return this wrapper and the wrappers inside it. There is one per adapted parameter."""
        found: list[Any] = [self]
        while isinstance(found[-1].base_layer, ParamWrapper):
            found.append(found[-1].base_layer)
        return found


FusedExperts.__name__ = ParamWrapper.__name__  # PEFT prints and compares this name


def _calls(
    adapters: tuple[str, ...], rows: Assignment | None, trained: tuple[int, ...], x: Tensor
) -> list[tuple[tuple[str, ...], Tensor | None]]:
    """Return the arguments of each call of ``experts_update`` that a layer needs.

    The arguments are names of adapters, and for each row the index of its adapter among the names.
    If ``rows`` is None, there is one call per adapter, with None: the adapter applies to all rows.
    """
    if rows is None:
        return [((name,), None) for name in adapters]
    if not adapters:
        return []
    tokens, sequences = len(x), len(rows.places)
    each = frozenset([tokens // sequences] if tokens % sequences == 0 else [])
    layout = Layout(x.shape[:-1], x.device, batch=Batch(sequences, each))
    of_rows = together(rows.rows_among(adapters, layout), trained)
    used = tuple(adapters[i] for i in of_rows.used)
    return [(used, of_rows.ids)] if used else []
