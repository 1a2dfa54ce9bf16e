"""DoRA: the direction of ``W + s B A``, with a separate trained magnitude per output feature.

``y = (m / norm) * ((W + s B A) x) + bias`` with ``norm = || W + s B A ||`` per row of the matrix.
Gradients treat the norm as a constant. The forward and the gradients are those of PEFT's layer.
Several adapters are applied in order, as in PEFT. A DoRA adapter without active dropout also scales
the updates of the adapters before it. With dropout it scales only its update and the base product.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eqs. 5 and 6, section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lora_ext import ops
from lora_ext._torch import linear
from lora_ext.kinds import normed
from lora_ext.rows import Rows, _rows

from ._lora_forward import (
    LoraFactors,
    draw_seed,
    fused_forward,
    fuses,
    lora_forward,
    lora_update,
)
from .base._dense import BaseLayer, DenseParameters, dense_parameters
from .base._packed_linear import PackedLinear
from .base._spacing import base_product


class Magnitude(nn.Module):
    """Module with the magnitude of a DoRA adapter as its ``weight``, as in PEFT."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


def scaled_forward(
    x: Tensor,
    base: BaseLayer,
    dense: Callable[[], DenseParameters],
    adapters: Sequence[LoraFactors],
    rows: Rows | None = None,
) -> Tensor:
    """Return ``base(x)`` plus the updates of adapters with and without a magnitude, ``(..., O)``.

    If ``b`` is zero and the magnitudes equal the norms of the base weight, as in a new adapter, the
    result equals ``base(x)`` bit for bit.

    Args:
        x: input ``(..., I)``.
        base: base layer, as in :func:`lora_forward`.
        dense: function that returns the weight and bias of ``base``, as :func:`readable_weight`
            does. It is called after ``base``, because with ZeRO-3 the forward of ``base`` releases
            the gathered weight.
        adapters: factors of the adapters, of which at least one has a magnitude.
        rows: adapter of each row; None applies all adapters to all rows, in order.
    """
    if rows is None:
        return _in_order(x, base, dense, adapters)
    # One call computes the rows of all adapters without DoRA. The rows of each DoRA adapter are
    # computed in a separate call.
    plain = [slot for slot, i in enumerate(rows.used) if adapters[i].magnitude is None]
    y = lora_forward(x, base, adapters, _rows.subset(rows, plain))
    read = dense()  # in all processes, even without DoRA rows: ZeRO-3 gathers the weight
    x2d, y2d = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    for slot, i in enumerate(rows.used):
        if slot not in plain:
            own = (rows.ids == slot).nonzero()[:, 0]
            part = _scaled(x2d[own], y2d[own], read, adapters[i])
            y2d = y2d.index_copy(0, own, part.to(y2d.dtype))
    return y2d.view(y.shape)


def _in_order(
    x: Tensor,
    base: BaseLayer,
    dense: Callable[[], DenseParameters],
    adapters: Sequence[LoraFactors],
) -> Tensor:
    first = adapters[0]
    # The fused op would use torch's matrix product, whose bits depend on the batch.
    exact = isinstance(base, PackedLinear) and base.exact
    alone = len(adapters) == 1 and first.p == 0 and not exact
    if alone and fuses(x, dense_parameters(base), first):
        read = weight, bias = dense()
        y = fused_forward(x, read, first)
        scale = _scale(weight, first)
        scaled = y * scale
        # The bias is not part of the direction, so it is not scaled. A scale of 1 leaves y
        # unchanged.
        return (scaled if bias is None else scaled + bias * (1 - scale)).to(y.dtype)
    y = base_product(base, x)
    dtype, read = y.dtype, dense()
    for f in adapters:
        y = y + lora_update(x, [f]) if f.magnitude is None else _scaled(x, y, read, f)
    return y.to(dtype)


def _scaled(x: Tensor, y: Tensor, dense: DenseParameters, f: LoraFactors) -> Tensor:
    """Return the output with a DoRA adapter; ``y`` is that of base layer and earlier adapters."""
    weight, bias = dense
    scale = _scale(weight, f)
    if f.p == 0:
        inner = y if bias is None else y - bias
        update = lora_update(x, [f])
    else:  # as in PEFT, dropout applies to the input of the base product, too
        # x contains only the adapter's rows, in order, so a seed gives the same mask as in
        # lora_forward.
        seed = draw_seed(x.device) if f.seed is None else f.seed
        x2d = x.reshape(-1, x.shape[-1]).to(f.a.dtype)
        dropped = ops.lora_dropout(x2d, f.p, seed).view(x.shape)
        inner = linear(dropped, weight.to(dropped.dtype))
        update = lora_update(dropped, [f._replace(p=0.0)])
    return y + (scale - 1) * inner + scale * update


def _scale(weight: Tensor, f: LoraFactors) -> Tensor:
    assert f.magnitude is not None  # the callers have checked it
    return normed(f.magnitude, weight, f.a, f.b, f.scaling, f.norm)
