"""Inputs and table rows of linear layers with packed weights: on CUDA only of 8 and 4 bits."""

from collections.abc import Iterator
from typing import Any

import torch
from backends import Backend
from cases import _values
from contract import Check, Op, Outputs, Wrong, wrong_calls
from torch import Tensor

from lora_ext import ops, reference

DTYPES = [torch.float32, torch.bfloat16]
# Shapes are (rows, I, O), with full and partial panels of outputs, I up to and above the size of a
# chunk (128), odd I, and empty dimensions.
SHAPES = [
    (1, 1, 1), (2, 7, 31), (3, 64, 32), (5, 33, 40), (8, 128, 96), (9, 129, 65), (12, 300, 33),
    (16, 257, 70), (17, 520, 64), (31, 96, 100), (32, 255, 32), (33, 40, 50), (70, 140, 37),
    (0, 5, 6), (4, 0, 6), (4, 5, 0),
]  # fmt: skip


def make(
    shape: tuple[int, int, int], dtype: torch.dtype, exact: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    rows, wide, out = shape
    g = torch.Generator().manual_seed(rows + 7 * wide + 31 * out + 1009 * seed)
    x, weight = _values(g, exact, (rows, wide), dtype), _values(g, exact, (out, wide), dtype)
    return x, weight, _values(g, exact, (out,), dtype)


def adapters(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu"
) -> tuple[Any, ...]:
    """Return all arguments of ``lora_apply_`` after ``x``, with three adapters of rank 8."""
    rows, wide, out = shape
    g = torch.Generator().manual_seed(5)
    a, b = torch.randn(3, 8, wide, generator=g), torch.randn(3, out, 8, generator=g)
    ids = torch.randint(-1, 3, (rows,), generator=g, dtype=torch.int32)
    scale = torch.tensor([0.5, 1.0, -2.0])
    banks = tuple(t.to(device) for t in (a.to(dtype), b.to(dtype), ids, scale))
    return *banks, None, None, None, None, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return ops.packed_linear(x, ops.pack_weight(weight), bias, weight.shape[0])


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, *, seed: int = 0, exact: bool = False,
    device: str = "cpu", biased: bool = True,
) -> dict[str, Any]:  # fmt: skip
    x, weight, bias = make(shape, dtype, exact)
    return {"x": x + 0 * seed, "weight": weight, "bias": bias if biased else None}


def run(i: dict[str, Any]) -> Outputs:
    return {"packed": ops.pack_weight(i["weight"]), "y": product(i["x"], i["weight"], i["bias"])}


def formula(i: dict[str, Any]) -> Outputs:
    packed = reference.pack_weight(i["weight"])
    y = reference.packed_linear(i["x"], packed, i["bias"], i["weight"].shape[0])
    return {"packed": packed.double(), "y": y}


def bounds(i: dict[str, Any], exact: Outputs) -> Outputs:
    """Return the largest |error| allowed: one float32 rounding for each of at most I terms (two
    roundings if terms are multiplied in pairs), plus one rounding of the result."""
    last = torch.finfo(i["x"].dtype).eps / 2
    signless = {k: None if t is None else t.abs() for k, t in i.items()}
    bound = (2 * i["x"].shape[1] + 1) * 2.0**-24 * formula(signless)["y"]
    y = bound + last * (exact["y"].abs() + bound)
    return {"packed": torch.zeros_like(exact["packed"]), "y": y}


# -------------------------------------------------------------------------------------------------
# Weights of 8 and 4 bits

#: Formats, as arguments of ``pack_weight``.
FORMATS = [(8, False), (4, False), (4, True)]
# Shapes with full and partial panels, pairs of panels, and panels of more than one chunk (16 KiB).
BITS_SHAPES = [
    (1, 32, 1), (2, 64, 31), (1, 128, 64), (2, 1024, 200), (3, 128, 96), (5, 256, 40),
    (12, 384, 33), (13, 128, 65), (16, 1152, 70), (17, 640, 64), (25, 96, 100), (32, 256, 32),
    (33, 128, 50), (0, 64, 6), (4, 64, 0),
]  # fmt: skip
# Shapes with so many outputs that one block of the kernel adds all parts of a sum.
WIDE_SHAPES = [(17, 160, 12577), (40, 64, 12577)]
MANY_ROWS = [(70, 256, 37)]  # more rows than one launch of a kernel accepts


