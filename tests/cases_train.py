"""Inputs, error bounds and table rows of the training ops."""

from collections.abc import Callable, Iterator
from typing import Any

import cases
import torch
from cases import ROUNDING, SPLIT, Inputs, Shape, _values, make_inputs, wider
from contract import Check, Op, Outputs
from torch import Tensor

from lora_ext import ops, reference

LEAVES = ("x", "weight", "bias", "a", "b")

SMALL = [
    *cases.SMALL[:6],
    cases.SMALL[7],
    Shape(70, 133, 56, (5, 64, 16, 8), "interleaved"),
]
MEDIUM = [
    Shape(0, 64, 64, (8,)),
    Shape(200, 129, 70, (256, 1, 64), "zipf"),
    Shape(257, 200, 136, (16, 64), "contiguous"),
    Shape(300, 130, 301, (12, 24, 40), "uniform", bank_rank=42),
]
DEEP = [
    Shape(5, 24, 17, (257,), bank_rank=257),
    Shape(18, 40, 24, (300, 8, 0), "interleaved", bank_rank=300),
    Shape(66, 16, 33, (512, 40)),
    Shape(20, 33, 16, (1024, 0, 8, 40), "uniform"),
]
LARGE = [
    Shape(40, 2100, 1200, (8, 16), "uniform"),
    Shape(4100, 72, 40, (16, 8), "contiguous"),
    Shape(66, 320, 307, (8, 16), "contiguous"),  # All rows have adapters, so oneDNN is used.
]


def train_inputs(
    shape: Shape,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    exact: bool = False,
    dropout_p: float = 0.0,
    own_seeds: bool = False,
    base: bool = True,
    device: str = "cpu",
) -> Inputs:
    """Return the inputs of :func:`make_inputs` for a bank, plus a base layer, dropout and the
    gradient of y. If ``own_seeds``, there is one seed per adapter."""
    inputs = make_inputs(shape, dtype, seed=seed, exact=exact)
    g = torch.Generator().manual_seed(seed + 1000)
    weight = _values(g, exact, (shape.out, shape.wide), dtype, shape.wide**-0.5)
    if exact:  # With one nonzero weight in eight, base products are exact in bfloat16.
        weight = weight * (torch.rand(weight.shape, generator=g) < 0.125)
    inputs |= {
        "weight": weight if base else None,
        "bias": _values(g, exact, (shape.out,), dtype) if base else None,
        "dy": _values(g, exact, (shape.tokens, shape.out), dtype),
        "dropout_p": dropout_p,
        "seed": torch.tensor([seed * 2**33 - 7 * seed + 3]) if dropout_p else None,
    }
    if own_seeds:
        inputs["seed"] = torch.randint(-(2**62), 2**62, (len(shape.ranks),), generator=g)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _tail(i: Inputs) -> tuple[object, ...]:
    return i["adapter_ids"], i["scale"], i["ranks"], i["dropout_p"], i["seed"]


def run(i: Inputs, leaves: tuple[str, ...] = LEAVES) -> Outputs:
    """Return y, and the gradient of every leaf that is not None: dx, dweight, dbias, da, db."""
    values = {k: i[k] for k in LEAVES}
    wanted = {
        k: v.detach().requires_grad_() for k, v in values.items() if k in leaves and v is not None
    }
    y = ops.lora_linear(*(values | wanted).values(), *_tail(i), i.get("plan"))
    grads = torch.autograd.grad(y, list(wanted.values()), i["dy"])
    return {"y": y.detach(), **{f"d{k}": g for k, g in zip(wanted, grads, strict=True)}}


def formula(inputs: Inputs) -> Outputs:
    i = wider(inputs)
    values = [i[k] for k in LEAVES]
    dx, da, db = reference.lora_linear_backward(
        i["dy"], i["x"], i["weight"], *values[3:], *_tail(i)
    )
    out = {"y": reference.lora_linear(*values, *_tail(i)), "dx": dx}
    if i["weight"] is not None:
        out |= {"dweight": i["dy"].T @ i["x"], "dbias": i["dy"].sum(0)}
    return out | {"da": da, "db": db}


