"""Measurement of whether packed weights make the products of a model faster on this machine."""

from __future__ import annotations

import collections
import logging
import operator
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext import ops

from ._packed_linear import CHOICE, linears_of, pack_linears, packing

_log = logging.getLogger(__name__)

ROWS = (1, 4, 16)
#: Maximum number of layer sizes that are measured: those with the most values in the model.
MAX_SIZES = 3
#: Maximum number of measured layers of one size. They are multiplied in turn, so that not all of
#: their weights are in a CPU cache.
MAX_LAYERS = 8
#: Duration of one measurement in seconds. Each size and number of rows is measured twice.
SECONDS = 0.03


def pack_if_faster(model: nn.Module) -> bool:
    """Pack the linear layers of a model if this makes products with 1, 4 and 16 rows faster.

    The function measures the largest layers for less than a second. It logs the choice and the
    times; ``str(packing(model))`` contains them, too. Returns whether the model was packed.
    """
    found = packing(model)
    faster, why = False, found.reason
    if found.fits:
        times = [_seconds(model, packed) for packed in (True, False)]
        faster = sum(map(operator.truediv, *times)) < len(ROWS)
        packed, plain = (" / ".join(f"{1e3 * t:.2f}" for t in each) for each in times)
        why = f"products with {ROWS} rows take {packed} ms packed, {plain} ms plain"
    if faster:
        pack_linears(model)
    model.__dict__[CHOICE] = f"{'packed' if faster else 'plain'}: {why}"
    _log.info("the base model is %s", model.__dict__[CHOICE])
    return faster


@torch.inference_mode()
def _seconds(model: nn.Module, packed: bool) -> list[float]:
    """Return the seconds that products with the largest layers take, for each entry of ``ROWS``."""
    sizes: dict[torch.Size, list[Tensor]] = collections.defaultdict(list)
    for weight in {id(m.weight): m.weight.detach() for _, m in linears_of(model)}.values():
        sizes[weight.shape].append(weight)
    totals = [0.0] * len(ROWS)
    for same in sorted(sizes.values(), key=lambda ws: -len(ws) * ws[0].numel())[:MAX_SIZES]:
        few, (out, wide) = same[:MAX_LAYERS], same[0].shape
        used = [ops.pack_weight(w) for w in few] if packed else few
        for at, rows in enumerate(ROWS):
            x, least = torch.ones(rows, wide, dtype=few[0].dtype), float("inf")
            start = time.perf_counter()
            end = start + SECONDS
            while start < end:
                for w in used:
                    ops.packed_linear(x, w, None, out) if packed else F.linear(x, w)
                least = min(least, (now := time.perf_counter()) - start)
                start = now
            totals[at] += least * len(same) / len(few)
    return totals