def bits_dtypes(backend: Backend) -> list[torch.dtype]:
    """Return the dtypes of activations that are supported with weights of 8 and 4 bits."""
    return DTYPES if backend.is_twin else [*DTYPES, torch.float16]


def codes(shape: tuple[int, int], bits: int, minimum: bool, group: int) -> tuple[Any, ...]:
    """Return arguments of ``pack_codes`` with which all products with small integers are exact."""
    g = torch.Generator().manual_seed(shape[0] + shape[1])
    rows, groups = shape[0], shape[1] // group
    low, high = (-127, 128) if bits == 8 else (0, 16)
    found = torch.randint(low, high, (rows, groups, group), generator=g)
    scale = 2.0 ** torch.randint(-2, 2, (rows, groups), generator=g)
    least = torch.randint(-8, 9, (rows, groups), generator=g) / 4
    return (
        found.to(torch.int8 if bits == 8 else torch.uint8),
        scale.half(),
        least.half() if minimum else None,
    )


def bits_inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, *, seed: int = 0, exact: bool = False,
    device: str = "cpu", form: tuple[int, bool] = (8, False), group: int = 32, int8: bool = False,
) -> dict[str, Any]:  # fmt: skip
    x, weight, bias = make(shape, dtype, exact, seed)
    while shape[1] % group:
        group //= 2
    given = codes((len(weight), shape[1]), *form, group) if exact else None
    if exact and int8 and shape[1]:
        x = (x % 2).contiguous()  # If the largest magnitude is 1, sums are multiples of 1 / 127.
        x[:, 0] = 127
    how = {"bits": form[0], "group": group, "minimum": form[1]}
    packed = reference.pack_weight(weight, **how)
    used = packed if given is None else reference.pack_codes(*given)
    return {"x": x.to(device), "weight": weight.to(device), "bias": bias.to(device),
            "packed": used.to(device), "how": how, "int8": int8}  # fmt: skip


def run_bits(i: dict[str, Any]) -> Outputs:
    packed = ops.pack_weight(i["weight"], **i["how"])
    weight = ops.unpack_weight(i["packed"], *i["weight"].shape)
    return {"packed": packed, "weight": weight, **bits_product(i)}


def bits_product(i: dict[str, Any]) -> Outputs:
    rest = i["bias"], len(i["weight"]), i["int8"]
    return {"y": ops.packed_linear(i["x"], i["packed"], *rest)}


def bits_formula(i: dict[str, Any]) -> Outputs:
    i = on_cpu(i)
    packed = reference.pack_weight(i["weight"], **i["how"])
    y = reference.packed_linear(i["x"], i["packed"], i["bias"], len(i["weight"]), i["int8"])
    weight = reference.unpack_weight(i["packed"], *i["weight"].shape)
    return {"packed": packed.double(), "weight": weight.double(), "y": y}


def on_cpu(i: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in i.items()}