def bounds(
    inputs: Inputs, exact: Outputs, formula: Callable[[Inputs], Outputs] = formula
) -> Outputs:
    """Return the largest |error| allowed for each entry.

    Every output is rounded once to its dtype; y and dx are rounded twice, since the library rounds
    the base product. The accumulations of O, I, R and T products are in float32 (float64 for
    float64). Their errors are at most a constant times the formula applied to absolute values; the
    constant covers fused multiply-adds and tensor cores. 16-bit matrix products read v and dv as
    the sum of two 16-bit numbers (``SPLIT``).
    """
    dtype = inputs["x"].dtype
    signless = {
        k: v.abs() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    magnitude = formula(signless)
    i = wider(inputs)
    bare = {**i, "scale": torch.zeros_like(i["scale"])}
    base = {k: formula(bare)[k].abs() for k in ("y", "dx")}
    accumulator = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    tokens, wide = inputs["x"].shape
    constant = 16 + (tokens**0.5 + wide**0.5 + inputs["b"].shape[1] ** 0.5) / 2
    tiny = torch.finfo(dtype).smallest_normal  # Smaller numbers have a constant spacing.
    return {
        k: 1.02 * ROUNDING[dtype] * (v.abs() + base.get(k, 0) + tiny)
        + (SPLIT.get(dtype, 0.0) + constant * accumulator) * magnitude[k]
        for k, v in exact.items()
    }


def checks() -> Iterator[Check]:
    for p in (0.0, 0.5):
        i = train_inputs(SMALL[3], torch.float32, seed=22, dropout_p=p)
        # Every row has an adapter, so v is defined.
        i["adapter_ids"] = torch.arange(16)
        head = [i[k].requires_grad_() for k in LEAVES]
        ids, scale, seed = i["adapter_ids"], i["scale"], i["seed"]
        yield "lora_linear_forward", (*head, ids, scale, None, p, seed, None)
        x, weight, _, a, b = (t.detach() for t in head)
        backward = (i["dy"], x, torch.ones(16, 8), weight, a, b, ids, scale, None, None, p, seed)
        for needs in ((True, True, True), (False, True, False)):
            yield "lora_linear_backward", (*backward, *needs)
        yield "lora_dropout", (head[0], p, seed)


def checks_of_seeds() -> Iterator[Check]:
    i = train_inputs(SMALL[3], torch.float32, seed=13, dropout_p=0.5, own_seeds=True)
    i["adapter_ids"] = torch.arange(16)  # Every row has an adapter, so v is defined.
    head = [i[k].requires_grad_() for k in LEAVES]
    tail = (i["adapter_ids"], i["scale"], None, 0.5, i["seed"], None)
    yield "lora_linear_forward", (*head, *tail)


def with_seeds(shape: Shape, dtype: torch.dtype, **how: Any) -> Inputs:
    return train_inputs(shape, dtype, **{"dropout_p": 0.5, "own_seeds": True, "base": False} | how)


# A rank above 256, and enough rows for tiles of 64 rows: kernels use grouped matrix products.
GEMM = Shape(270, 40, 48, (264, 0, 3), "interleaved", bank_rank=264)
PLAIN, MASKED, UPDATE = {"dropout_p": 0.0}, {"dropout_p": 0.5}, {"base": False}

OPS = [
    Op(
        "train",
        train_inputs,
        run,
        formula,
        bounds,
        small=[*SMALL, *DEEP[:-1]],
        medium=[DEEP[-1], *MEDIUM],
        large=LARGE,
        variants=((PLAIN, MASKED | UPDATE), (MASKED, PLAIN | UPDATE)),
        random={"dropout_p": 0.1},
        # without base layer, since torch's product depends on the number of threads
        threads=UPDATE,
        checks=checks,
    ),
    Op(
        "train-seeds",
        with_seeds,
        run,
        formula,
        small=[*SMALL, *DEEP[:-1]],
        medium=[DEEP[-1], *MEDIUM, GEMM],
        large=LARGE[1:2],
        checks=checks_of_seeds,
    ),
]
