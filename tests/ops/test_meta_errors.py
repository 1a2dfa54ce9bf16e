"""Check that ops reject wrong shapes and dtypes of meta tensors, which torch uses while it
traces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_ext import ops
from lora_ext.ops.packed_linear import PANEL


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


INT64, HALF, BOOL = torch.int64, torch.float16, torch.bool
PACKED = meta(1, 5, PANEL)
q, k, v = meta(2, 4, 3, 8), meta(2, 2, 6, 8), meta(2, 2, 6, 5)
h, emit, x = meta(2, 8), meta(3, 1, 7, 8), meta(2, 3, dtype=INT64)
hidden, weight, labels = meta(6, 4), meta(9, 4), meta(6, dtype=INT64)
mask = meta(5, dtype=BOOL)
table, index, row = meta(4, 7), meta(2, 3, dtype=INT64), meta(3, dtype=INT64)
numbers, plan = meta(4, dtype=torch.int32), [0] * 14
walk, root = torch.ops.lora_ext.circuit_layers_walk, meta(2, dtype=INT64)
layers = torch.ops.lora_ext.circuit_layers
cross_entropy = ops.chunked_cross_entropy

WRONG: dict[str, Callable[[], object]] = {
    "pointwise: x": lambda: ops.pointwise(meta(4, dtype=HALF), "silu"),
    "row_attention: q": lambda: ops.row_attention(q[0], k, v),
    "row_attention: k": lambda: ops.row_attention(q, k[..., 1:], v),
    "row_attention: v": lambda: ops.row_attention(q, k, v[:, :, 1:]),
    "row_attention: mask": lambda: ops.row_attention(q, k, v, mask=meta(2, 3, 5, dtype=BOOL)),
    "row_attention: spans": lambda: ops.row_attention(q, k, v, spans=meta(2, 3, 2)),
    "pack_weight: weight": lambda: ops.pack_weight(meta(4, dtype=HALF)),
    "packed_linear: x": lambda: ops.packed_linear(meta(5), PACKED, None, 3),
    "packed_linear: packed": lambda: ops.packed_linear(meta(2, 6), PACKED, None, 3),
    "packed_linear: bias": lambda: ops.packed_linear(meta(2, 5), PACKED, meta(4), 3),
    "emission_gather: h": lambda: ops.emission_gather(h[:, 1:], emit, x),
    "emission_gather: emit": lambda: ops.emission_gather(h, emit[0], x),
    "emission_gather: x": lambda: ops.emission_gather(h, emit, x[:, 1:]),
    "circuit_table: table": lambda: ops.circuit_table(table[0], index, row, 1),
    "circuit_table: x": lambda: ops.circuit_table(table, index.int(), row, 1),
    "circuit_table: row": lambda: ops.circuit_table(table, index, row[1:], 1),
    "circuit_layers: leaf": lambda: layers(meta(3), meta(5), numbers, plan, "none", "sum", "fp32"),
    "circuit_layers_walk: root": lambda: walk(meta(2, 4), meta(5), numbers, plan, root[1:], None),
    "chunked_cross_entropy: weight": lambda: cross_entropy(hidden, weight.T, None, labels),
    "chunked_cross_entropy: bias": lambda: cross_entropy(hidden, weight, meta(4), labels),
    "chunked_cross_entropy: labels": lambda: cross_entropy(hidden, weight, None, labels[1:]),
    "chunked_kl: mask": lambda: ops.chunked_kl([hidden] * 2, weight, None, mask=mask),
}  # fmt: skip


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_meta_tensor_names_the_argument(argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        WRONG[argument]()
