"""Singular values and effective ranks of adapters: known values, properties and errors."""

import math
import warnings

import peft
import pytest
import torch
from adapted_models import KINDS, adapted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_ext import ops
from lora_ext.adapter import (
    LoraAdapter,
    RankReport,
    effective_rank,
    lora_singular_values,
    rank_report,
)
from lora_ext.adapter._ranks import KINDS as RANKS
from lora_ext.adapter._ranks import gram_figures
from lora_ext.nn import LoraLinear

ORDERED = ("stable", "participation", "entropy_energy", "entropy")


def diagonal(*spectrum):
    return torch.diag(torch.tensor(spectrum, dtype=torch.float64))


def factors(r, m=24, n=17, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(r, n, generator=generator, dtype=torch.float64)
    return a.to(dtype), torch.randn(m, r, generator=generator, dtype=torch.float64).to(dtype)


def orthogonal(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


# -------------------------------------------------------------------------------------------------
# Known values

SPECTRA = [
    (
        (3, 1),
        {
            "entropy": 1.7547653506,
            "entropy_energy": 1.3841454885,
            "stable": 1.1111111111,
            "participation": 1.2195121951,
        },
    ),
    (
        (4, 2, 1, 1),
        {
            "entropy": 3.3635856610,
            "entropy_energy": 2.2763215197,
            "stable": 1.375,
            "participation": 1.7664233577,
            "top_k_share": 0.75,
        },
    ),
    (
        (1, 0.5, 0.05, 0.005, 0.0005),
        {
            "entropy": 2.1822823635,
            "stable": 1.25252525,
            "participation": 1.4765273155,
            "top_k_share": 0.9643201542,
        },
    ),
    ((2, 2, 2, 2), {"entropy": 4, "stable": 4, "participation": 4, "entropy_energy": 4}),
    ((7, 0, 0), dict.fromkeys((*ORDERED, "top_k_share", "threshold", "absolute"), 1)),
    ((0, 0), dict.fromkeys(RANKS, 0)),
]


@pytest.mark.parametrize(("spectrum", "expected"), SPECTRA, ids=str)
def test_effective_ranks_equal_known_values(spectrum, expected):
    for kind, value in expected.items():
        assert effective_rank(diagonal(*spectrum), kind=kind, k=2) == pytest.approx(value, rel=1e-8)


def test_threshold_ranks_equal_known_values():
    dense = diagonal(1, 0.5, 0.05, 0.005, 0.0005)
    taus = (1e-1, 1e-2, 1e-3, 1e-4)
    found = [effective_rank(dense, kind="threshold", tau=tau) for tau in taus]
    assert found == [2, 3, 4, 5] and all(type(count) is int for count in found)


def test_value_equal_to_the_threshold_is_not_counted():
    assert effective_rank(diagonal(10, 1), kind="threshold", tau=0.1) == 1
    assert effective_rank(diagonal(0.5, 0.25), kind="absolute", tau=0.25) == 1


@pytest.mark.parametrize("method", ["qr", "gram"])
def test_fresh_adapter_has_rank_zero(method):
    layer = LoraLinear(nn.Linear(8, 6), r=4)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for kind in RANKS if method == "qr" else ("threshold", "stable", "participation"):
        found = effective_rank(a, b, kind, method=method)
        assert found == 0 and type(found) is (int if kind in ("threshold", "absolute") else float)


# -------------------------------------------------------------------------------------------------
# Properties


@pytest.mark.parametrize(("m", "n"), [(48, 40), (20, 48), (48, 20)])
@pytest.mark.parametrize("r", [1, 4, 33])
def test_singular_values_equal_those_of_the_product(r, m, n):
    a, b = factors(r, m, n)
    expected = torch.linalg.svdvals(-0.5 * b @ a)[: min(r, m, n)]
    found = lora_singular_values(a, b, scaling=-0.5)
    assert found.shape == (min(r, m, n),) and found.dtype == torch.float64
    assert (found - expected).abs().max() <= 1e-12 * expected[0]


def test_repeated_row_lowers_the_rank_by_one():
    a, b = factors(5)
    a[3] = a[1]
    found = lora_singular_values(a, b)
    assert found[4] <= 1e-12 * found[0]
    assert effective_rank(a, b, "threshold") == 4
    torch.testing.assert_close(found, torch.linalg.svdvals(b @ a)[:5], rtol=0, atol=1e-12 * 24)


@pytest.mark.slow
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8).filter(lambda s: max(s) > 1e-6),
    st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_ranks_are_ordered_and_depend_only_on_the_spectrum(spectrum, seed):
    size = len(spectrum)
    a = orthogonal(size, seed)
    b = orthogonal(size, seed + 1) @ diagonal(*spectrum)
    found = [effective_rank(a, b, kind) for kind in ORDERED]
    plain = [effective_rank(diagonal(*spectrum), kind=kind) for kind in ORDERED]
    assert found == pytest.approx(plain, rel=1e-9)
    for low, high in zip([1, *found], [*found, size], strict=True):
        assert low <= high * (1 + 1e-9)


def test_ranks_do_not_depend_on_the_factorisation():
    a, b = factors(6)
    mix = factors(6, 6, 6, seed=3)[0]
    others = [
        (mix.inverse() @ a, b @ mix),
        (a, -7 * b),
        (a @ orthogonal(17, 1), orthogonal(24, 2) @ b),
        (b.T, a.T),
    ]
    for kind in RANKS:
        if kind == "absolute":
            continue
        expected = effective_rank(a, b, kind, tau=0.4)
        for other_a, other_b in others:
            found = effective_rank(other_a, other_b, kind, tau=0.4, scaling=3.0)
            assert found == pytest.approx(expected, rel=1e-9)


def test_absolute_rank_counts_singular_values_of_the_scaled_update():
    assert effective_rank(diagonal(1, 0.1), kind="absolute", tau=0.5) == 1
    assert effective_rank(diagonal(1, 0.1), kind="absolute", tau=0.5, scaling=6.0) == 2
    assert effective_rank(diagonal(100, 3), kind="absolute", tau=2.0) == 2


@pytest.mark.parametrize("kind", ["threshold", "stable", "participation"])
def test_gram_method_equals_the_exact_method(kind):
    for seed, (r, m, n) in enumerate([(1, 9, 5), (6, 24, 17), (12, 24, 8), (12, 8, 24)]):
        a, b = factors(r, m, n, seed)
        args = {"kind": kind, "tau": 0.2, "scaling": 0.5}
        exact = effective_rank(a, b, **args)
        assert effective_rank(a, b, **args, method="gram") == pytest.approx(exact, rel=1e-10)
        assert effective_rank(b @ a, **args, method="gram") == pytest.approx(exact, rel=1e-10)


def test_gram_figures_are_accurate_for_tiny_and_large_factors():
    a, b = factors(4)
    expected = effective_rank(a, b, "participation")
    for size in (1e-60, 1.0, 1e60):
        (gram_a,), (gram_b,) = ops.lora_gram([a], [b * size])
        fro, rank = gram_figures(gram_a, gram_b)
        assert fro == pytest.approx((b @ a).norm().item() * size, rel=1e-12)
        assert rank == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_factors_are_widened_first(dtype):
    a, b = factors(4, dtype=dtype)
    expected = torch.linalg.svdvals(b.double() @ a.double())[:4]
    torch.testing.assert_close(lora_singular_values(a, b), expected, rtol=1e-12, atol=0)


def test_arguments_are_unchanged():
    a, b = (t.requires_grad_() for t in factors(4))
    before = a.detach().clone(), b.detach().clone()
    assert not lora_singular_values(a, b).requires_grad
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


# -------------------------------------------------------------------------------------------------
# Reports


def expected_report(model, kind):
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in getattr(module, "lora_A", {}):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            name = name.removeprefix("base_model.model.")
            found[name] = (a.detach(), b.detach(), module.scaling["default"])
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_report_of_a_model_equals_single_calls(kind, settings):
    model = adapted(kind, targets=("q_proj", "down_proj"), **settings)
    rows = rank_report(model, kinds=("entropy", "threshold"), taus=(0.1, 1e-5)).rows
    expected = expected_report(model, kind)
    assert [row["module"] for row in rows] == list(expected)
    for row in rows:
        a, b, scaling = expected[row["module"]]
        assert list(row) == [
            "module",
            "r",
            "shape",
            "fro",
            "entropy",
            "threshold@0.1",
            "threshold@1e-05",
        ]
        assert (row["r"], row["shape"]) == (4, (b.shape[0], a.shape[1]))
        assert row["fro"] == pytest.approx((scaling * b.double() @ a.double()).norm().item())
        assert row["entropy"] == effective_rank(a, b, scaling=scaling)
        assert row["threshold@0.1"] == effective_rank(a, b, "threshold", tau=0.1, scaling=scaling)


def test_reports_of_model_folder_value_and_state_dict_are_equal(tmp_path):
    model = adapted("peft", use_rslora=True)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    rows = list(rank_report(model))
    value = LoraAdapter.load(tmp_path)
    by_name = {row["module"]: row for row in rows}
    for other in (tmp_path, str(tmp_path), value, (value.config, value.state_dict())):
        assert {row["module"]: row for row in rank_report(other)} == by_name
    scaling = model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
    assert scaling == 3.0
    for state in (model.state_dict(), value.state_dict()):
        bare = {row["module"]: row for row in rank_report(state)}
        assert bare.keys() == by_name.keys()
        for name, row in bare.items():
            assert row["fro"] == pytest.approx(by_name[name]["fro"] / scaling)
            assert row["entropy"] == pytest.approx(by_name[name]["entropy"])


def test_adapter_is_selected_by_name():
    model = adapted("peft", "first", "second")
    first, second = (rank_report(model, name).rows for name in ("first", "second"))
    assert first[0]["fro"] != second[0]["fro"]
    state = rank_report(model.state_dict(), "second").rows
    assert state[0]["entropy"] == pytest.approx(second[0]["entropy"])
    with pytest.raises(ValueError, match="'third'"):
        rank_report(model, "third")
    with pytest.raises(ValueError, match=r"rank_report: source: expected .* 'third', found none"):
        rank_report(model.state_dict(), "third")


def test_report_reads_the_layout_of_the_published_code():
    a, b = factors(4)
    state = {
        "transformer.h.0.mlp.c_proj.lora_layer.lora_A": a.T,
        "transformer.h.0.mlp.c_proj.lora_layer.lora_B": b.T,
        "transformer.h.0.mlp.c_proj.base_layer.weight": torch.zeros(17, 24),
    }
    (row,) = rank_report(state, layout="in_r")
    assert (row["module"], row["r"]) == ("transformer.h.0.mlp.c_proj", 4)
    assert row["shape"] == (24, 17) and row["entropy"] == effective_rank(a, b)


def test_embeddings_and_convolutions_are_reported_as_matrices(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Conv2d(3, 5, 2, stride=2))
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config)
        model.save_pretrained(tmp_path, save_embedding_layers=False)
    rows = rank_report(model).rows
    assert rank_report(tmp_path).rows == rows
    assert [row["shape"] for row in rows] == [(6, 11), (5, 12)]
    assert all(1 <= row["entropy"] <= 2 for row in rows)


