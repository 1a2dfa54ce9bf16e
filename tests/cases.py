"""Inputs, error bounds and table rows of the LoRA ops."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from contract import Check, Op, Outputs, wide
from torch import Tensor

from lora_ext import ops, reference

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a call: ``tokens`` rows, ``wide`` inputs, ``out`` outputs, one rank per adapter."""

    tokens: int
    wide: int
    out: int
    ranks: tuple[int, ...]
    pattern: str = "uniform"  # how adapters are assigned to rows, see `assign`
    bank_rank: int | None = None  # R of the bank; None: the largest rank, rounded up to 8

    @property
    def max_rank(self) -> int:
        return self.bank_rank or max(8, -(-max(self.ranks, default=0) // 8) * 8)

    def __str__(self) -> str:
        ranks = ",".join(map(str, self.ranks[:4])) + ("..." if len(self.ranks) > 4 else "")
        odd = f"of{self.bank_rank}" if self.bank_rank else ""
        return f"T{self.tokens}-{self.wide}x{self.out}-r{ranks}{odd}-{self.pattern}"


SMALL = [
    Shape(1, 64, 64, (8,)),
    Shape(1, 1, 1, (1,)),
    Shape(3, 17, 5, (4, 0, 7), bank_rank=7),
    Shape(16, 64, 96, (8,) * 16, "distinct"),
    Shape(17, 72, 40, (16, 3), "skewed"),
    Shape(33, 40, 31, (1, 2, 9, 24), "half"),
    Shape(40, 96, 64, (32,), "identical"),
    Shape(5, 24, 16, (8, 8), "none"),
    Shape(70, 48, 56, (5, 64, 16), "interleaved"),
]
MEDIUM = [
    Shape(0, 64, 64, (8,)),
    Shape(2, 2049, 67, (16, 8), bank_rank=16),
    Shape(7, 576, 1536, (8, 16, 32, 64), "distinct"),
    Shape(64, 1100, 288, (16,) * 64, "distinct"),
    Shape(133, 127, 251, (4, 256, 1, 96), "zipf"),
    Shape(256, 192, 576, (8, 0, 16), "uniform"),
    Shape(257, 576, 192, (16, 64), "contiguous"),
    Shape(300, 130, 514, (12, 24, 40), "uniform", bank_rank=42),
    Shape(1000, 200, 136, (8,) * 5 + (128,), "contiguous"),
]
# Ranks that need several tiles, mixed with rank 0 and ranks of one tile; small enough for
# emulators.
DEEP = [
    Shape(5, 24, 17, (257,), bank_rank=257),
    Shape(18, 40, 24, (300, 8, 0), "interleaved", bank_rank=300),
    Shape(9, 16, 33, (512, 40)),
    Shape(20, 33, 16, (1024, 0, 8, 40), "uniform"),
    Shape(3, 8, 8, (1032,), "identical"),
]
LARGE = [
    Shape(64, 3424, 2368, (8, 16, 32, 64), "uniform"),
    Shape(4100, 136, 40, (16, 8), "contiguous"),
    Shape(8195, 40, 24, (8, 3, 0), "uniform"),
]


def assign(shape: Shape, g: torch.Generator) -> Tensor:
    """Return the adapter id of each row, arranged by ``shape.pattern``; some ids may be -1."""
    t, a = shape.tokens, len(shape.ranks)
    if shape.pattern == "none" or a == 0:
        return torch.full((t,), -1)
    ids = torch.randint(-1, a, (t,), generator=g)
    match shape.pattern:
        case "distinct":
            ids = torch.randperm(max(t, a), generator=g)[:t] % a
        case "identical":
            ids = torch.full((t,), a - 1)
        case "skewed":
            ids = torch.where(torch.rand(t, generator=g) < 0.9, a - 1, ids)
        case "half":
            ids = torch.where(torch.arange(t) % 2 == 0, -1, ids.clamp(min=0))
        case "interleaved":
            ids = torch.arange(t) % a
        case "contiguous":
            ids = torch.sort(ids.clamp(min=0)).values
        case "zipf" if t > 0:  # multinomial needs at least one draw
            weights = 1 / torch.arange(1, a + 1)
            ids = torch.multinomial(weights, t, replacement=True, generator=g)
    return ids


def _values(
    g: torch.Generator, exact: bool, size: tuple[int, ...], dtype: torch.dtype, spread: float = 1.0
) -> Tensor:
    if exact:  # Partial sums are small integers, so any order gives the same bits.
        return torch.randint(-1, 2, size, generator=g).to(dtype)
    return (torch.randn(size, generator=g, dtype=torch.float64) * spread).to(dtype)


def to_pages(
    a: Tensor, b: Tensor, ranks: Tensor, g: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pages of A and B in shuffled order, with one unused page, and the page table.
    Table entries beyond the rank of an adapter are -1."""
    slots, max_rank, wide = a.shape
    per_slot = -(-max_rank // 8)
    pad = per_slot * 8 - max_rank
    a = torch.nn.functional.pad(a, (0, 0, 0, pad), value=float("nan"))
    b = torch.nn.functional.pad(b, (0, pad), value=float("nan"))
    needed = torch.arange(per_slot) * 8 < ranks[:, None]
    order = torch.randperm(slots * per_slot + 1, generator=g)[: slots * per_slot]
    table = torch.where(needed, order.reshape(slots, per_slot), -1).int()
    pages_a = a.new_full((slots * per_slot + 1, 8, wide), float("nan"))
    pages_b = b.new_full((slots * per_slot + 1, b.shape[1], 8), float("nan"))
    pages_a[order] = a.reshape(-1, 8, wide)
    pages_b[order] = b.reshape(slots, b.shape[1], per_slot, 8).transpose(1, 2).flatten(0, 1)
    return pages_a, pages_b, table


def make_inputs(
    shape: Shape,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    exact: bool = False,
    paged: bool = False,
    device: str = "cpu",
) -> Inputs:
    """Return the inputs of every LoRA op. Entries of a and b beyond the rank of an adapter are NaN,
    so reading one makes the result NaN."""
    g = torch.Generator().manual_seed(seed)
    slots, rank = len(shape.ranks), shape.max_rank
    ranks = torch.tensor(shape.ranks, dtype=torch.int32)
    a = _values(g, exact, (slots, rank, shape.wide), dtype, shape.wide**-0.5)
    b = _values(g, exact, (slots, shape.out, rank), dtype)
    beyond = torch.arange(rank) >= ranks[:, None]
    a = torch.where(beyond[:, :, None], torch.nan, a)
    b = torch.where(beyond[:, None, :], torch.nan, b)
    inputs: Inputs = {
        "x": _values(g, exact, (shape.tokens, shape.wide), dtype),
        "y": _values(g, exact, (shape.tokens, shape.out), dtype),
        "a": a,
        "b": b,
        "adapter_ids": assign(shape, g),
        "scale": 2.0 ** torch.randint(-1, 2, (slots,), generator=g).float(),
        "ranks": ranks,
        "page_table": None,
    }
    if paged:
        inputs["a"], inputs["b"], inputs["page_table"] = to_pages(a, b, ranks, g)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def wider(inputs: Inputs) -> Inputs:
    return wide(inputs, keep=("scale", "weights"))


def mixing(inputs: Inputs, signless: bool = False) -> Inputs:
    """Return the arguments of a mixture, if the inputs have any (``cases_mixtures``)."""
    found = {k: inputs[k] for k in ("weights", "groups") if inputs.get(k) is not None}
    return {k: v.abs() for k, v in found.items()} if signless else found


ROUNDING = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# 16-bit matrix products read v as the sum hi + lo of two 16-bit numbers. This is the largest error
# of the sum, relative to |v|.
SPLIT = {torch.float16: 2.0**-21, torch.bfloat16: 2.0**-16}


def bound(inputs: Inputs, result: Tensor, start: Tensor | None) -> Tensor:
    """Return the largest |error| allowed for each entry of y.

    It is the sum of the final rounding of ``result``, the error of v as the sum of two 16-bit
    numbers (`SPLIT`), and the errors of accumulating I and then R products. The constant factor of
    the accumulation errors covers float32 fused multiply-adds and tensor cores.
    """
    dtype = inputs["x"].dtype
    exactly = wider(inputs)
    magnitudes = {k: exactly[k].abs() for k in ("x", "a", "b")}
    args = (exactly["adapter_ids"], exactly["scale"], exactly["ranks"], exactly["page_table"])
    signless = mixing(exactly, signless=True)
    of_scale = (args[0], args[1].abs(), *args[2:])
    v = reference.lora_shrink(magnitudes["x"], magnitudes["a"], *of_scale, **signless)
    total = reference.lora_update(v, magnitudes["b"], args[0], *args[2:])
    v_exact = reference.lora_shrink(exactly["x"], exactly["a"], *args, **mixing(exactly)).abs()
    split = SPLIT.get(dtype, 0.0) * reference.lora_update(
        v_exact, magnitudes["b"], args[0], *args[2:]
    )
    if start is not None:
        total = total + start.cpu().double().abs()
    accumulator = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    constant = 16 + inputs["x"].shape[1] ** 0.5 / 2
    tiny = torch.finfo(dtype).smallest_normal  # Smaller numbers have a constant spacing.
    return 1.02 * ROUNDING[dtype] * (result.abs() + tiny) + split + constant * accumulator * total


def v_bound(inputs: Inputs) -> Tensor:
    """Return the largest |error| allowed for v: the errors of accumulating I products and of
    multiplying by the scale."""
    exactly = wider(inputs)
    rest = (exactly["scale"].abs(), exactly["ranks"], exactly["page_table"])
    args = (exactly["adapter_ids"], *rest)
    signless = mixing(exactly, signless=True)
    total = reference.lora_shrink(exactly["x"].abs(), exactly["a"].abs(), *args, **signless)
    accumulator = 2.0**-53 if inputs["x"].dtype == torch.float64 else 2.0**-24
    return (16 + inputs["x"].shape[1] ** 0.5 / 2) * accumulator * total


@dataclass(frozen=True)
class OpCase:
    """Call, formula and error bound of one op on the same inputs."""

    name: str
    call: Callable[[Inputs], Tensor]
    formula: Callable[[Inputs], Tensor]
    bound: Callable[[Inputs, Tensor], Tensor]
    differentiable: tuple[str, ...] = field(default=())


def _tail(i: Inputs) -> tuple[Tensor, ...]:
    return i["adapter_ids"], i["scale"], i["ranks"], i["page_table"]


def _v(i: Inputs) -> Tensor:
    """Return v, computed by the reference, in the dtype of the accumulator. It is the input for
    tests of expand alone."""
    exactly = wider(i)
    v = reference.lora_shrink(exactly["x"], exactly["a"], *_tail(exactly), **mixing(exactly))
    return v.to(i["x"].device, torch.float64 if i["x"].dtype == torch.float64 else torch.float32)


CASES = [
    OpCase(
        "lora_shrink",
        lambda i: ops.lora_shrink(i["x"], i["a"], *_tail(i), plan=i.get("plan"), **mixing(i)),
        lambda i: reference.lora_shrink(i["x"], i["a"], *_tail(i), **mixing(i)),
        lambda i, _: v_bound(i),
    ),
    OpCase(
        "lora_expand_",
        lambda i: ops.lora_expand_(
            i["y"].clone(), _v(i), i["b"], i["adapter_ids"], *_tail(i)[2:], plan=i.get("plan")
        ),
        lambda i: reference.lora_expand_(
            i["y"].clone(), _v(i), i["b"], i["adapter_ids"], *_tail(i)[2:]
        ),
        lambda i, r: bound(i, r, i["y"]),
    ),
    OpCase(
        "lora_apply",
        lambda i: ops.lora_apply(
            i["x"], i["a"], i["b"], *_tail(i), plan=i.get("plan"), **mixing(i)
        ),
        lambda i: reference.lora_apply(i["x"], i["a"], i["b"], *_tail(i), **mixing(i)),
        lambda i, r: bound(i, r, None),
        ("x", "a", "b"),
    ),
    OpCase(
        "lora_apply_",
        lambda i: ops.lora_apply_(
            i["y"].clone(), i["x"], i["a"], i["b"], *_tail(i), plan=i.get("plan"), **mixing(i)
        ),
        lambda i: reference.lora_apply_(
            i["y"].clone(), i["x"], i["a"], i["b"], *_tail(i), **mixing(i)
        ),
        lambda i, r: bound(i, r, i["y"]),
    ),
]

APPLY_ = CASES[-1]


def checks() -> Iterator[Check]:
    for paged in (False, True):
        i = make_inputs(SMALL[4], torch.float32, seed=16, paged=paged)
        i |= {k: i[k].nan_to_num(0.5) for k in "ab"}
        ids, scale, rest = i["adapter_ids"], i["scale"], (i["ranks"], i["page_table"], None)
        yield "lora_shrink", (i["x"], i["a"], ids, scale, *rest)
        v = i["y"].new_ones(17, SMALL[4].max_rank)
        yield "lora_expand_", (i["y"], v, i["b"], ids, *rest)
        yield "lora_apply_", (i["y"], i["x"], i["a"], i["b"], ids, scale, *rest)
        factors = (i[k].requires_grad_(not paged) for k in "ab")
        yield "lora_apply", (i["x"], *factors, ids, scale, *rest)
    for tokens in (0, 5, 256, 257, 5000):
        yield "lora_plan", (torch.zeros(tokens, dtype=torch.long), 3)


def _outputs(of: Callable[[OpCase], Tensor]) -> Outputs:
    return {case.name: of(case) for case in CASES}


OPS = [
    Op(
        "lora",
        make_inputs,
        run=lambda i: _outputs(lambda case: case.call(i)),
        formula=lambda i: _outputs(lambda case: case.formula(wider(i))),
        bounds=lambda i, exact: _outputs(lambda case: case.bound(i, exact[case.name])),
        small=[*SMALL, *DEEP],
        medium=[*MEDIUM, *LARGE],
        variants=(({"paged": True},), ({},)),
        captured=lambda i: {"y": APPLY_.call(i)},
        checks=checks,
    )
]
