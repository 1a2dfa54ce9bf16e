"""``merge_adapters`` and ``interpolate_adapters``: sums of updates and of factors."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_adapters import SHAPES, Q, V, adapter, delta, rescaled
from test_value import CASES, assert_peft_finds_every_key, peft_model
from torch import nn

from lora_ext.adapter import LoraAdapter, interpolate_adapters, merge_adapters, prune_adapter
from lora_ext.pool import AdapterPool

pytestmark = pytest.mark.filterwarnings("ignore")
MODES = ("delta", "factors", "delta_svd")


def assert_delta(value, name, expected, tolerance=1e-5):
    """Check the weight update of module ``name``. The tolerance covers one rounding of the factors
    to float32, relative to the largest entry of the update."""
    found = delta(value, name)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "lora_alpha": 7}, {"use_dora": True}])
def test_one_adapter_of_weight_one_is_returned_unchanged(mode, fields):
    value = adapter(scale=1.7, **fields)
    assert merge_adapters([value], [1.0], mode) is value
    assert merge_adapters([value], [1], mode) == value


def test_delta_is_the_weighted_sum_of_updates_for_any_ranks_and_scales():
    first, second = adapter(1, ranks={Q: 4, V: 2}), adapter(2, ranks=3, scale=0.7)
    merged = merge_adapters([first, second], [0.25, -1.5])
    for name in SHAPES:
        assert_delta(merged, name, 0.25 * delta(first, name) - 1.5 * delta(second, name))
    assert merged.modules[Q].a.shape == (7, 20) and merged.modules[V].b.shape == (12, 5)
    assert merged.modules[Q].a.dtype == torch.float32


def test_delta_of_different_modules_is_their_union():
    first = adapter(1, shapes={Q: SHAPES[Q]})
    second = adapter(2, shapes={V: SHAPES[V]}, scale=0.3)
    merged = merge_adapters([first, second], [0.5, 2.0])
    assert merged.modules.keys() == {Q, V}
    assert_delta(merged, Q, 0.5 * delta(first, Q))
    assert_delta(merged, V, 2 * delta(second, V))
    assert set(merged.config.target_modules) == {Q, V}


def test_adapter_without_modules_adds_nothing():
    value = adapter()
    nothing = prune_adapter(value, [])
    assert merge_adapters([value, nothing], [1.0, 5.0]) == value
    assert not merge_adapters([nothing, nothing], [1.0, 5.0], "delta_svd").modules


def test_weights_that_are_powers_of_two_change_no_bit():
    first, second = adapter(1), adapter(2)
    merged = merge_adapters([first, second], [0.5, 2.0]).modules[Q]
    assert torch.equal(merged.a, torch.cat([first.modules[Q].a, second.modules[Q].a]))
    assert torch.equal(merged.b, torch.cat([first.modules[Q].b / 2, second.modules[Q].b * 2], 1))
    assert merged.scaling == 2.0


def test_factors_mode_sums_a_and_b_separately():
    first, second = adapter(1), adapter(2)
    half = interpolate_adapters(first, second, 0.5)
    (a, b), (a2, b2) = (value.modules[Q][:2] for value in (first, second))
    assert_delta(half, Q, (2.0 / 4 * (b + b2) @ (a + a2)).double())
    assert half.modules[Q].scaling == 2.0 and half.modules[Q].a.shape == (4, 20)
    merged = merge_adapters([first, second], [0.3, 0.2], "factors")
    assert_delta(merged, Q, (2.0 * (0.3 * b + 0.2 * b2) @ (0.3 * a + 0.2 * a2)).double())


def test_different_scales_are_folded_into_b():
    first, second = adapter(1), rescaled(adapter(2), 0.75)
    half = interpolate_adapters(first, second, 0.5)
    (a, b), (a2, b2) = (value.modules[Q][:2] for value in (first, second))
    assert half.modules[Q].scaling == 1.0
    assert_delta(half, Q, (0.25 * (2.0 * b + 0.75 * b2) @ (a + a2)).double())


def test_delta_svd_is_the_best_approximation_of_its_rank():
    first, second = adapter(1, dtype=torch.float64), adapter(2, scale=0.5, dtype=torch.float64)
    total = 0.6 * delta(first, Q) + 0.4 * delta(second, Q)
    u, s, vh = torch.linalg.svd(total)
    for rank in (1, 3, 8, 30):
        merged = merge_adapters([first, second], [0.6, 0.4], "delta_svd", rank=rank)
        kept = min(rank, 8)
        assert merged.modules[Q].a.shape == (kept, 20)
        nearest = u[:, :kept] * s[:kept] @ vh[:kept]
        assert torch.allclose(delta(merged, Q), nearest, atol=1e-12 * float(s[0]))
        found = torch.linalg.svdvals(delta(merged, Q))[:kept]
        assert torch.allclose(found, s[:kept], rtol=1e-10)
    assert merge_adapters([first, second], [0.6, 0.4], "delta_svd").modules[Q].a.shape[0] == 4


def test_dense_product_is_never_formed(monkeypatch):
    shapes = {Q: (3000, 2000)}
    values = [adapter(i, shapes=shapes) for i in range(2)]
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            outs = out if isinstance(out, tuple | list) else [out]
            largest.extend(t.numel() for t in outs if isinstance(t, torch.Tensor))
            return out

    with Watch():
        for mode in MODES:
            merge_adapters(values, [0.5, 0.5], mode)
    assert max(largest) <= 3000 * 8


@pytest.mark.parametrize(
    ("dtypes", "widest"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_merge_is_rounded_once_to_the_widest_dtype(mode, dtypes, widest):
    first, second = (adapter(i, dtype=d) for i, d in enumerate(dtypes))
    exact = [adapter(i, dtype=d) for i, d in enumerate(dtypes)]
    exact = [
        e.with_modules(
            {n: f._replace(a=f.a.double(), b=f.b.double()) for n, f in e.modules.items()}
        )
        for e in exact
    ]
    merged = merge_adapters([first, second], [0.3, 0.7], mode)
    wanted = merge_adapters(exact, [0.3, 0.7], mode)
    for name, factors in merged.modules.items():
        assert factors.a.dtype == factors.b.dtype == widest
        assert torch.equal(factors.a, wanted.modules[name].a.to(widest))
        assert torch.equal(factors.b, wanted.modules[name].b.to(widest))


@pytest.mark.parametrize("mode", MODES)
def test_biases_are_summed_like_the_updates(mode):
    first, second = adapter(1, lora_bias=True), adapter(2, lora_bias=True)
    merged = merge_adapters([first, second], [0.5, 0.25], mode, rank=8 if "svd" in mode else None)
    bias = merged.modules[Q].scaling * merged.modules[Q].bias
    expected = 2.0 * (0.5 * first.modules[Q].bias + 0.25 * second.modules[Q].bias)
    assert torch.allclose(bias, expected, rtol=1e-6)
    other = merge_adapters([first, adapter(3, scale=1.0)], [1.0, 1.0])
    assert torch.allclose(other.modules[Q].bias, 2.0 * first.modules[Q].bias)
    assert other.config.lora_bias and other.modules[Q].scaling == 1.0


@pytest.mark.parametrize("mode", MODES)
def test_inputs_are_unchanged_and_no_graph_is_made(mode):
    values = [adapter(i) for i in range(2)]
    for value in values:
        for factors in value.modules.values():
            factors.a.requires_grad_()
    before = copy.deepcopy(values)
    merged = merge_adapters(values, [0.5, 0.5], mode)
    assert values == before
    assert not any(f.a.requires_grad or f.b.requires_grad for f in merged.modules.values())


@given(weights=st.lists(st.floats(-4, 4), min_size=3, max_size=3), order=st.permutations(range(3)))
@settings(max_examples=25, deadline=None)
def test_result_does_not_depend_on_the_order_of_adapters(weights, order):
    values = [adapter(i, ranks=i + 1, dtype=torch.float64, scale=i + 0.5) for i in range(3)]
    one = merge_adapters(values, weights)
    two = merge_adapters([values[i] for i in order], [weights[i] for i in order])
    bound = 1e-13 * sum(abs(w) * delta(v, Q).norm() for w, v in zip(weights, values, strict=True))
    assert (delta(one, Q) - delta(two, Q)).norm() <= bound


# -------------------------------------------------------------------------------------------------
# Interpolation


def test_ends_of_an_interpolation_are_the_adapters():
    first, second = adapter(1), adapter(2, scale=0.5)
    for space in ("factors", "delta"):
        assert interpolate_adapters(first, second, 0, space) is first
        assert interpolate_adapters(first, second, 1.0, space) is second
        middle = interpolate_adapters(first, second, 0.5, space)
        turned = interpolate_adapters(second, first, 0.5, space)
        assert torch.allclose(delta(middle, Q), delta(turned, Q), atol=1e-5)


def test_interpolating_an_adapter_with_itself_changes_nothing():
    value = adapter(1)
    for lam in (0.1, 0.3, 0.5, 1.5):
        assert interpolate_adapters(value, value, lam) == value
        moved = interpolate_adapters(value, value, lam, "delta")
        assert_delta(moved, Q, delta(value, Q))


def test_delta_space_interpolates_the_updates():
    first, second = adapter(1, ranks=2), adapter(2, ranks=5, scale=0.5)
    point = interpolate_adapters(first, second, 0.3, "delta")
    assert_delta(point, Q, 0.7 * delta(first, Q) + 0.3 * delta(second, Q))


# -------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("case", ["plain", "all-linear", "regex", "patterns", "bias"])
@pytest.mark.parametrize("mode", MODES)
def test_peft_and_the_pool_load_adapters_merged_from_folders(case, mode, tmp_path):
    base = CASES[case][0]()
    models = []
    for name in ("one", "two"):
        model = peft_model(case)
        model.save_pretrained(tmp_path / name)
        models.append(model)
    merged = merge_adapters([tmp_path / "one", tmp_path / "two"], [0.6, 0.7], mode)
    merged.save(tmp_path / "merged")
    theirs = assert_peft_finds_every_key(base, tmp_path / "merged")
    layers = dict(theirs.base_model.model.named_modules())
    for name, factors in merged.modules.items():
        assert layers[name].scaling["default"] == factors.scaling
    AdapterPool(base, max_slots=1, max_rank=16).load("merged", tmp_path / "merged")
    assert LoraAdapter.load(tmp_path / "merged") == merged


def test_embedding_and_its_base_weight_are_merged(tmp_path):
    for name in ("one", "two"):
        peft_model("embedding-and-head").save_pretrained(tmp_path / name)
    merged = merge_adapters([tmp_path / "one", tmp_path / "two"], [0.5, 0.5])
    assert merged.base_weights.keys() == LoraAdapter.load(tmp_path / "one").base_weights.keys()
    merged.save(tmp_path / "merged")
    assert_peft_finds_every_key(CASES["embedding-and-head"][0](), tmp_path / "merged")
    other = LoraAdapter.load(tmp_path / "two")
    key = next(iter(other.base_weights))
    moved = {**other.base_weights, key: other.base_weights[key] + 1}
    other = LoraAdapter(other.config, other.modules, moved)
    with pytest.raises(ValueError, match=rf"adapters\[1\]: {key}: expected the base model's"):
        merge_adapters([tmp_path / "one", other], [0.5, 0.5])


def test_excluded_modules_stay_excluded_after_a_merge(tmp_path):
    base = nn.ModuleDict(
        {
            "up": nn.Linear(5, 6),
            "down": nn.Linear(5, 6),
            "block": nn.ModuleDict({"up": nn.Linear(5, 6), "down": nn.Linear(5, 6)}),
        }
    )
    up = adapter(1, shapes={"up": (6, 5)}, exclude_modules=["block.up"])
    down = adapter(2, shapes={"down": (6, 5)}, exclude_modules="block.down|up")
    for first, second in ((up, down), (down, up), (adapter(3, shapes={"down": (6, 5)}), up)):
        merge_adapters([first, second], [1, 1]).save(tmp_path)
        theirs = assert_peft_finds_every_key(base, tmp_path)
        layers = theirs.base_model.model.named_modules()
        assert {n for n, m in layers if hasattr(m, "base_layer")} == {"up", "down"}
        AdapterPool(base, max_slots=1, max_rank=8).load("a", tmp_path)


# -------------------------------------------------------------------------------------------------
# Errors


def refused(match, *arguments, kind=ValueError, **options):
    with pytest.raises(kind, match=match):
        merge_adapters(*arguments, **options)


def test_errors_name_invalid_arguments():
    one = adapter()
    refused(r"merge_adapters: adapters: expected at least one, found none", [], [])
    refused(r"weights: expected one for each of 1 adapters, found 2", [one], [1, 2])
    refused(r"weights\[0\]: expected a finite number, found nan", [one], [float("nan")])
    refused(r"weights\[0\]: expected a finite number, found True", [one], [True])
    refused(r"mode: expected one of .*'delta'.*, found 'slerp'", [one], [1.0], "slerp")
    refused(r"rank: expected None with mode='delta', found 3", [one], [1.0], rank=3)
    refused(r"rank: expected a positive integer, found 0", [one], [1.0], "delta_svd", rank=0)
    refused(r"adapters: expected a list of adapters, found 'a'", "a", [1.0], kind=TypeError)
    with pytest.raises(ValueError, match=r"interpolate_adapters: space: .* found 'delta_svd'"):
        interpolate_adapters(one, one, 0.5, "delta_svd")
    with pytest.raises(ValueError, match=r"interpolate_adapters: lam: .* found inf"):
        interpolate_adapters(one, one, float("inf"))


def test_error_for_different_modules_or_ranks_names_the_first_difference():
    one, fewer = adapter(), adapter(shapes={Q: SHAPES[Q]})
    wider = adapter(ranks={Q: 4, V: 6})
    for lam in (0.0, 0.5, 1.0):
        with pytest.raises(ValueError, match=rf"interpolate_adapters: second: .*{V} only in first"):
            interpolate_adapters(one, fewer, lam)
        with pytest.raises(ValueError, match=rf"second: .*{V} only in second"):
            interpolate_adapters(fewer, one, lam)
        with pytest.raises(ValueError, match=rf"second: {V}: rank: expected 4 .*, found 6"):
            interpolate_adapters(one, wider, lam)
    refused(rf"adapters\[1\]: {V}: rank: expected 4", [one, wider], [1, 1], "factors")


@pytest.mark.parametrize("mode", MODES)
def test_adapters_of_other_layer_sizes_are_refused(mode):
    other = adapter(shapes={Q: (24, 19), V: (12, 20)})
    match = rf"adapters\[1\]: {Q}: expected .* inputs \(20,\) and 24 outputs .*found .*\(19,\)"
    refused(match, [adapter(), other], [1, 1], mode)


@pytest.mark.parametrize("mode", MODES)
def test_dora_is_refused_by_name(mode):
    dora = adapter(use_dora=True)
    refused(
        rf"adapters\[0\]: {Q}: .*DoRA.*magnitude", [dora, dora], [1, 1], mode,
        kind=NotImplementedError,
    )  # fmt: skip
    refused(rf"{Q}: .*DoRA", [dora], [0.5], mode, kind=NotImplementedError)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_error_names_nonfinite_factors(mode, value):
    bad = adapter(1)
    bad.modules[V].b[3, 2] = value
    refused(rf"adapters\[1\]: {V}: b: expected finite", [adapter(), bad], [1, 1], mode)


def test_sum_that_overflows_its_dtype_is_refused():
    values = [adapter(i, dtype=torch.float16) for i in range(2)]
    refused(rf"merge_adapters: {Q}: b: .*float16 can hold", values, [1e6, 1.0])


def test_all_modes_agree_for_adapters_that_share_a():
    # Both adapters share A, so summing factors equals summing updates if the weights sum to one.
    first = adapter(1, dtype=torch.float64)
    modules = {n: f._replace(b=f.b.flip(0)) for n, f in first.modules.items()}
    second = first.with_modules(modules)
    found = [delta(merge_adapters([first, second], [0.25, 0.75], m), Q) for m in MODES]
    for left, right in itertools.combinations(found, 2):
        assert torch.allclose(left, right, atol=1e-12)