def test_table_has_one_line_per_module():
    report = rank_report(adapted("ours"))
    lines = report.to_table().splitlines()
    assert len(lines) == 1 + len(report) == 7
    assert lines[0].split()[:4] == ["module", "r", "shape", "fro"]
    for line, row in zip(lines[1:], report, strict=True):
        assert line.startswith(row["module"]) and f"{row['entropy']:.4g}" in line.split()


def test_empty_table_has_its_heading():
    assert RankReport(()).to_table() == "module"


# -------------------------------------------------------------------------------------------------
# Errors

A, B = factors(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": A, "b": B[:, :3]}, r"a and b: expected .*, found \(4, 17\) and \(24, 3\)"),
        ({"a": A[0], "b": B}, r"a and b: .*, found \(17,\) and \(24, 4\)"),
        ({"a": A[:0], "b": B[:, :0]}, r"a and b: .*, found \(0, 17\) and \(24, 0\)"),
        ({"a": A[:, :0], "b": B}, r"a and b: .*, found \(4, 0\) and"),
        ({"a": A[0]}, r"a: expected a matrix that is not empty, found \(17,\)"),
        ({"a": A[:0]}, r"a: expected a matrix that is not empty, found \(0, 17\)"),
        ({"a": A * math.inf, "b": B}, "a: expected finite values, found NaN or inf"),
        ({"a": A, "b": B * math.nan}, "b: expected finite values, found NaN or inf"),
        ({"a": A, "b": B, "tau": 0.0}, "tau: expected a threshold above 0 and below 1, found 0.0"),
        ({"a": A, "b": B, "tau": 1.0, "kind": "threshold"}, "tau: .*, found 1.0"),
        ({"a": A, "b": B, "tau": -1.0, "kind": "absolute"}, "tau: expected .* above 0, found -1.0"),
        ({"a": A, "b": B, "k": 0, "kind": "top_k_share"}, "k: expected at least 1, found 0"),
        ({"a": A, "b": B, "kind": "nuclear"}, "kind: expected one of .*entropy.*, found 'nuclear'"),
        ({"a": A, "b": B, "method": "svd"}, "method: expected one of .*, found 'svd'"),
        ({"a": A, "b": B, "method": "gram"}, "kind: expected one of .* for method 'gram', found"),
        (
            {"a": A, "b": B, "method": "gram", "kind": "threshold", "tau": 1e-4},
            "tau: expected at least 0.001 for method 'gram', found 0.0001",
        ),
        ({"a": A, "b": B, "scaling": math.nan}, "scaling: expected a finite number, found nan"),
    ],
)
def test_errors_name_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^effective_rank: {message}"):
        effective_rank(**arguments)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_integer_and_complex_factors_are_refused(dtype):
    with pytest.raises(TypeError, match="a: expected a floating-point tensor, found torch"):
        lora_singular_values(A.to(dtype), B)
    with pytest.raises(TypeError, match="b: expected a floating-point tensor, found list"):
        effective_rank(A, B.tolist())


