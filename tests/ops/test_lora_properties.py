"""Properties of the LoRA op for every batch, searched with hypothesis."""

from __future__ import annotations

import torch
from cases import Shape, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ext import ops, reference

PATTERNS = ["uniform", "distinct", "identical", "skewed", "half", "contiguous", "zipf", "none"]
ranks = st.lists(st.integers(0, 40), min_size=1, max_size=6)
sizes = st.integers(1, 70)
shapes = st.builds(
    lambda tokens, wide, out, ranks, pattern: Shape(tokens, wide, out, tuple(ranks), pattern),
    st.integers(0, 90), sizes, sizes, ranks, st.sampled_from(PATTERNS),
)  # fmt: skip
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
KEYS = ("x", "a", "b", "adapter_ids", "scale", "ranks", "page_table")


@settings(max_examples=150)
@given(shape=shapes, dtype=dtypes, paged=st.booleans(), seed=st.integers(0, 99))
def test_any_batch_equals_the_formula(
    shape: Shape, dtype: torch.dtype, paged: bool, seed: int
) -> None:
    i = make_inputs(shape, dtype, seed=seed, exact=True, paged=paged)
    arguments = [i[k] for k in KEYS]
    expected = reference.lora_apply_(i["y"].clone(), *arguments)
    assert torch.equal(ops.lora_apply_(i["y"].clone(), *arguments), expected)


@settings(max_examples=60)
@given(shape=shapes, cut=st.integers(0, 90), seed=st.integers(0, 99))
def test_batch_may_be_split_anywhere(shape: Shape, cut: int, seed: int) -> None:
    i = make_inputs(shape, torch.float32, seed=seed)
    whole = ops.lora_apply(*(i[k] for k in KEYS))
    rows = ("x", "adapter_ids")
    parts = [
        ops.lora_apply(*(i[k][piece] if k in rows else i[k] for k in KEYS))
        for piece in (slice(None, cut), slice(cut, None))
    ]
    assert torch.equal(torch.cat(parts), whole)


@settings(max_examples=60)
@given(shape=shapes, seed=st.integers(0, 99))
def test_zero_scale_equals_the_base_model(shape: Shape, seed: int) -> None:
    i = make_inputs(shape, torch.float32, seed=seed)
    i["scale"] = torch.zeros_like(i["scale"])
    y = ops.lora_apply_(i["y"].clone(), *(i[k] for k in KEYS))
    assert torch.equal(y, i["y"])


@settings(max_examples=60)
@given(shape=shapes, seed=st.integers(0, 99))
def test_shrink_then_expand_equals_apply(shape: Shape, seed: int) -> None:
    i = make_inputs(shape, torch.float32, seed=seed)
    v = ops.lora_shrink(*(i[k] for k in KEYS if k != "b"))
    tail = (i["adapter_ids"], i["ranks"], i["page_table"])
    halves = ops.lora_expand_(i["y"].clone(), v, i["b"], *tail)
    assert torch.equal(halves, ops.lora_apply_(i["y"].clone(), *(i[k] for k in KEYS)))


def test_a_hundred_runs_give_the_same_bits() -> None:
    i = make_inputs(Shape(40, 300, 200, (8, 16, 32, 64)), torch.float32, seed=1)
    first = ops.lora_apply_(i["y"].clone(), *(i[k] for k in KEYS))
    for _ in range(100):
        assert torch.equal(ops.lora_apply_(i["y"].clone(), *(i[k] for k in KEYS)), first)
