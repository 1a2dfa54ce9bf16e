"""SPLoRA: distances and scores equal dense formulas and results computed by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.splora_support import blocks, dense_map, made, name_of, scaled

from lora_ext.adapter import LoraAdapter
from lora_ext.methods.splora import SploraConfig, diem, ediem_scores, pair_stats, project_factor
from lora_ext.methods.splora.scores import _lower_quartile

V = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64))
ZERO = torch.zeros(2, 2, dtype=torch.float64)
A = torch.tensor([[3.0, 4.0]], dtype=torch.float64)


# -------------------------------------------------------------------------------------------------
# Known results


@pytest.mark.parametrize(
    ("b", "projection", "dist", "cos"),
    [
        ([[1.0], [0.0]], "frobenius", 5.0, 1.0),
        ([[0.0], [1.0]], "frobenius", 5.0, 0.0),
        ([[1.0], [1.0]], "frobenius", math.sqrt(50), math.sqrt(0.5)),
        ([[1.0], [0.0]], "orthogonal", 0.0, 1.0),
        ([[0.0], [1.0]], "orthogonal", 5.0, 0.0),
        ([[1.0], [1.0]], "orthogonal", 5.0, math.sqrt(0.5)),
    ],
)
def test_distances_of_two_directions_equal_known_ones(b, projection: str, dist: float, cos: float):
    B = torch.tensor(b, dtype=torch.float64)
    projected = project_factor(B, ZERO, V, projection=projection)
    stats = pair_stats(A, B, projected)
    assert stats[3].sqrt().item() == pytest.approx(dist, abs=1e-12)
    assert stats[0].sqrt().item() == pytest.approx(5 * B.norm().item())
    found = stats[2] / (stats[0] * stats[1]).sqrt() if stats[1] else stats.new_zeros(())
    assert found.item() == pytest.approx(cos)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"stat": "iqr"}, [-1.5, -1, -0.5, 0, 3]),
        ({"stat": "std"}, [-0.848528, -0.565685, -0.282843, 0, 1.697056]),
        ({"center": "median"}, [-1, -0.5, 0, 0.5, 3.5]),
    ],
)
def test_scores_of_five_distances_equal_known_ones(fields: dict, expected: list[float]):
    # P maps the updates of these 2 x 2 layers to zero; the distances are 1, 2, 3, 4 and 10.
    names = [name_of(i) for i in range(5)]
    state = {}
    for name, d in zip(names, (1.0, 2, 3, 4, 10), strict=True):
        state[f"{name}.lora_A.weight"] = A / 5
        state[f"{name}.lora_B.weight"] = torch.tensor([[0.0], [d]], dtype=torch.float64)
    base, aligned = ({f"{n}.weight": w for n in names} for w in (ZERO, V))
    stats = ediem_scores(state, base, aligned, SploraConfig(**{"direction": "smallest", **fields}))
    assert [s.name for s in stats] == names and {s.n_entries for s in stats} == {4}
    assert [s.dist for s in stats] == pytest.approx([1, 2, 3, 4, 10])
    assert [s.score for s in stats] == pytest.approx(expected, abs=1e-6)


# -------------------------------------------------------------------------------------------------
# Gram matrices against dense matrices

SIZES = [(1, 7, 2), (7, 1, 2), (1, 1, 1), (5, 4, 9), (24, 17, 3), (17, 24, 3), (16, 16, 4)]


@pytest.mark.parametrize("projection", ["frobenius", "orthogonal"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.filterwarnings("ignore:.*full row rank")
def test_gram_path_equals_dense_path(size: tuple[int, int, int], projection: str):
    m, n, r = size
    adapter, base, aligned = made({name_of(i): (m, n) for i in range(4)}, r)
    q = None if projection == "frobenius" else max(1, min(m, n) // 2)
    config = SploraConfig(
        direction="smallest", projection=projection, rank=q, allow_degenerate=True
    )
    for row in ediem_scores(adapter, base, aligned, config):
        a, b, s, *_ = adapter.modules[row.name]
        key = f"{row.name}.weight"
        p = dense_map(base[key], aligned[key], projection, q)
        update = s * b @ a
        mapped = p @ update
        size_of = update.norm().item()
        assert row.dist == pytest.approx((mapped - update).norm().item(), 1e-10, 1e-10 * size_of)
        assert row.norm == pytest.approx(size_of, 1e-10)
        assert row.norm_proj == pytest.approx(mapped.norm().item(), 1e-10, 1e-10 * size_of)
        cos = (mapped * update).sum() / (mapped.norm() * update.norm())
        assert row.cos == pytest.approx(cos.item(), 1e-9, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_inputs_are_computed_in_float64(dtype: torch.dtype):
    adapter, base, aligned = made(blocks(), dtype=dtype)
    wide = LoraAdapter(
        adapter.config,
        {n: f._replace(a=f.a.double(), b=f.b.double()) for n, f in adapter.modules.items()},
    )
    wide_models = [{k: t.double() for k, t in model.items()} for model in (base, aligned)]
    found = ediem_scores(adapter, base, aligned)
    for row, expected in zip(found, ediem_scores(wide, *wide_models), strict=True):
        assert row[1:] == pytest.approx(expected[1:], rel=1e-12)


@pytest.mark.parametrize("projection", ["frobenius", "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_projected_factor_has_the_widest_dtype_and_is_rounded_once(projection, dtype):
    _, base, aligned = made({"up": (12, 7)}, dtype=dtype)
    b = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = project_factor(
        b, base["up.weight"], aligned["up.weight"], projection=projection, rank=4
    )
    q = 4 if projection == "orthogonal" else None
    expected = dense_map(base["up.weight"], aligned["up.weight"], projection, q) @ b.double()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found, expected.to(dtype), **tolerance)


def test_energy_keeps_the_fewest_sufficient_directions():
    u = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))[0]
    values = torch.tensor([3.0, 2, 1, 0.5], dtype=torch.float64)  # squares 9, 4, 1, 0.25
    v = (u[:, :4] * values) @ torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0][:4]
    b = torch.randn(9, 2, dtype=torch.float64)
    for energy, q in ((0.6, 1), (0.65, 2), (0.9, 2), (0.95, 3), (1.0, 4), (None, 4)):
        for weight in (v, v.T.contiguous()):  # a wide and a tall weight
            left = b if weight.shape[0] == 9 else b[:6]
            found = project_factor(
                left, torch.zeros_like(weight), weight, projection="orthogonal", energy=energy
            )
            expected = dense_map(torch.zeros_like(weight), weight, "orthogonal", q) @ left
            torch.testing.assert_close(found, expected)


def test_fan_in_fan_out_transposes_weights():
    shapes = {name_of(i): (12, 7) for i in range(4)}
    adapter, base, aligned = made(shapes, fan_in_fan_out=True)
    assert base[f"{name_of(0)}.weight"].shape == (7, 12)
    turned = [{k: t.T.contiguous() for k, t in model.items()} for model in (base, aligned)]
    plain = LoraAdapter.load(
        ({**adapter.config.to_dict(), "fan_in_fan_out": False}, adapter.state_dict())
    )
    for found, expected in zip(
        ediem_scores(adapter, base, aligned), ediem_scores(plain, *turned), strict=True
    ):
        assert found[1:] == pytest.approx(expected[1:], rel=1e-12)


def test_square_gpt2_weights_of_a_live_model_are_always_transposed():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=7, n_embd=8, n_layer=4, n_head=2, n_positions=8)
    )
    name = "transformer.h.{}.attn.c_proj"
    adapter, *_ = made({name.format(i): (8, 8) for i in range(4)})
    base = {k: torch.zeros_like(t) for k, t in model.state_dict().items()}
    for row in ediem_scores(adapter, base, model):
        a, b, s, *_ = adapter.modules[row.name]
        update = s * b @ a
        v = model.get_submodule(row.name).weight.double().T
        mapped = v @ v.T / v.norm() @ update
        assert row.dist == pytest.approx((mapped - update).norm().item())


# -------------------------------------------------------------------------------------------------
# Invariances


@pytest.mark.parametrize("projection", ["frobenius", "orthogonal"])
def test_scores_do_not_depend_on_the_basis_of_the_factors(projection: str):
    adapter, base, aligned = made(blocks())
    q = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    turned = LoraAdapter(
        adapter.config,
        {n: f._replace(a=q @ f.a, b=f.b @ torch.linalg.inv(q)) for n, f in adapter.modules.items()},
    )
    config = SploraConfig(direction="smallest", projection=projection, rank=4)
    for one, two in zip(
        ediem_scores(adapter, base, aligned, config),
        ediem_scores(turned, base, aligned, config),
        strict=True,
    ):
        assert one[2:] == pytest.approx(two[2:], rel=1e-9)


@settings(max_examples=15)
@given(c=st.floats(-4, 4).filter(lambda c: abs(c) > 0.1))
def test_scaling_all_updates_scales_distances_but_not_scores(c: float):
    adapter, base, aligned = made(blocks())
    larger = scaled(adapter, dict.fromkeys(adapter.modules, c))
    for one, two in zip(
        ediem_scores(adapter, base, aligned), ediem_scores(larger, base, aligned), strict=True
    ):
        assert two.dist == pytest.approx(abs(c) * one.dist)
        assert two.cos == pytest.approx(one.cos)
        assert two.score == pytest.approx(one.score, rel=1e-6, abs=1e-6)


def test_scaling_the_alignment_changes_only_frobenius_distances():
    adapter, base, aligned = made(blocks())
    further = {k: base[k] + 3 * (aligned[k] - base[k]) for k in base}
    for projection, moves in (("frobenius", True), ("orthogonal", False)):
        config = SploraConfig(direction="smallest", projection=projection, rank=4)
        for one, two in zip(
            ediem_scores(adapter, base, aligned, config),
            ediem_scores(adapter, base, further, config),
            strict=True,
        ):
            assert two.cos == pytest.approx(one.cos)
            assert (two.dist == pytest.approx(one.dist)) is not moves


def test_both_projections_are_equal_for_six_equal_singular_values():
    # If all six singular values are sqrt(6), |V|_F = 6 and V V^T = 6 U U^T.
    g = torch.Generator().manual_seed(2)
    u = torch.linalg.qr(torch.randn(11, 6, dtype=torch.float64, generator=g))[0]
    w = torch.linalg.qr(torch.randn(9, 6, dtype=torch.float64, generator=g))[0]
    v, b = math.sqrt(6) * u @ w.T, torch.randn(11, 3, dtype=torch.float64, generator=g)
    one, two = (
        project_factor(b, torch.zeros_like(v), v, projection=p) for p in ("frobenius", "orthogonal")
    )
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(project_factor(one, torch.zeros_like(v), v), one)


def test_order_of_names_changes_no_bit_of_the_scores():
    adapter, base, aligned = made(blocks(12))
    expected = ediem_scores(adapter, base, aligned)
    assert [s.name for s in expected] == [*blocks(12)]  # layers.2 before layers.10
    turned = LoraAdapter(adapter.config, dict(reversed(adapter.modules.items())))
    models = [dict(sorted(m.items(), reverse=True)) for m in (base, aligned)]
    assert ediem_scores(turned, *models) == expected


def test_square_layers_and_biases_beside_weights_are_supported():
    shapes = {name_of(i): (3, 3) for i in range(3)} | {"model.score": (3, 7)}
    adapter, base, aligned = made(shapes, r=3)
    biased = [{**m, **{f"{n}.bias": torch.ones(3) for n in shapes}} for m in (base, aligned)]
    rows = ediem_scores(adapter, *biased, SploraConfig(direction="smallest"))
    assert [r.n_entries for r in rows] == [9, 9, 9, 21]
    for row in rows:
        a, b, s, *_ = adapter.modules[row.name]
        assert row.norm == pytest.approx((s * b @ a).norm().item())


def test_scale_of_a_layer_is_included_unless_disabled():
    adapter, base, aligned = made(blocks(), alpha_pattern={name_of(1): 18})
    with_s = ediem_scores(adapter, base, aligned)
    without = ediem_scores(
        adapter, base, aligned, SploraConfig(direction="smallest", include_scaling=False)
    )
    ratios = {a.name: a.dist / b.dist for a, b in zip(with_s, without, strict=True)}
    assert ratios.pop(name_of(1)) == pytest.approx(6)
    assert list(ratios.values()) == pytest.approx([2] * 7)


def test_state_dicts_of_live_models_and_files_are_accepted():
    adapter, base, aligned = made(blocks(), r=2)
    saved = adapter.state_dict()
    live = {k.replace(".weight", ".default.weight"): t for k, t in saved.items()}
    whole = {**live, **{f"base_model.model.{k}": t for k, t in base.items()}}
    expected = ediem_scores(
        adapter, base, aligned, SploraConfig(direction="smallest", include_scaling=False)
    )
    for state in (saved, live, whole):
        assert ediem_scores(state, base, aligned) == expected


# -------------------------------------------------------------------------------------------------
# References


def test_permutation_compares_a_layer_with_its_shuffled_rows():
    adapter, base, aligned = made({name_of(0): (12, 10)})
    config = SploraConfig(
        direction="smallest", reference="permutation", n_samples=20, seed=3, stat="std"
    )
    (row,) = ediem_scores(adapter, base, aligned, config)
    a, b, s, *_ = adapter.modules[name_of(0)]
    key = f"{name_of(0)}.weight"
    mapped = dense_map(base[key], aligned[key], "frobenius") @ b
    g = torch.Generator().manual_seed(3)
    shuffled = (b[torch.randperm(12, generator=g)] for _ in range(20))
    sample = torch.stack([(s * (mapped - other) @ a).norm() for other in shuffled])
    assert row.score == pytest.approx(((row.dist - sample.mean()) / sample.std()).item(), rel=1e-9)
    assert ediem_scores(adapter, base, aligned, config) == [row]


def test_permutation_score_does_not_depend_on_other_layers():
    adapter, base, aligned = made(blocks())
    config = SploraConfig(direction="smallest", reference="permutation")
    alone = LoraAdapter(adapter.config, {name_of(2): adapter.modules[name_of(2)]})
    (row,) = ediem_scores(alone, base, aligned, config)
    assert row in ediem_scores(adapter, base, aligned, config)


def test_pairs_equal_the_released_formula():
    adapter, base, aligned = made({name_of(0): (12, 10)})
    g = torch.Generator().manual_seed(0)
    pairs = [tuple(torch.randn(2, 12, 10, generator=g)) for _ in range(9)]
    (row,) = ediem_scores(
        adapter, base, aligned, SploraConfig(direction="smallest", reference="pairs"), pairs=pairs
    )
    a, b, s, *_ = adapter.modules[name_of(0)]
    key = f"{name_of(0)}.weight"
    update = s * b @ a
    mapped = dense_map(base[key], aligned[key], "frobenius") @ update
    sample = torch.stack([(x.double() - y.double()).norm() for x, y in pairs])
    quartile = torch.tensor([0.25, 0.75], dtype=torch.float64)
    low, high = torch.quantile(sample, quartile)
    distance = (mapped - update).norm()
    expected = (distance + 1e-6 - sample.mean()) / (high - low + 1e-6) - (
        torch.quantile(mapped, 0.25) - torch.quantile(update, 0.25)
    )
    assert row.score == pytest.approx(expected.item(), rel=1e-9)


def test_pairs_that_repeat_the_layer_give_one_minus_the_quartile_shift():
    # The released script passes 50 copies of the scored pair.
    adapter, base, aligned = made({name_of(0): (12, 10)})
    a, b, s, *_ = adapter.modules[name_of(0)]
    key = f"{name_of(0)}.weight"
    update = s * b @ a
    mapped = dense_map(base[key], aligned[key], "frobenius") @ update
    config = SploraConfig(direction="smallest", reference="pairs")
    (row,) = ediem_scores(adapter, base, aligned, config, pairs=[(mapped, update)] * 50)
    shift = torch.quantile(mapped, 0.25) - torch.quantile(update, 0.25)
    assert row.score == pytest.approx(1 - shift.item(), abs=1e-6)


@pytest.mark.slow
def test_lower_quartile_works_beyond_the_limit_of_torch_quantile():
    values = torch.arange((1 << 24) + 5, dtype=torch.float32).flip(0)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.25)
    assert _lower_quartile(values).item() == (values.numel() - 1) / 4
    for n in range(1, 9):
        few = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        torch.testing.assert_close(_lower_quartile(few), torch.quantile(few, 0.25))


# -------------------------------------------------------------------------------------------------
# DIEM


@pytest.mark.parametrize("n", [64, 1024])
def test_diem_of_uniform_pairs_has_mean_zero_and_the_stated_variance(n: int):
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 4_000, n, generator=g)
    scores = torch.tensor([diem(a, b, v_min=0, v_max=1) for a, b in zip(x, y, strict=True)])
    assert abs(scores.mean()) < 4 * scores.std() / math.sqrt(len(scores))
    assert scores.var() == pytest.approx(1 / (7 / 120), rel=0.05)


def test_diem_does_not_depend_on_the_unit_of_its_entries():
    x, y = torch.rand(2, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert diem(5 * x - 2, 5 * y - 2, v_min=-2, v_max=3) == pytest.approx(
        diem(x, y, v_min=0, v_max=1)
    )


def test_diem_accepts_given_statistics():
    # For standard normal entries, the mean is sqrt(2 N) (1 - 1 / (4 N)) and the variance 1.
    x, y = torch.ones(8), torch.zeros(8)
    expected = math.sqrt(16) * (1 - 1 / 32)
    found = diem(x, y, v_min=-1, v_max=1, expected=expected, var=1.0)
    assert found == pytest.approx(2 * (math.sqrt(8) - expected))


def test_scores_are_deterministic():
    adapter, base, aligned = made(blocks())
    for reference, projection in itertools.product(
        ("population", "permutation"), ("frobenius", "orthogonal")
    ):
        config = SploraConfig(
            direction="smallest", reference=reference, projection=projection, rank=4
        )
        once = ediem_scores(adapter, base, aligned, config)
        assert ediem_scores(adapter, base, aligned, config) == once
