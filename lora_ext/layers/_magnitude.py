"""DoRA: the direction of ``W + s B A``, with a separate trained magnitude per output feature.

``y = (m / norm) * ((W + s B A) x) + bias`` with ``norm = || W + s B A ||`` per row of the matrix.
The backward treats the norm as a constant. The forward and the gradients are those of PEFT's layer.
Several adapters are applied in order, as in PEFT. A DoRA adapter without active dropout also scales
the updates of the adapters before it; with dropout it scales its own update and the base product.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eqs. 5 and 6, section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lora_ext import ops
from lora_ext._torch import linear
from lora_ext.kinds import normed
from lora_ext.rows import Rows, subset

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
    """Module for the magnitude of an adapter: PEFT's ``lora_magnitude_vector.<name>.weight``."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


def scaled_forward(
    x: Tensor,
    base: BaseLayer,
    dense: Callable[[], DenseParameters],
    adapters: Sequence[LoraFactors],
    magnitudes: Sequence[Tensor | None],
    rows: Rows | None = None,
    norms: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Compute :func:`lora_forward` for adapters with and without a magnitude.

    If ``b`` is zero and the magnitudes equal the norms of the base weight, as in a new adapter, the
    result equals ``base(x)`` bit for bit.

    Args:
        x: input ``(..., I)``.
        base: base layer, as in :func:`lora_forward`.
        dense: function that returns the weight and bias of ``base``, as :func:`readable_weight`
            does. It is called after ``base``, because with ZeRO-3 the forward of ``base`` releases
            the gathered weight.
        adapters: factors of the adapters.
        magnitudes: magnitude ``(O,)`` of each adapter, or None for an adapter without DoRA.
        rows: assignment of the rows to the adapters; None applies all adapters to all rows, in
            order.
        norms: result of :func:`lora_ext.ops.lora_dora_norm` for each adapter; norms that are None
            are computed.
    """
    norms = [None] * len(adapters) if norms is None else norms
    if rows is None:
        return _in_order(x, base, dense, adapters, magnitudes, norms)
    # One call computes the rows of all adapters without DoRA. The rows of each DoRA adapter are
    # computed in a separate call.
    plain = [i for i in rows.used if magnitudes[i] is None]
    plain_rows = subset(rows, [slot for slot, i in enumerate(rows.used) if i in plain])
    y = lora_forward(x, base, adapters, plain_rows)
    read = dense()  # in all processes, even without DoRA rows: ZeRO-3 gathers the weight
    x2d, y2d = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    for slot, i in enumerate(rows.used):
        magnitude = magnitudes[i]
        if magnitude is not None:
            own = (rows.ids == slot).nonzero()[:, 0]
            part = _scaled(x2d[own], y2d[own], read, adapters[i], magnitude, norms[i])
            y2d = y2d.index_copy(0, own, part.to(y2d.dtype))
    return y2d.view(y.shape)


def _in_order(
    x: Tensor,
    base: BaseLayer,
    dense: Callable[[], DenseParameters],
    adapters: Sequence[LoraFactors],
    magnitudes: Sequence[Tensor | None],
    norms: Sequence[Tensor | None],
) -> Tensor:
    first, magnitude = adapters[0], magnitudes[0]
    plain_base = dense_parameters(base)
    # The fused op would use torch's product, which is not exact.
    exact = isinstance(base, PackedLinear) and base.exact
    alone = len(adapters) == 1 and first.p == 0 and not exact
    if alone and magnitude is not None and fuses(x, plain_base, first):
        read = weight, bias = dense()
        y = fused_forward(x, read, first)
        scale = _scale(weight, first, magnitude, norms[0])
        scaled = y * scale
        # The bias is not part of the direction, so it is not scaled. A scale of 1 leaves y
        # unchanged.
        return (scaled if bias is None else scaled + bias * (1 - scale)).to(y.dtype)
    y = base_product(base, x)
    dtype, read = y.dtype, dense()
    for f, magnitude, norm in zip(adapters, magnitudes, norms, strict=True):
        if magnitude is None:
            y = y + lora_update(x, [f])
        else:
            y = _scaled(x, y, read, f, magnitude, norm)
    return y.to(dtype)


def _scaled(
    x: Tensor,
    y: Tensor,
    dense: DenseParameters,
    f: LoraFactors,
    magnitude: Tensor,
    norm: Tensor | None,
) -> Tensor:
    """Apply a DoRA adapter to ``y``, the output of the base layer and the earlier adapters."""
    weight, bias = dense
    scale = _scale(weight, f, magnitude, norm)
    if f.p == 0:
        inner = y if bias is None else y - bias
        update = lora_update(x, [f])
    else:  # the base product is part of the direction, so it uses the dropped input, too
        # x contains only the adapter's rows, in order, so the same seed gives the mask of
        # lora_forward.
        seed = draw_seed(x.device) if f.seed is None else f.seed
        x2d = x.reshape(-1, x.shape[-1]).to(f.a.dtype)
        dropped = ops.lora_dropout(x2d, f.p, seed).view(x.shape)
        inner = linear(dropped, weight.to(dropped.dtype))
        update = lora_update(dropped, [f._replace(p=0.0)])
    return y + (scale - 1) * inner + scale * update


def _scale(weight: Tensor, f: LoraFactors, magnitude: Tensor, norm: Tensor | None) -> Tensor:
    return normed(magnitude, weight, f.a, f.b, f.scaling, norm)
