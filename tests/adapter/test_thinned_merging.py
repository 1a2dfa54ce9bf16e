"""``merge_adapters`` with TIES and DARE, compared with PEFT and with examples computed by hand."""

import peft
import pytest
import torch
from made_adapters import SHAPES, Q, adapter, delta
from peft.utils import merge_utils
from torch import nn

from lora_ext.adapter import LoraAdapter, merge_adapters

pytestmark = pytest.mark.filterwarnings("ignore")


def two_adapters():
    """Return a PEFT model with two adapters, and the adapters as values."""
    model = nn.Sequential(nn.Linear(20, 24), nn.Linear(24, 12))
    config = {"target_modules": ["0", "1"], "init_lora_weights": False}
    found = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=10, **config), "one")
    found.add_adapter("two", peft.LoraConfig(r=3, lora_alpha=2, **config))
    return found, [LoraAdapter.from_model(found, name) for name in ("one", "two")]


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_equals_the_result_of_peft(density):
    model, values = two_adapters()
    weights, how = [0.7, -1.5], {"svd_rank": 5, "density": density}
    model.add_weighted_adapter(["one", "two"], weights, "both", "ties_svd", **how)
    merged = merge_adapters(values, weights, "ties", 5, density=density)
    expected = LoraAdapter.from_model(model, "both")
    for name in ("0", "1"):
        assert merged.modules[name].a.shape[0] == 5
        wanted = delta(expected, name)
        # PEFT computes in float32, which perturbs the vectors of nearly equal singular values.
        assert (delta(merged, name) - wanted).norm() <= 1e-4 * wanted.norm()


def test_dare_equals_the_result_of_peft_for_the_same_seed():
    # PEFT draws random numbers for a new adapter first, so its merging function is called directly.
    _, values = two_adapters()
    weights = [0.7, -1.5]
    merged = merge_adapters(values, weights, "dare", 12, density=0.3, seed=7)
    torch.manual_seed(7)
    for name in ("0", "1"):
        updates = [delta(value, name).float() for value in values]
        wanted = merge_utils.dare_linear(updates, torch.tensor(weights), 0.3).double()
        u, s, vh = torch.linalg.svd(wanted, full_matrices=False)
        nearest = u[:, :12] * s[:12] @ vh[:12]
        assert (delta(merged, name) - nearest).norm() <= 1e-4 * nearest.norm()


def update(rows):
    """Return an adapter of rank 2 whose weight update has these two rows."""
    b, a = torch.eye(2), torch.tensor(rows)
    value = adapter(ranks=2, shapes={Q: (2, a.shape[1])}, scale=1.0)
    factors = value.modules[Q]
    return value.with_modules({Q: factors._replace(a=a, b=b, scaling=1.0)})


def test_ties_trims_elects_signs_and_averages_agreeing_values():
    one = update([[4.0, -3.0, 0.1], [0.2, 2.0, 0.0]])
    two = update([[-1.0, -5.0, 0.3], [6.0, -2.5, 0.0]])
    # Half of the six values are kept: 4, -3 and 2 of the first, -5, 6 and -2.5 of the second.
    merged = merge_adapters([one, two], [1.0, 1.0], "ties", density=0.5)
    wanted = torch.tensor([[4.0, -4.0, 0.0], [6.0, -2.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(delta(merged, Q), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_dare_is_unbiased_and_exact_at_density_one():
    values, weights = [adapter(1), adapter(2, scale=0.5)], [0.4, 0.8]
    whole = merge_adapters(values, weights, "delta")
    same = merge_adapters(values, weights, "dare", 8, density=1.0)
    for name in SHAPES:
        torch.testing.assert_close(delta(same, name), delta(whole, name), atol=1e-5, rtol=1e-5)
    drawn = [
        delta(merge_adapters(values, weights, "dare", 20, density=0.5, seed=seed), Q)
        for seed in range(300)
    ]
    mean, want = torch.stack(drawn).mean(0), delta(whole, Q)
    # A value x becomes 0 or 2x: the mean of 300 has standard deviation |x| / sqrt(300) = 0.06 |x|.
    largest = max(float(delta(value, Q).abs().max()) for value in values)
    assert (mean - want).abs().max() < 5 * 2 * largest / 300**0.5
    again = merge_adapters(values, weights, "dare", 20, density=0.5, seed=3)
    assert torch.equal(delta(again, Q), drawn[3]) and not torch.equal(drawn[3], drawn[4])


def test_single_adapter_is_thinned_and_absent_modules_are_skipped():
    value = adapter(1, shapes={Q: SHAPES[Q]})
    merged = merge_adapters([value], [1.0], "ties", 20, density=0.1)
    kept = int(0.1 * 24 * 20)
    full, found = delta(value, Q), delta(merged, Q)
    smallest = full.abs().flatten().topk(kept).values[-1]
    wanted = full * (full.abs() >= smallest)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    both = merge_adapters([value, adapter(2)], [1.0, 1.0], "ties")
    assert set(both.modules) == set(SHAPES)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"mode": "delta", "density": 0.5}, "density: expected None with mode='delta'"),
        ({"mode": "ties", "density": 0.0}, "density: expected .* found 0"),
        ({"mode": "dare", "density": 1.5}, "density: expected .* found 1.5"),
        ({"mode": "dare", "seed": -1}, "seed: expected"),
        ({"mode": "ties", "rank": 0}, "rank: expected a positive"),
    ],
)
def test_errors_name_invalid_combinations(how, message):
    with pytest.raises(ValueError, match=f"merge_adapters: {message}"):
        merge_adapters([adapter(1), adapter(2)], [1.0, 1.0], **how)
