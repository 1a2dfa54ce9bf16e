"""A block sums through shared memory: the emulator's two flavours against the formula."""

import numpy as np
import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_reduction_equals_the_sum_of_each_block(emulator, n, seed):
    x = np.random.default_rng(n).integers(-4, 5, n).astype(np.float32)  # exact in any order
    out = np.full(-(-n // 256), np.nan, np.float32)
    emulator.run("reduction", x, n, out, seed=seed)
    expected = [x[i : i + 256].sum() for i in range(0, n, 256)]
    np.testing.assert_array_equal(out, expected)
