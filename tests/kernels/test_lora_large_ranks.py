"""Kernels for ranks above 256, which use matrix products, are bitwise equal for all tile sizes."""

import pytest
import torch
from backends import Backend
from cases import CASES, Inputs, Shape, make_inputs, wider
from cases_train import bounds, formula, run, train_inputs
from contract import assert_same_bits, pairwise, within

from lora_ext import ops

APPLY_ = next(c for c in CASES if c.name == "lora_apply_")
# Numbers of rows with chunks of 16, 64 and 128 rows. Most have no adapter and cost no time.
ROWS = [20, 270, 4100]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def among_idle_rows(inputs: Inputs, rows: int) -> Inputs:
    """Return a batch of ``rows`` rows. The last ones are the given rows; the others are NaN and
    have no adapter."""
    wider_batch = dict(inputs)
    for name, value in inputs.items():
        if name in ("x", "y", "dy"):
            idle = value.new_full((rows - len(value), value.shape[1]), torch.nan)
            wider_batch[name] = torch.cat([idle, value])
        elif name == "adapter_ids":
            wider_batch[name] = torch.cat([value.new_full((rows - len(value),), -1), value])
    return wider_batch


def skip_unless_kernels(backend: Backend, rows: int = 0, dtype: torch.dtype | None = None) -> None:
    if backend.is_twin:
        pytest.skip("this test runs only on kernels")
    if backend.small and dtype not in (None, torch.bfloat16):
        pytest.skip("one dtype is enough for the emulator that checks every access")
    if backend.small and rows > 1000:
        pytest.skip("too many rows for this backend")


TILES = [
    Shape(19, 72, 136, (300, 8, 0, 40), "interleaved"),  # two column tiles without a remainder
    Shape(18, 37, 131, (1030, 5, 257), "interleaved", bank_rank=1030),  # no dimension is aligned
]


@pytest.mark.parametrize(
    ("dtype", "rows", "shape", "paged"), pairwise(DTYPES, ROWS, TILES, [False, True]), ids=str
)
def test_mixed_ranks_in_every_tile_stay_within_the_bound(
    backend: Backend, shape: Shape, paged: bool, rows: int, dtype: torch.dtype
) -> None:
    skip_unless_kernels(backend, rows)
    inputs = make_inputs(shape, dtype, paged=paged, device=backend.device)
    got = APPLY_.call(among_idle_rows(inputs, rows))[-shape.tokens :]
    exact = APPLY_.formula(wider(inputs))
    within({"y": got}, {"y": exact}, {"y": APPLY_.bound(inputs, exact)})


@every_dtype
def test_update_is_bitwise_equal_for_all_tile_sizes(backend: Backend, dtype: torch.dtype) -> None:
    skip_unless_kernels(backend)
    shape = Shape(19, 8, 40, (272, 24), "interleaved")
    inputs = make_inputs(shape, dtype, device=backend.device)
    v = torch.randn(shape.tokens, 272, generator=torch.Generator().manual_seed(0))

    def expand(rows: int) -> torch.Tensor:
        i = among_idle_rows(inputs | {"dy": v.to(backend.device)}, rows)
        y = ops.lora_expand_(i["y"], i["dy"], i["b"], i["adapter_ids"], i["ranks"])
        return y[-shape.tokens :]

    few = expand(19)
    for rows in [270] if backend.small else [270, 4100]:
        assert_same_bits(expand(rows), few, f"{rows} rows: ")


@every_dtype
@pytest.mark.parametrize("features", [1100, 40], ids=["slices", "one slice"])
def test_training_is_bitwise_equal_for_all_tile_sizes(
    backend: Backend, features: int, dtype: torch.dtype
) -> None:
    """Compare with a batch of 18 rows. Up to 256 rows, the kernels for small ranks also process
    large ranks."""
    skip_unless_kernels(backend, dtype=dtype)
    small = backend.small
    shape = Shape(18, 64 if small else features, 40, (264, 9), "interleaved")
    inputs = train_inputs(shape, dtype, dropout_p=0.0, base=False, device=backend.device)

    def step(rows: int) -> dict[str, torch.Tensor]:
        i = among_idle_rows(inputs, rows)
        # The NaN of idle rows would reach dx.
        i["x"], i["dy"] = i["x"].nan_to_num(), i["dy"].nan_to_num()
        got = run(i)
        return {k: v[-shape.tokens :] if k in ("y", "dx") else v for k, v in got.items()}

    few = step(18)
    for rows in [270] if small else [270, 4100]:
        for name, value in step(rows).items():
            assert_same_bits(value, few[name], f"{rows} rows, {name}: ")


@every_dtype
def test_block_that_iterates_over_slices_equals_separate_blocks_bitwise(
    backend: Backend, dtype: torch.dtype
) -> None:
    """Check a bank with so many ranks that the tiles fill the GPU. Each block then processes all
    slices."""
    skip_unless_kernels(backend, dtype=dtype)
    rank, tiles = 264, 264
    shape = Shape(18, 1100, 8 if backend.small else 1030, (rank, 9), "interleaved")
    inputs = among_idle_rows(
        train_inputs(shape, dtype, dropout_p=0.0, base=False, device=backend.device), 270
    )
    inputs["x"], inputs["dy"] = inputs["x"].nan_to_num(), inputs["dy"].nan_to_num()

    def step(bank_rank: int) -> dict[str, torch.Tensor]:
        i, a, b = dict(inputs), inputs["a"], inputs["b"]
        i["a"] = a.new_full((2, bank_rank, a.shape[2]), torch.nan)
        i["b"] = b.new_full((2, b.shape[1], bank_rank), torch.nan)
        i["a"][:, :rank], i["b"][:, :, :rank] = a, b
        got = run(i)
        return got | {"da": got["da"][:, :rank], "db": got["db"][:, :, :rank]}

    # 270 rows are 5 chunks of up to 64 rows.
    apart, walked = step(rank), step(-(-tiles // 5) * 128)
    for name, value in walked.items():
        assert_same_bits(value, apart[name], f"{name}: ")


@every_dtype
def test_gradients_with_dropout_stay_within_the_bound(backend: Backend, dtype: torch.dtype) -> None:
    skip_unless_kernels(backend, dtype=dtype)
    shape = Shape(260, 40, 136, (300, 8, 0, 40), "uniform")
    inputs = train_inputs(shape, dtype, dropout_p=0.25, base=False, device=backend.device)
    inputs["adapter_ids"][:220] = -1
    exact = formula(inputs)
    within(run(inputs), exact, bounds(inputs, exact))


@every_dtype
@pytest.mark.parametrize("wide_input", [True, False], ids=["da", "db"])
def test_gradients_of_many_tiles_stay_within_the_bound(
    backend: Backend, wide_input: bool, dtype: torch.dtype
) -> None:
    """Check gradients of at least 64 tiles, which are computed as grouped matrix products. Operands
    are aligned for da and unaligned for db."""
    skip_unless_kernels(backend, dtype=dtype)
    if backend.small and not wide_input:
        pytest.skip("one case is enough for the checking emulator")
    width = 904 if dtype == torch.bfloat16 else 456  # 8 tiles of 128 or 64 columns
    if wide_input:
        shape = Shape(40, width, 8, (1032, 8), "skewed")
    else:  # 150 rows need several 32-row stages of the ring buffer.
        shape = Shape(150, 5, width - 3, (8, 1030), "skewed", bank_rank=1030)
    inputs = train_inputs(shape, dtype, dropout_p=0.25, base=False, device=backend.device)
    exact = formula(inputs)
    within(run(inputs), exact, bounds(inputs, exact))