def bits_bounds(i: dict[str, Any], exact: Outputs) -> Outputs:
    """Return the largest |error| allowed: one float32 rounding for each term and five for each
    group, relative to the magnitudes of the centred terms, plus one rounding of the result.

    A tensor core adds 17 numbers and cuts each below 2^-23 of the largest, and then the sum: 36
    roundings for 16 in-features. A sum of 32 in-features has up to three products for each 16.
    Twins may round inputs to multiples of 2^-22 of the largest magnitude of their group.
    """
    cuts = 2 * 36 * (3 if i["x"].dtype == torch.float32 else 1) if i["x"].is_cuda else 0
    i = on_cpu(i)
    found, scale, least = reference.quantise(i["weight"], **i["how"])
    centre = 8 if i["how"]["bits"] == 4 else 0
    scale = scale.double()[..., None]
    at_centre = 0 if least is None else least.double()[..., None] + 8 * scale
    if i["int8"] and centre:  # These codes are not centred: see the layout of PackedBitsArgs.
        centre, at_centre = 0, 8 * scale if least is None else least.double()[..., None]
    size = (scale * (found.double() - centre)).abs() + abs(at_centre)
    # Rounding to int8 may increase the magnitude of an input by half a step; a step is added here.
    x = i["x"].double().abs()
    if i["int8"] and x.numel():
        x = x + x.amax(1, keepdim=True) / 127
    wide = i["x"].shape[1]
    terms = x @ size.flatten(1).t() + i["bias"].double().abs()
    bound = (wide + 5 * (wide // i["how"]["group"]) + 1 + cuts) * 2.0**-24 * terms
    if i["x"].numel() and not i["int8"]:
        largest = x.unflatten(1, (-1, i["how"]["group"])).amax(2)  # (T, groups)
        bound += 2.0**-23 * largest @ size.sum(2).t()
    y = bound + torch.finfo(i["x"].dtype).eps / 2 * (exact["y"].abs() + bound)
    # The formula and the loop both round scale * code + minimum once to float32.
    weight = 2.0**-23 * exact["weight"].abs()
    return {"packed": torch.zeros_like(exact["packed"]), "weight": weight, "y": y}


def checks() -> Iterator[Check]:
    w = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    for bits, minimum in FORMATS:
        packed = ops.pack_weight(w, bits=bits, group=32, minimum=minimum)
        yield "pack_weight", (w, bits, 32, minimum)
        yield "unpack_weight", (packed, 40, 64)
        yield "unpack_weight", (packed, 40, 64, torch.bfloat16)
        yield "packed_linear", (w[:3].contiguous(), packed, w[:, 0].contiguous(), 40, bits == 8)
        update = adapters((3, 64, 40), torch.float32)
        yield "packed_lora_linear", (w[:3].view(3, 1, 64), packed, None, 40, bits == 8, *update)
    for dtype in DTYPES:
        x, weight, bias = make((5, 33, 40), dtype, exact=False)
        update = adapters((5, 33, 40), dtype)
        yield "packed_lora_linear", (x, ops.pack_weight(weight), bias, 40, False, *update)
        yield "pack_weight", (weight,)
        yield "packed_linear", (x, ops.pack_weight(weight), bias, 40)


def wrong(device: str) -> list[Wrong]:
    x, w, pack = torch.zeros(3, 4), torch.zeros(40, 4), ops.pack_weight
    half, thin = x.bfloat16(), w[:, :3].bfloat16()
    pair, of = pack(w.bfloat16()), r"packed: expected pack_weight\(\) of a weight \(40,"
    apart = pack(w).transpose(0, 1).contiguous().transpose(0, 1)
    of_weights = [
        (r"weight: expected shape \(O, I\), found \[4\]", w[0]),
        ("weight: expected float32 or bfloat16, found Double", w.double()),
    ]
    deep = torch.zeros(40, 64)
    eight: dict[str, Any] = {"bits": 8, "group": 32}
    packed, of_bits = pack(deep, **eight), r"packed: expected pack_weight\(\) of a weight"
    thin_row, holed, huge = deep[:, :32].contiguous(), deep.clone(), deep.clone()
    holed[3, 5], huge[3, 5] = torch.nan, -1e5
    of_bits_weights = [
        ("bits: expected None, 8 or 4, found 3", deep, {"bits": 3}),
        ("group: expected 32, 64 or 128, found 48", deep, {"bits": 8, "group": 48}),
        ("group: expected a divisor of the 64 in-features of weight, found 128", deep,
         {"bits": 4, "group": 128}),
        ("minimum: expected False if bits is 8, found True", deep, {"bits": 8, "minimum": True}),
        ("minimum: expected False if bits is None, found True", deep, {"minimum": True}),
        ("weight: expected finite values of at most 65504, found values from -?nan", holed,
         {"bits": 8}),
        ("weight: expected finite values of at most 65504, found values from -100000", huge,
         {"bits": 4}),
        (r"weight: expected shape \(O, I\), found \[64\]", deep[0], eight),
    ]  # fmt: skip
    of_bits_products = [
        (rf"{of_bits} \(40, 64\) with bits=8 or 4, found \[2, 2, 1087", deep[:3],
         packed[..., 1:].contiguous(), None, 40),
        (rf"{of_bits} \(65, 64\)", deep[:3], packed, None, 65),
        # Blocks of 4 bits have as many bytes as those of 8 bits with half the group.
        (rf"{of_bits} \(40, 32\).*found \[2, 1, 2, 544", thin_row, pack(deep, bits=4), None, 40),
        (rf"{of_bits} \(40, 64\).*found \[2, 1, 1088", deep[:3], pack(thin_row, **eight), None, 40),
        (rf"{of_bits} \(40, 4\)", x, packed, None, 40),
        (r"bias: expected shape \(O,\) = \[40\]", deep[:3], packed, torch.zeros(64), 40),
        ("int8: expected False for a weight that has no codes, found True", x, pack(w), None, 40,
         True),
    ]  # fmt: skip
    of_products = [
        (r"x: expected shape \(T, I\), found \[4\]", x[0], pack(w)),
        ("x: expected float32 or bfloat16, found Half", x.half(), pack(w)),
        ("packed: expected the dtype of x, BFloat16, found Float", half, pack(w)),
        (rf"{of} 3\), shape \[2, 3, 32\], found \[2, 4", x[:, :3], pack(w), None, 40),
        (rf"{of} 4\), shape \[2, 2, 32, 2\], found \[2, 2, 64", half, pack(thin), None, 40),
        (rf"{of} 3\), shape \[2, 2, 64\], found \[2, 2, 32", half[:, :3], pair, None, 40),
        (r"packed: expected pack_weight\(\) of a weight \(65, 4\)", x, pack(w), None, 65),
        ("packed: expected a contiguous tensor", x, apart, None, 40),
        (r"bias: expected shape \(O,\) = \[40\], found \[64\]", x, pack(w), torch.zeros(64), 40),
        ("out_features: expected at least 0, found -1", x, pack(w), None, -1),
    ]
    product, (a, b, ids, *rest) = (packed, None, 40, False), adapters((3, 64, 40), w.dtype)
    of_sums = [
        (r"x: expected shape \(\.\.\., I\), found \[\]", w[0, 0], product, (a, b, ids, *rest)),
        (rf"{of_bits} \(40, 4\)", x, product, (a, b, ids, *rest)),
        (r"a.shape\[2\]: expected x.shape\[1\] = 64, found 63", deep[:3], product,
         (a[..., 1:], b, ids, *rest)),
        (r"a: expected the dtype of x, Float, found Double", deep[:3], product,
         (a.double(), b, ids, *rest)),
        ("adapter_ids: ", deep[:3], product, (a, b, ids[:2], *rest)),
    ]  # fmt: skip
    return [
        *wrong_calls("pack_weight", pack, of_weights),
        *wrong_calls("packed_lora_linear", ops.packed_lora_linear, of_sums),
        *wrong_calls("packed_linear", ops.packed_linear, of_products),
        *wrong_calls("packed_linear", ops.packed_linear, of_bits_products),
        *((f"pack_weight: {text}", lambda t=t, how=how: pack(t, **how))
          for text, t, how in of_bits_weights),
        *wrong_calls(
            "unpack_weight", ops.unpack_weight, [(rf"{of_bits} \(40, 32\)", packed, 40, 32)]
        ),
    ]  # fmt: skip


OPS = [
    Op(
        "packed_linear",
        inputs,
        run,
        formula,
        bounds,
        small=SHAPES,
        variants=(({"biased": True},), ({"biased": False},)),
        dtypes=lambda backend: DTYPES,
        on_gpu=False,
        checks=checks,
        wrong=wrong,
    ),
    Op(
        "packed_bits",
        bits_inputs,
        run_bits,
        bits_formula,
        bits_bounds,
        small=BITS_SHAPES,
        medium=WIDE_SHAPES,
        large=MANY_ROWS,
        variants=tuple(
            tuple({"form": form, "group": group} for form in FORMATS) for group in (32, 64, 128)
        ),
        dtypes=bits_dtypes,
        captured=bits_product,
    ),
    Op(
        "packed_bits_int8",
        bits_inputs,
        run_bits,
        bits_formula,
        bits_bounds,
        small=[*BITS_SHAPES, *MANY_ROWS],
        variants=(tuple({"form": form, "group": 64, "int8": True} for form in FORMATS),),
        dtypes=lambda backend: DTYPES,
        on_gpu=False,
    ),
]
