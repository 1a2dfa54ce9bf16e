"""Inputs and table row of the op for siblings: three modules with the same input rows."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from cases import DEEP, LARGE, MEDIUM, SMALL, Inputs, Shape, make_inputs, mixing, wider
from contract import Check, Op, Outputs
from torch import Tensor

from lora_ext import ops, reference


def family(shape: Shape, dtype: torch.dtype, **how: Any) -> list[Inputs]:
    """Return the inputs of three modules with the same rows and adapter ids, but different output
    widths and adapters."""
    first = make_inputs(shape, dtype, **how)
    others = [
        make_inputs(replace(shape, out=out), dtype, **{**how, "seed": how.get("seed", 0) + 100 + i})
        for i, out in enumerate((shape.out + 8, max(1, shape.out // 2)))
    ]
    shared = {k: first[k] for k in ("x", "adapter_ids")}
    return [first, *({**other, **shared} for other in others)]


def each(modules: list[Inputs], key: str) -> list[Tensor]:
    return [m[key] for m in modules if m[key] is not None]


def together(modules: list[Inputs], plan: Tensor | None = None, run: Any = ops) -> list[Tensor]:
    ys = [m["y"].clone() for m in modules]
    first = modules[0]
    rest = (first["adapter_ids"], *(each(modules, k) for k in ("scale", "ranks", "page_table")))
    rest = rest if run is reference else (*rest, plan)
    mixed = {"weights": first["weights"]} if "weights" in first else {}
    if "groups" in first:
        mixed["groups"] = each(modules, "groups")
    a, b = each(modules, "a"), each(modules, "b")
    got = run.lora_apply_siblings_(ys, first["x"], a, b, *rest, **mixed)
    assert got is ys
    return ys


def alone(m: Inputs) -> Tensor:
    rest = (m[k] for k in ("adapter_ids", "scale", "ranks", "page_table"))
    return ops.lora_apply_(m["y"].clone(), m["x"], m["a"], m["b"], *rest, **mixing(m))


def checks() -> Iterator[Check]:
    for paged in (False, True):
        modules = family(SMALL[4], torch.float32, seed=10, paged=paged)
        for m in modules:
            m |= {k: m[k].nan_to_num(0.5) for k in "ab"}
        y, a, b = (each(modules, k) for k in "yab")
        rest = (each(modules, k) for k in ("scale", "ranks", "page_table"))
        yield "lora_apply_siblings_", (y, modules[0]["x"], a, b, modules[0]["adapter_ids"], *rest)


def _named(ys: list[Tensor]) -> Outputs:
    return {f"y{n}": y for n, y in enumerate(ys)}


OPS = [
    Op(
        "siblings",
        family,
        run=lambda modules: _named(together(modules)),
        formula=lambda modules: _named(together([wider(m) for m in modules], run=reference)),
        small=[*SMALL, *DEEP],
        medium=[*MEDIUM, *LARGE],
        variants=(({"paged": True},), ({},)),
        checks=checks,
    )
]
