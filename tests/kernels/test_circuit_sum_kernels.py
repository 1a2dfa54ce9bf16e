"""Sum layers on tensor cores: both modes compared with float64, and terms that would underflow."""

import pytest
import torch
from backends import Backend

from lora_ext import ops, reference

# Bounds per layer: each term has two roundings of 2^-12 (fp16s) or 2^-17 (high); the rest is
# float32.
MODES = {"fp16s": 2.0**-10, "high": 2.0**-15}
SHAPES = [(1, 1, 1), (16, 8, 32), (17, 9, 33), (5, 130, 70), (40, 256, 250), (3, 20, 256)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_of_both_modes_stay_within_their_bounds(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int, int], mode: str
) -> None:
    rows, sums, terms = shape
    g = torch.Generator().manual_seed(0)
    w = (2 * torch.randn(2, sums, terms, generator=g)).to(dtype)
    values = 5 * torch.randn(2, rows, terms, generator=g)
    w[torch.rand(w.shape, generator=g) < 0.1] = -torch.inf
    values[torch.rand(values.shape, generator=g) < 0.1] = -torch.inf
    expected = reference.log_einsum_exp(w.double(), values.double())
    got = (
        ops.log_einsum_exp(w.to(backend.device), values.to(backend.device), precision=mode)
        .cpu()
        .double()
    )
    assert torch.equal(got == -torch.inf, expected == -torch.inf)
    possible = expected > -torch.inf
    error = (got - expected)[possible].abs()
    assert (error <= MODES[mode] + 2.0**-21 * (20 + expected[possible].abs())).all()
    alone = ops.log_einsum_exp(
        w.to(backend.device), values[:, :1].contiguous().to(backend.device), precision=mode
    )
    if not backend.is_twin:  # CPU twins call torch's GEMM, whose bits may depend on the batch.
        assert torch.equal(alone.cpu().double(), got[:, :1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("depth", [15.0, 40.0, 90.0])
def test_terms_far_below_the_largest_value_do_not_underflow(
    backend: Backend, depth: float, mode: str
) -> None:
    """Check a left-to-right chain. The weights of a sum allow only a state and its predecessor, but
    the values of later states are larger, by ``depth`` per state."""
    states = 40
    w = torch.full((states, states), -torch.inf)
    for o in range(states):
        w[o, max(0, o - 1) : o + 1] = torch.tensor([-0.3, -1.35])[-(o + 1) :]
    values = -depth * torch.arange(states).flip(0).expand(17, states).contiguous()
    values = values - torch.rand(17, states, generator=torch.Generator().manual_seed(0))
    expected = reference.log_einsum_exp(w.double(), values.double())
    got = ops.log_einsum_exp(w.to(backend.device), values.to(backend.device), precision=mode)
    error = (got.cpu().double() - expected).abs()
    assert (error <= MODES[mode] + 2.0**-22 * expected.abs()).all()


def test_exact_data_gives_exact_sums(backend: Backend) -> None:
    """Check powers of two, for which terms and partial sums are exact in every mode."""
    g = torch.Generator().manual_seed(1)
    w = 2.0 ** torch.randint(-3, 1, (24, 64), generator=g)
    values = torch.zeros(19, 64)
    values[torch.rand(values.shape, generator=g) < 0.5] = -torch.inf
    got = [
        ops.log_einsum_exp(w.to(backend.device), values.to(backend.device), "probs", precision=p)
        for p in ("fp32", *MODES)
    ]
    expected = reference.log_einsum_exp(w.double(), values.double(), "probs")
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])
    torch.testing.assert_close(got[0].cpu().double(), expected, rtol=2e-7, atol=2e-7)
