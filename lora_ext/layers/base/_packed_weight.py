"""Cache for the packed copy of a weight. The copy is renewed after the weight has changed.

torch counts in-place writes to a tensor in ``_version``, but it does not count writes through
``weight.data`` or ``weight.numpy()``. The cache therefore also compares a sample of the weight's
values, except on CUDA, where the host would wait for the result.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext import ops

_DTYPES = (torch.float32, torch.bfloat16)

#: Maximum number of values in a weight that is compared as a whole, not only by a sample.
MAX_VALUES_COMPARED_WHOLE = 4096
#: Number of rows (or columns, if there are fewer rows than columns) per value of a sample.
LINES_PER_SAMPLED_VALUE = 4
#: ``(3 - sqrt(5)) / 2``, from the golden ratio: its multiples modulo 1 are spread evenly over [0,
#: 1).
_GOLDEN_FRACTION = 0.381966


class Format(NamedTuple):
    """Format of a packed copy."""

    bits: int | None = None  # None: the dtype of the weight
    group: int = 64
    minimum: bool = False
    int8: bool = False  # whether products round each row of activations to 8 bits

    def pack(self, weight: Tensor) -> Tensor:
        """Return a packed copy of a weight ``(O, I)``."""
        return ops.pack_weight(weight, bits=self.bits, group=self.group, minimum=self.minimum)

    def __str__(self) -> str:
        if self.bits is None:
            return "in the dtype of its weights"
        scale = f"a scale{' and a minimum' * self.minimum} for {self.group} inputs"
        return f"to {self.bits} bits with {scale}, {'int8' if self.int8 else 'float'} activations"


class PackedWeight:
    """Packed copy of the weight of a layer, or of several layers with tied weights.

    The copy is made at the second of two successive products with an unchanged weight. Therefore a
    weight that changes before every product is never packed.

    All state is in one :class:`_Snapshot`, which is replaced as a whole, because another thread may
    compute a product with another weight at the same time.
    """

    def __init__(self, form: Format | None = None) -> None:
        self.form = form or Format()
        self._snapshot: _Snapshot | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return PackedWeight(self.form)

    @property
    def nbytes(self) -> int:
        """Size of the copy in bytes; 0 if there is no copy."""
        snapshot = self._snapshot
        return 0 if snapshot is None or snapshot.packed is None else snapshot.packed.nbytes

    def copy_of(self, weight: Tensor, counts: bool = True) -> Tensor | None:
        """Return the copy of ``weight``, or None at the first product after a change.

        Args:
            weight: weight of the layer.
            counts: whether a call that returns None is followed by a product with ``weight``. If
                False, the next call is still that of the first product.
        """
        snapshot = self._snapshot
        if snapshot is not None and snapshot.matches(weight):
            if snapshot.packed is None:
                snapshot.keep(weight, self.form.pack(weight.detach()))
            return snapshot.packed
        if counts:
            self._snapshot = None if why_not_packed(weight, self.form.bits) else _Snapshot(weight)
        return None

    def hold(self, weight: Tensor, packed: Tensor) -> None:
        """Use ``packed`` as the copy until the weight changes."""
        self._snapshot = _Snapshot(weight)
        self._snapshot.keep(weight, packed)

    def copy_made_now(self, weight: Tensor) -> Tensor | None:
        """Return the copy of ``weight``, made now if necessary; None if it cannot be packed."""
        copy = self.copy_of(weight)
        return self.copy_of(weight) if copy is None else copy

    def drop(self) -> None:
        """Free the copy."""
        self._snapshot = None


class _Snapshot:
    """State of a weight at one product, and its packed copy."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weakref.ref(weight)
        self._version = weight.data_ptr(), weight._version, weight.dtype, weight.shape
        self._sample: tuple[Tensor, Tensor] | None = None  # view of the weight, copy of its values
        self.packed: Tensor | None = None

    def matches(self, weight: Tensor) -> bool:
        """Return whether ``weight`` is the same tensor with the same values."""
        if self._weight() is not weight:
            return False
        if self._version != (weight.data_ptr(), weight._version, weight.dtype, weight.shape):
            return False
        return self._sample is None or ops.same_bits(*self._sample)

    def keep(self, weight: Tensor, packed: Tensor) -> None:
        """Store the packed copy of the weight, and a sample of the weight's values.

        A copy of another type is not stored: FakeTensorMode returns one without values.
        """
        if weight.is_cpu and type(packed) is Tensor:
            view = _sample_of(weight.detach())
            self._sample = view, view.clone()
        self.packed = packed if type(packed) is Tensor else None


def why_not_packed(weight: Tensor, bits: int | None = None) -> str | None:
    """Return why a weight cannot be packed, as ``<expected>, found <found>``; None if it can."""
    on_cuda = bits is not None and weight.is_cuda
    if not on_cuda and weight.device.type != "cpu":
        remedy = "; pack it to 8 or 4 bits" if weight.is_cuda else ""
        return f"a weight on the CPU, found one on {weight.device}{remedy}"
    dtypes = (*_DTYPES, torch.float16) if on_cuda else _DTYPES
    if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in dtypes:
        expected = "float32, bfloat16 or float16" if on_cuda else "float32 or bfloat16"
        return f"a weight of {expected}, found {type(weight).__name__} of {weight.dtype}"
    if weight.is_inference():
        return "a weight created outside inference_mode (to detect changes), found one from inside"
    return None


def _sample_of(weight: Tensor) -> Tensor:
    """Return a sample of the values of a weight as a view with an integer dtype.

    Viewed as integers, NaNs with the same bits also compare equal. The sample is the whole weight
    if this is small, or if neither the weight nor its transpose is contiguous.
    """
    bits = weight.view(torch.int32 if weight.dtype == torch.float32 else torch.int16)
    if bits.numel() > MAX_VALUES_COMPARED_WHOLE:
        for matrix in (bits, bits.t()):
            if matrix.is_contiguous():
                return matrix.view(-1)[:: _sample_stride(*matrix.shape)]
    return bits


def _sample_stride(rows: int, width: int) -> int:
    """Return the distance in memory between the sampled values of a row-major matrix.

    The sample has to detect changes of a few neighbouring rows or columns, and of every second or
    third (and so on) row or column. The stride is ``width * (k + g)`` or ``width / (k + g)`` for an
    integer k and the golden fraction g. Successive values are then shifted by the fraction g of a
    row, so their columns (or rows) do not repeat. The stride is made coprime to the width, so that
    the sample visits all columns.
    """
    rows_per_value = LINES_PER_SAMPLED_VALUE * min(rows, width) / width
    if rows_per_value >= 1:
        stride = width * (int(rows_per_value) + _GOLDEN_FRACTION)
    else:
        stride = width / (int(1 / rows_per_value) + _GOLDEN_FRACTION)
    found = max(1, round(stride))
    while math.gcd(found, width) > 1:
        found -= 1
    return found
