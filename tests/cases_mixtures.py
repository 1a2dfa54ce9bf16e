"""Inputs and table rows of mixtures: weights of rows, factors of pages, several ids per row."""

from collections.abc import Iterator
from typing import Any

import cases
import cases_train
import torch
from backends import Backend
from cases import DEEP, MEDIUM, SMALL, Inputs, Shape, assign, make_inputs, mixing, wider
from cases_train import LEAVES, train_inputs
from contract import Check, Op, Outputs
from torch import Tensor

from lora_ext import ops, reference

KINDS = ("rows", "groups", "pages", "columns")
COLUMNS, GROUPS = 3, 3


def with_mixture(inputs: Inputs, shape: Shape, kind: str, seed: int, exact: bool) -> Inputs:
    """Return `inputs` with the factors of a mixture. The weight of an entry without adapter is NaN,
    so reading it makes the result NaN.

    Args:
        inputs: Result of :func:`make_inputs` for ``shape``.
        shape: Sizes.
        kind: "rows" has a weight per row, "pages" a scale per page, "groups" both with weights per
            row and group, "columns" several ids and weights per row.
        seed: Seed of the factors.
        exact: If true, factors are powers of two.
    """
    g = torch.Generator().manual_seed(seed + 2000)
    device, ids = inputs["x"].device, inputs["adapter_ids"].cpu()
    paged = len(shape.ranks), -(-shape.max_rank // 8)

    def factors(*size: int) -> Tensor:
        if exact:
            return torch.tensor([-1.0, 0.5, 1.0, 2.0])[torch.randint(4, size, generator=g)]
        return torch.randn(size, generator=g)

    found: Inputs = {}
    match kind:
        case "rows":
            found["weights"] = torch.where(ids < 0, torch.nan, factors(shape.tokens))
        case "columns":
            ids = torch.stack([ids, *(assign(shape, g) for _ in range(COLUMNS - 1))], 1)
            found["adapter_ids"] = ids
            found["weights"] = torch.where(ids < 0, torch.nan, factors(*ids.shape))
        case "pages":
            found["scale"] = factors(*paged)
        case _:
            found["scale"] = factors(*paged)
            weights = factors(shape.tokens, GROUPS)
            found["weights"] = torch.where(ids[:, None] < 0, torch.nan, weights)
            found["groups"] = torch.randint(GROUPS, paged, generator=g).int()
    return inputs | {k: v.to(device) for k, v in found.items()}


def mixed_inputs(
    shape: Shape,
    dtype: torch.dtype,
    *,
    kind: str = "rows",
    seed: int = 0,
    exact: bool = False,
    **how: Any,
) -> Inputs:
    inputs = make_inputs(shape, dtype, seed=seed, exact=exact, **how)
    return with_mixture(inputs, shape, kind, seed, exact)


def mixed_train_inputs(
    shape: Shape,
    dtype: torch.dtype,
    *,
    kind: str = "rows",
    seed: int = 0,
    exact: bool = False,
    **how: Any,
) -> Inputs:
    inputs = train_inputs(shape, dtype, seed=seed, exact=exact, **how)
    return with_mixture(inputs, shape, kind, seed, exact)


def train(i: Inputs, namespace: Any = ops) -> Outputs:
    """Return y of ``lora_linear`` and the gradients of ``LEAVES`` and weights."""
    leaves = {k: i[k] for k in (*LEAVES, "weights") if i.get(k) is not None}
    leaves = {k: v.detach().clone().requires_grad_() for k, v in leaves.items()}
    values = (leaves.get(k, i[k]) for k in LEAVES)
    rest = (i[k] for k in ("adapter_ids", "scale", "ranks", "dropout_p", "seed"))
    y = namespace.lora_linear(*values, *rest, **(mixing(i) | {"weights": leaves.get("weights")}))
    wanted = list(leaves.values())
    if not y.requires_grad:  # If there are no rows, the formula does not use the leaves.
        y = y + 0 * leaves["b"].nansum()
    grads = torch.autograd.grad(y, wanted, i["dy"], allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **{f"d{k}": g for k, g in zip(leaves, grads, strict=True)}}


def train_formula(inputs: Inputs) -> Outputs:
    i = wider(inputs)
    if i.get("weights") is not None:
        i["weights"] = i["weights"].double()
    return train(i, reference)


def train_bounds(inputs: Inputs, exact: Outputs) -> Outputs:
    """Return the bounds of `cases_train`. The gradient of weights is a float32 sum, with a rounding
    for each page."""
    found = cases_train.bounds(inputs, exact, train_formula)
    if "dweights" in exact:
        signless = {
            k: v.abs() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in inputs.items()
        }
        pages = -(-inputs["a"].shape[1] // 8)
        found["dweights"] += (1 + pages) * 2.0**-24 * train_formula(signless)["dweights"]
    return found


def train_checks() -> Iterator[Check]:
    for kind in KINDS:
        i = mixed_train_inputs(SMALL[3], torch.float32, kind=kind, seed=22)
        head = [i[k].requires_grad_() for k in LEAVES]
        # Every entry has an adapter, so v is defined.
        ids = torch.arange(16) if kind != "columns" else torch.arange(48).view(16, 3) % 16
        weights, groups = i.get("weights"), i.get("groups")
        weights = weights if weights is None else weights.nan_to_num(1.0)
        leaf = weights if weights is None else weights.clone().requires_grad_()
        scale = i["scale"]
        yield "lora_linear_forward", (*head, ids, scale, None, 0.0, None, None, leaf, groups)
        x, weight, _, a, b = (t.detach() for t in head)
        v = torch.ones(*ids.shape, 8)
        tail = (a, b, ids, scale, None, None, 0.0, None, True, True, True, weights, groups)
        yield "lora_linear_backward", (i["dy"], x, v, weight, *tail, weights is not None)


def checks() -> Iterator[Check]:
    for kind in KINDS:
        i = mixed_inputs(SMALL[4], torch.float32, kind=kind, seed=16)
        i |= {k: i[k].nan_to_num(0.5) for k in "ab"}
        weights, groups = i.get("weights"), i.get("groups")
        if weights is not None:
            weights = weights.nan_to_num(1.0)
        rest = (i["adapter_ids"], i["scale"], i["ranks"], None, None)
        yield "lora_shrink", (i["x"], i["a"], *rest, weights, groups)
        yield "lora_apply_", (i["y"], i["x"], i["a"], i["b"], *rest, weights, groups)
        factors = (i[k].requires_grad_() for k in "ab")
        leaf = weights if weights is None else weights.clone().requires_grad_()
        yield "lora_apply", (i["x"], *factors, *rest, leaf, groups)
    yield "lora_plan", (torch.zeros(5, 3, dtype=torch.long), 3)


def unrounded(backend: Backend) -> list[torch.dtype]:
    """Return the dtypes in which columns are summed as in the formula; 16-bit outputs are rounded
    once per column."""
    return [d for d in backend.dtypes() if d.itemsize >= 4]


(LORA,) = cases.OPS
GEMM = Shape(270, 40, 48, (264, 0, 3), "interleaved", bank_rank=264)
ROWS: dict[str, Any] = dict(
    run=LORA.run, formula=LORA.formula, bounds=LORA.bounds, small=[*SMALL, *DEEP]
)
TRAIN: dict[str, Any] = dict(
    run=train,
    formula=train_formula,
    bounds=train_bounds,
    small=[*cases_train.SMALL, *cases_train.DEEP[:-1]],
    medium=[*cases_train.MEDIUM, GEMM],
)
PAGED = {"kind": "pages", "paged": True}

OPS = [
    Op(
        "mixtures",
        mixed_inputs,
        medium=[*MEDIUM, GEMM],
        variants=(({},), ({"kind": "groups", "paged": True},), (PAGED, {"kind": "groups"})),
        checks=checks,
        **ROWS,
    ),
    Op(
        "mixtures-columns",
        mixed_inputs,
        medium=[MEDIUM[5], MEDIUM[7], GEMM],
        variants=(({"kind": "columns"},), ({"kind": "columns", "paged": True},)),
        random={"kind": "columns"},
        threads={"kind": "columns"},
        dtypes=unrounded,
        **ROWS,
    ),
    Op(
        "mixtures-train",
        mixed_train_inputs,
        variants=(
            ({"dropout_p": 0.5},),
            ({"kind": "groups"},),
            ({"kind": "pages"}, {"kind": "groups", "dropout_p": 0.5, "base": False}),
        ),
        threads={"base": False},
        checks=train_checks,
        **TRAIN,
    ),
    Op(
        "mixtures-train-columns",
        mixed_train_inputs,
        variants=(({"kind": "columns"},), ({"kind": "columns", "dropout_p": 0.5},)),
        random={"kind": "columns"},
        threads={"kind": "columns", "base": False},
        dtypes=unrounded,
        **TRAIN,
    ),
]
