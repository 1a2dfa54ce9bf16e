"""Matrix products and sums of small integers, whose partial sums are exact in any order."""

import numpy as np
import pytest

pytestmark = pytest.mark.slow

SHAPES = [(32, 32, 32), (1, 1, 8), (33, 31, 40), (31, 65, 8), (64, 32, 136), (17, 9, 224)]


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """Return the values in the format ``kind``, as bits: bf16 (the upper half of a float32), f16,
    or float32 for tf32."""
    if kind == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16 if kind == "f16" else np.float32)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_matmul_is_exact_at_every_tail(emulator, kind, seed):
    for m, n, k in SHAPES:
        rng = np.random.default_rng(m * n + k)
        x, w = rng.integers(-4, 5, (m, k)), rng.integers(-4, 5, (n, k))
        y = np.full((m, n), np.nan, np.float32)
        emulator.run(f"matmul_{kind}", encode(x, kind), encode(w, kind), y, m, n, k, seed=seed)
        np.testing.assert_array_equal(y, x @ w.T, err_msg=f"{m, n, k}")


@pytest.mark.parametrize("cp_async", [1, 2], ids=["late", "early"])
def test_matmul_does_not_depend_on_when_asynchronous_copies_finish(emulator, cp_async):
    m, n, k = 33, 33, 136
    rng = np.random.default_rng(7)
    x, w = rng.integers(-4, 5, (m, k)), rng.integers(-4, 5, (n, k))
    y = np.full((m, n), np.nan, np.float32)
    emulator.run(
        "matmul_bf16", encode(x, "bf16"), encode(w, "bf16"), y, m, n, k, seed=3, cp_async=cp_async
    )
    np.testing.assert_array_equal(y, x @ w.T)


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_reduction_equals_the_sum_of_each_block(emulator, n, seed):
    x = np.random.default_rng(n).integers(-4, 5, n).astype(np.float32)  # exact in any order
    out = np.full(-(-n // 256), np.nan, np.float32)
    emulator.run("reduction", x, n, out, seed=seed)
    expected = [x[i : i + 256].sum() for i in range(0, n, 256)]
    np.testing.assert_array_equal(out, expected)