def test_error_names_a_nonfinite_module(tmp_path):
    model = adapted("ours")
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(name).lora_B["default"].weight[0, 0] = math.nan
    match = f"^rank_report: {name}: b: expected finite values, found NaN or inf"
    for source in (model, model.state_dict(), LoraAdapter.from_model(model)):
        with pytest.raises(ValueError, match=match):
            rank_report(source)


def test_error_names_a_module_with_only_one_factor(tmp_path):
    state = {"x.lora_A.weight": A, "x.lora_B.weight": B, "y.lora_A.weight": A}
    with pytest.raises(KeyError, match=r"y: .* found y\.lora_A\.weight without its lora_B"):
        rank_report(state)
    with pytest.raises(KeyError, match=r"found y\.lora_A\.weight without its lora_B"):
        rank_report(({"peft_type": "LORA", "r": 4, "target_modules": ["x", "y"]}, state))
    with pytest.raises(KeyError, match=r"found y\.lora_B\.default\.weight without its lora_A"):
        rank_report({"y.lora_B.default.weight": B})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": ("rank",)}, "rank_report: kinds: expected one of .*, found 'rank'"),
        ({"taus": (0.1, 2.0)}, "rank_report: taus: .*, found 2.0"),
        ({"k": 0}, "rank_report: k: expected at least 1, found 0"),
        ({"layout": "r_out"}, "rank_report: layout: expected one of .*, found 'r_out'"),
    ],
)
def test_errors_name_invalid_settings_of_a_report(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        rank_report({"x.lora_A.weight": A, "x.lora_B.weight": B}, **arguments)


def test_layout_of_the_published_code_is_refused_except_for_state_dicts():
    with pytest.raises(ValueError, match=r"layout: expected one of .*'r_in'.*, found 'in_r'"):
        rank_report(adapted("ours"), layout="in_r")


def test_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="expected an adapter of Linear"):
        rank_report(nn.Linear(3, 4))
