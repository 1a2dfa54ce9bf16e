"""Errors of SPLoRA and their messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted_models import adapted
from methods.splora_support import blocks, made, name_of
from methods.test_splora_pruning import models
from torch import Tensor

from lora_ext.adapter import LoraAdapter, save_adapter
from lora_ext.methods import splora
from lora_ext.methods.splora import (
    DegenerateReferenceError,
    SploraConfig,
    ZeroAlignmentError,
    diem,
    ediem_scores,
    pair_stats,
    project_factor,
    select_layers,
)

Q = name_of(0)
KEY = f"{Q}.weight"


def factors(adapter: LoraAdapter, name: str = Q, **changes: Tensor) -> LoraAdapter:
    """Return a copy of the adapter in which one module has the factors in ``changes``."""
    changed = adapter.modules[name]._replace(**changes)
    return LoraAdapter(adapter.config, {**adapter.modules, name: changed})


# -------------------------------------------------------------------------------------------------
# Configuration and selection


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num": 1, "threshold": 0.5}, "num and threshold: expected at most one, found both, 1"),
        ({"num": -1}, "num: expected an integer from 0, found -1"),
        ({"num": 2.0}, "num: expected an integer from 0, found 2.0"),
        ({"num": True}, "num: expected an integer from 0, found True"),
        ({"threshold": float("nan")}, "threshold: expected a number, found nan"),
        ({"direction": None}, r"direction: expected one of \('smallest', 'largest'\), found None"),
        ({"direction": "up"}, r"direction: expected one of \('smallest', 'largest'\), found 'up'"),
        ({"granularity": "row"}, r"granularity: expected one of \('module', 'block'\)"),
        ({"projection": "svd"}, r"projection: expected one of \('frobenius', 'orthogonal'\)"),
        ({"reference": "none"}, r"reference: expected one of \('population', 'permutation'"),
        ({"score": "norm"}, r"score: expected one of \('distance', 'angle', 'alignment'\)"),
        (
            {"score": "angle", "reference": "released"},
            "reference: expected 'population' with score='angle', found 'released'",
        ),
        ({"stat": "mad"}, r"stat: expected one of \('iqr', 'std'\), found 'mad'"),
        ({"mode": "drop"}, r"mode: expected one of \('remove', 'zero'\), found 'drop'"),
        ({"center": "mode"}, r"center: expected one of \('mean', 'median'\)"),
        ({"on_zero_alignment": "keep"}, r"on_zero_alignment: expected one of \('raise', 'skip'\)"),
        ({"rank": 0}, "rank: expected an integer from 1, found 0"),
        ({"energy": 0.0}, r"energy: expected a number in \(0, 1\], found 0.0"),
        ({"energy": 1.1}, r"energy: expected a number in \(0, 1\], found 1.1"),
        ({"n_samples": 1}, "n_samples: expected an integer from 2, found 1"),
        ({"device": "abacus"}, "device: expected None, a torch.device or its name, found 'abacus'"),
        ({"seed": -1}, "seed: expected an integer from 0, found -1"),
        ({"include_scaling": 1}, "include_scaling: expected True or False, found 1"),
        ({"allow_degenerate": None}, "allow_degenerate: expected True or False, found None"),
    ],
    ids=str,
)
def test_errors_name_invalid_settings(fields: dict, message: str):
    with pytest.raises(ValueError, match=f"^SploraConfig: {message}"):
        SploraConfig(**{"direction": "smallest", **fields})


def test_direction_is_required():
    for fields in ({}, {"num": 3}, {"threshold": 0.0, "score": "alignment"}):
        with pytest.raises(ValueError, match=r"direction: expected one of \('smallest', 'largest'"):
            SploraConfig(**fields)


def test_selection_needs_num_or_threshold_and_enough_units():
    adapter, base, aligned = made(blocks())
    stats = ediem_scores(adapter, base, aligned)  # Scoring needs neither num nor threshold.
    with pytest.raises(ValueError, match="select_layers: config: expected one of num and threshol"):
        select_layers(stats, SploraConfig(direction="smallest"))
    with pytest.raises(ValueError, match=r"select_layers: num: expected at most 8, .*found 9"):
        splora.apply(adapter, base, aligned, SploraConfig(direction="smallest", num=9))
    with pytest.raises(ValueError, match="expected one of num and threshold"):
        splora.apply(adapter, base, aligned, SploraConfig(direction="smallest"))


# -------------------------------------------------------------------------------------------------
# Shapes


def test_weights_of_different_shapes_are_refused():
    adapter, base, aligned = made(blocks())
    aligned[KEY] = torch.ones(10, 12)
    message = rf"ediem_scores: {Q}: .*base weight's shape \(12, 10\), found \(10, 12\)"
    with pytest.raises(ValueError, match=message):
        ediem_scores(adapter, base, aligned)


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        (
            {"b": torch.ones(11, 3)},
            r"\(11, 10\), the shape of B A for B \(11, 3\) and A \(3, 10\), found \(12, 10\)",
        ),
        (
            {"a": torch.ones(3, 9)},
            r"\(12, 9\), the shape of B A for B \(12, 3\) and A \(3, 9\), found \(12, 10\)",
        ),
        ({"a": torch.ones(4, 10)}, r"equal rank, found B \(12, 3\) and A \(4, 10\)"),
        (
            {"a": torch.ones(0, 10), "b": torch.ones(12, 0)},
            r"rank of at least 1, found 0: B \(12, 0\) and A \(0, 10\)",
        ),
    ],
)
def test_error_for_factors_that_do_not_fit_names_layer_and_shapes(changes: dict, shapes: str):
    adapter, base, aligned = made(blocks())
    with pytest.raises(ValueError, match=rf"ediem_scores: {Q}: expected .*{shapes}"):
        ediem_scores(factors(adapter, **changes), base, aligned)


def test_state_dict_with_different_or_zero_ranks_is_refused():
    adapter, base, aligned = made(blocks())
    state = adapter.state_dict()
    key = f"base_model.model.{Q}.lora_B.weight"
    with pytest.raises(
        ValueError, match=rf"{Q}.lora_B.weight: .*since A has rank 3, found \(12, 4"
    ):
        ediem_scores({**state, key: torch.ones(12, 4)}, base, aligned)
    empty = {f"{Q}.lora_A.weight": torch.ones(0, 10), f"{Q}.lora_B.weight": torch.ones(12, 0)}
    with pytest.raises(ValueError, match=rf"{Q}.lora_A.weight: expected a rank of at least 1, fo"):
        ediem_scores(empty, base, aligned)


def test_transposed_weight_is_refused_without_fan_in_fan_out():
    adapter, base, aligned = made(blocks())
    turned = [{k: t.T for k, t in model.items()} for model in (base, aligned)]
    with pytest.raises(ValueError, match=r"expected weights of shape \(12, 10\).*found \(10, 12\)"):
        ediem_scores(adapter, *turned)


# -------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_error_for_nonfinite_values_names_the_tensor(bad: float):
    adapter, base, aligned = made(blocks())
    for role in ("a", "b"):
        broken = getattr(adapter.modules[Q], role).clone()
        broken[1, 2] = bad
        with pytest.raises(ValueError, match=rf"{Q}: lora_{role.upper()}.weight: expected finite"):
            ediem_scores(factors(adapter, **{role: broken}), base, aligned)
    for which, name in ((0, "base weight"), (1, "aligned weight")):
        pair = [dict(base), dict(aligned)]
        pair[which][KEY] = pair[which][KEY].clone()
        pair[which][KEY][-1, -1] = bad
        with pytest.raises(ValueError, match=rf"ediem_scores: {Q}: {name}: expected finite values"):
            ediem_scores(adapter, *pair)
        with pytest.raises(ValueError, match=rf"project: {Q}: {name}: expected finite values"):
            splora.project(adapter, *pair, [Q])


def test_equal_weights_raise_zero_alignment_error():
    adapter, base, aligned = made(blocks())
    aligned[KEY] = base[KEY].clone()
    for projection in ("frobenius", "orthogonal"):
        config = SploraConfig(direction="smallest", projection=projection, rank=2)
        with pytest.raises(ZeroAlignmentError, match=rf"{Q}: expected .*differs.*equal weights"):
            ediem_scores(adapter, base, aligned, config)
    assert issubclass(ZeroAlignmentError, ValueError)
    with pytest.raises(ZeroAlignmentError, match="project_factor: expected an aligned weight"):
        project_factor(torch.ones(3, 1), torch.ones(3, 4), torch.ones(3, 4))


def test_population_of_fewer_than_four_layers_is_refused():
    adapter, base, aligned = made({name_of(i): (4, 4) for i in range(3)})
    with pytest.raises(
        ValueError, match=r"reference='population': expected at least 4 layers.*d 3"
    ):
        ediem_scores(adapter, base, aligned)
    assert (
        len(
            ediem_scores(
                adapter, base, aligned, SploraConfig(direction="smallest", reference="permutation")
            )
        )
        == 3
    )


def test_reference_distances_without_spread_raise():
    adapter, base, aligned = made({name_of(i): (4, 4) for i in range(4)})
    one = adapter.modules[Q]
    same = LoraAdapter(adapter.config, dict.fromkeys(adapter.modules, one))
    alike = [{f"{n}.weight": m[KEY] for n in same.modules} for m in (base, aligned)]
    with pytest.raises(
        DegenerateReferenceError, match="reference='population': expected distances"
    ):
        ediem_scores(same, *alike)
    found = ediem_scores(same, *alike, SploraConfig(direction="smallest", allow_degenerate=True))
    assert [row.score for row in found] == [0.0] * 4
    assert issubclass(DegenerateReferenceError, ValueError)
    single, base, aligned = made({Q: (1, 4)})  # A single row has only one permutation.
    config = SploraConfig(direction="smallest", reference="permutation")
    with pytest.raises(DegenerateReferenceError, match=rf"ediem_scores: {Q}: reference='permut"):
        ediem_scores(single, base, aligned, config)


def test_identity_projection_warns():
    adapter, base, aligned = made({name_of(i): (4, 6) for i in range(5)})
    config = SploraConfig(direction="smallest", projection="orthogonal", allow_degenerate=True)
    with pytest.warns(
        UserWarning, match=r"full row rank: .*and 1 more|and 1 more has full row rank"
    ):
        found = ediem_scores(adapter, base, aligned, config)
    assert max(row.dist for row in found) < 1e-12
    with pytest.warns(UserWarning, match="set rank or energy"):
        project_factor(torch.ones(4, 1), base[KEY], aligned[KEY], projection="orthogonal")


# -------------------------------------------------------------------------------------------------
# Names and kinds of adapters


def test_absent_layers_raise_a_key_error_that_lists_five():
    adapter, base, aligned = made(blocks())
    with pytest.raises(KeyError, match=r"ediem_scores: aligned: .*none for .*and 3 more"):
        ediem_scores(adapter, base, {"model.norm.weight": torch.ones(3)})
    del base[KEY]
    with pytest.raises(KeyError, match=rf"ediem_scores: base: .*none for {Q}'$"):
        ediem_scores(adapter, base, aligned)


def test_factor_without_its_partner_raises_a_key_error(tmp_path: Path):
    adapter, base, aligned = made(blocks())
    state = adapter.state_dict()
    del state[f"base_model.model.{Q}.lora_B.weight"]
    save_adapter(tmp_path, adapter.config, state)
    for source in (state, (adapter.config, state), tmp_path):
        with pytest.raises(
            KeyError, match=rf"adapter: {Q}: expected lora_A and lora_B, found .*lora"
        ):
            ediem_scores(source, base, aligned)


def test_state_dict_without_factors_is_refused():
    with pytest.raises(ValueError, match=r"expected names such as <module>.lora_A.weight, found"):
        ediem_scores({"up.weight": torch.ones(2, 2)}, {}, {})


def test_quantised_weights_raise_a_type_error_with_the_remedy():
    adapter, base, aligned = made(blocks())
    packed = {**base, KEY: torch.zeros(12, 10, dtype=torch.int8)}
    with pytest.raises(TypeError, match=rf"ediem_scores: base: {KEY}: .*int8; dequantise"):
        ediem_scores(adapter, packed, aligned)
    with pytest.raises(TypeError, match=r"project_factor: aligned_w: .*int8; dequantise"):
        project_factor(torch.ones(12, 2), base[KEY], packed[KEY])


@pytest.mark.parametrize(
    ("fields", "targets", "message"),
    [
        ({"use_dora": True}, ("q_proj",), "found a DoRA magnitude at model.layers.0"),
        ({}, ("embed_tokens", "q_proj"), "found an embedding at model.embed_tokens"),
    ],
)
def test_dora_and_embedding_adapters_are_refused(fields: dict, targets, message: str):
    adapter = LoraAdapter.from_model(adapted("peft", targets=targets, **fields))
    with pytest.raises(NotImplementedError, match=f"ediem_scores: adapter: .*{message}"):
        ediem_scores(adapter, *models())


def test_convolutions_are_refused():
    state = {
        "conv.lora_A.weight": torch.ones(2, 3, 3, 3),
        "conv.lora_B.weight": torch.ones(4, 2, 1, 1),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["conv"]}
    for source in (state, (config, state)):
        with pytest.raises(NotImplementedError, match="conv"):
            ediem_scores(source, {}, {})


def test_error_for_projecting_an_absent_module_names_it():
    adapter, base, aligned = made(blocks())
    with pytest.raises(ValueError, match=r"project: names: .*modules, found 'model.gone'"):
        splora.project(adapter, base, aligned, [Q, "model.gone"])


# -------------------------------------------------------------------------------------------------
# Functions for one module


def test_pair_stats_refuses_invalid_factors():
    a, b = torch.ones(2, 5), torch.ones(4, 2)
    assert pair_stats(a, b, b).tolist() == [80, 80, 80, 0]
    with pytest.raises(ValueError, match="pair_stats: expected a rank of at least 1, found 0"):
        pair_stats(a[:0], b[:, :0], b[:, :0])
    with pytest.raises(ValueError, match=r"equal rank, found B \(4, 2\) and A \(3, 5\)"):
        pair_stats(torch.ones(3, 5), b, b)
    with pytest.raises(
        ValueError, match=r"projected_b: expected the shape of b \(4, 2\), found \(3, 2"
    ):
        pair_stats(a, b, b[:3])
    with pytest.raises(ValueError, match="pair_stats: a: expected finite values"):
        pair_stats(a * float("nan"), b, b)
    with pytest.raises(TypeError, match=r"pair_stats: b: .*found torch.int64; dequantise"):
        pair_stats(a, b.long(), b)


def test_diem_refuses_invalid_vectors():
    x = torch.rand(4)
    with pytest.raises(ValueError, match=r"diem: b: expected the shape of a, \(4,\)"):
        diem(x, x[:3], v_min=0, v_max=1)
    with pytest.raises(ValueError, match="diem: a: expected finite"):
        diem(x * float("nan"), x, v_min=0, v_max=1)
    with pytest.raises(ValueError, match="diem: v_max: expected a number above v_min=1, found 1"):
        diem(x, x, v_min=1, v_max=1)
    with pytest.raises(ValueError, match="diem: var: expected a number above 0, found 0"):
        diem(x, x, v_min=0, v_max=1, var=0)


def test_error_for_a_pair_of_lists_names_its_index():
    adapter, base, aligned = made(blocks())
    config = SploraConfig(direction="smallest", reference="pairs")
    with pytest.raises(TypeError, match=r"pairs\[0\]: expected a tensor in float16"):
        ediem_scores(adapter, base, aligned, config, pairs=[([1.0], [2.0])])


def test_pairs_are_only_accepted_with_their_reference():
    adapter, base, aligned = made(blocks())
    pairs = [(torch.ones(2, 2), torch.zeros(2, 2))]
    with pytest.raises(
        ValueError, match="pairs: expected None with reference='population', found 1"
    ):
        ediem_scores(adapter, base, aligned, pairs=pairs)
    config = SploraConfig(direction="smallest", reference="pairs")
    with pytest.raises(ValueError, match=r"pairs: expected pairs of matrices .*found None"):
        ediem_scores(adapter, base, aligned, config)
    bad = [(torch.ones(2, 2), torch.ones(2, 3))]
    with pytest.raises(
        ValueError, match=r"pairs\[0\]: expected matrices of equal shape, found \(2, 2"
    ):
        ediem_scores(adapter, base, aligned, config, pairs=bad)
