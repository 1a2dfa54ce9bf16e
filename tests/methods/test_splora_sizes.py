"""SPLoRA scores: some do not depend on the size of the update; the others correlate with it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from methods.splora_support import blocks, dense_map, made, name_of, scaled
from torch import Tensor

from lora_ext.adapter import LoraAdapter
from lora_ext.methods import splora
from lora_ext.methods.splora import SploraConfig, ediem_scores

ZERO = torch.zeros(2, 2, dtype=torch.float64)
A = torch.tensor([[3.0, 4.0]], dtype=torch.float64)


def dense_layers(adapter, base, aligned):
    """Return the update D and the alignment V of each layer, by name, as dense matrices."""
    found = {}
    for name, (a, b, s, *_) in adapter.modules.items():
        found[name] = s * b @ a, aligned[f"{name}.weight"] - base[f"{name}.weight"]
    return found


@pytest.mark.parametrize("fields", [{}, {"alpha_pattern": {name_of(1): -9}}], ids=str)
@pytest.mark.parametrize("projection", ["frobenius", "orthogonal"])
def test_alignment_is_the_cosine_of_update_and_alignment(projection: str, fields: dict):
    adapter, base, aligned = made(blocks(), **fields)
    config = SploraConfig(direction="smallest", score="alignment", projection=projection, rank=4)
    layers = dense_layers(adapter, base, aligned)
    for row in ediem_scores(adapter, base, aligned, config):
        update, v = layers[row.name]
        expected = ((update * v).sum() / (update.norm() * v.norm())).item()
        assert row.alignment == row.score == pytest.approx(expected, abs=1e-12)
    signs = {row.alignment > 0 for row in ediem_scores(adapter, base, aligned)}
    assert signs == {True, False}, "expected cosines with V, found those with P D (never < 0)"


def test_alignment_is_minus_one_for_inverse_and_one_for_equal_updates():
    # D = c V has rank one: the distances for c > 0 and c < 0 are nearly equal.
    names, state = [name_of(i) for i in range(4)], {}
    for name, c in zip(names, (1.0, -1.0, 0.5, -3.0), strict=True):
        state[f"{name}.lora_A.weight"] = A / 5
        state[f"{name}.lora_B.weight"] = torch.tensor([[c], [2 * c]], dtype=torch.float64)
    v = torch.tensor([[1.0], [2.0]], dtype=torch.float64) @ A
    base, aligned = ({f"{n}.weight": w for n in names} for w in (ZERO, v))
    config = SploraConfig(num=2, direction="smallest", score="alignment")
    result = splora.apply(state, base, aligned, config)
    assert [row.alignment for row in result.stats] == pytest.approx([1, -1, 1, -1])
    assert [row.cos for row in result.stats] == pytest.approx([1, 1, 1, 1])
    assert result.pruned == [names[1], names[3]]
    against = SploraConfig(threshold=0.0, direction="smallest", score="alignment")
    assert splora.apply(state, base, aligned, against).pruned == result.pruned
    nothing = {k: t * 0 if "lora_B" in k else t for k, t in state.items()}
    assert {r.alignment for r in ediem_scores(nothing, base, aligned, config)} == {0.0}


@pytest.mark.parametrize("projection", ["frobenius", "orthogonal"])
def test_angle_is_the_distance_of_a_normalised_map_and_ignores_sizes(projection: str):
    adapter, base, aligned = made(blocks())
    fields = {"direction": "largest", "score": "angle", "projection": projection, "rank": 4}
    config = SploraConfig(**fields)
    found = ediem_scores(adapter, base, aligned, config)
    x = []
    for name, (update, _) in dense_layers(adapter, base, aligned).items():
        key = f"{name}.weight"
        q = 4 if projection == "orthogonal" else None
        mapped = dense_map(base[key], aligned[key], projection, q) @ update
        mapped = mapped * ((mapped * update).sum() / mapped.square().sum())
        if projection == "orthogonal":
            row = next(row for row in found if row.name == name)
            assert row.dist / row.norm == pytest.approx(((mapped - update) / row.norm).norm())
        x.append(((mapped - update).norm() / update.norm()).item())
    x = torch.tensor(x, dtype=torch.float64)
    iqr = torch.quantile(x, 0.75) - torch.quantile(x, 0.25)
    expected = ((x - x.mean()) / iqr).tolist()
    assert [row.score for row in found] == pytest.approx(expected, rel=1e-8)
    sizes = {name: 10.0 ** (i - 3) * (-1) ** i for i, name in enumerate(blocks())}
    further = {k: base[k] + 5 * (aligned[k] - base[k]) for k in base}
    for models in ((base, aligned), (base, further)):
        other = ediem_scores(scaled(adapter, sizes), *models, config)
        assert [row.score for row in other] == pytest.approx(expected, rel=1e-8)


def test_small_angles_do_not_cancel_and_zero_updates_have_angle_zero():
    names = [name_of(i) for i in range(4)]
    v = torch.diag(torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))
    state = {}
    for name, e in zip(names, (1e-9, 2e-9, 4e-9, 0.0), strict=True):
        state[f"{name}.lora_A.weight"] = torch.ones(1, 3, dtype=torch.float64)
        b = torch.tensor([[1.0], [e], [0.0]], dtype=torch.float64)
        state[f"{name}.lora_B.weight"] = b if e else b * 0
    base, aligned = ({f"{n}.weight": w for n in names} for w in (torch.zeros_like(v), v))
    config = SploraConfig(
        direction="largest", score="angle", projection="orthogonal", center="median"
    )
    found = [row.score for row in ediem_scores(state, base, aligned, config)]
    x = torch.tensor([1.0, 2.0, 4.0, 0.0], dtype=torch.float64)
    iqr = torch.quantile(x, 0.75) - torch.quantile(x, 0.25)
    # Scores are divided by the spread (1.75e-9) plus 1e-12, which prevents a division by 0.
    assert found == pytest.approx(((x - x.median() - 0.5) / iqr).tolist(), rel=1e-2)


def test_size_correlation_shows_how_scores_follow_update_sizes():
    # V is small, so P D is negligible and the distance is |D|.
    adapter, base, aligned = made(blocks())
    sizes = {name: 1.5 ** ((5 * i) % 8) for i, name in enumerate(blocks())}
    adapter = scaled(adapter, sizes)
    near = {k: base[k] + 1e-6 * (aligned[k] - base[k]) for k in base}
    config = SploraConfig(num=2, direction="smallest")
    by_distance = splora.apply(adapter, base, near, config)
    assert by_distance.size_correlation == pytest.approx(1.0)
    assert "rank correlation of score and size 1.00" in str(by_distance)
    for score in ("angle", "alignment"):
        config = SploraConfig(num=2, direction="smallest", score=score)
        found = splora.apply(adapter, base, near, config)
        as_made = splora.apply(made(blocks())[0], base, near, config)
        assert found.pruned == as_made.pruned, "expected pruning to be independent of update sizes"
        assert found.size_correlation != pytest.approx(as_made.size_correlation)
    released = SploraConfig(num=2, direction="smallest", reference="released")
    found = splora.apply(adapter, base, near, released)
    assert found.size_correlation < -0.9, "expected the smallest scores for the largest updates"
    largest = sorted(by_distance.stats, key=lambda row: row.norm)[-2:]
    assert {*found.pruned} == {row.name for row in largest}


def test_rank_correlation_averages_the_ranks_of_ties():
    def rows(scores: list[float], sizes: list[float]) -> list[splora.LayerStats]:
        each = enumerate(zip(scores, sizes, strict=True))
        return [splora.LayerStats(name_of(i), 4, 0, 2 * n, 0, 0, s) for i, (s, n) in each]

    assert splora.size_correlation(rows([1, 2, 3], [2, 5, 9])) == pytest.approx(1)
    assert splora.size_correlation(rows([1, 2, 3], [9, 5, 2])) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, squares 4.5 and 5.
    found = splora.size_correlation(rows([0, 7, 7, 8], [1, 2, 3, 4]))
    assert found == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(splora.size_correlation(rows([1, 1], [1, 2])))
    assert math.isnan(splora.size_correlation([]))


def test_released_reference_is_the_noise_free_limit_of_fifty_copies():
    adapter, base, aligned = made(blocks(), dtype=torch.float32)
    config = SploraConfig(direction="smallest", reference="released")
    rows = ediem_scores(adapter, base, aligned, config)
    for row in rows:
        a, b, s, *_ = (
            t.double() if isinstance(t, Tensor) else t for t in adapter.modules[row.name]
        )
        key = f"{row.name}.weight"
        update = s * b @ a
        mapped = dense_map(base[key], aligned[key], "frobenius") @ update
        shift = torch.quantile(mapped, 0.25) - torch.quantile(update, 0.25)
        assert row.score == pytest.approx(1 - shift.item(), rel=1e-12)
    for k in (0, 3, 8):
        chosen = dataclasses.replace(config, num=k)
        assert len(splora.select_layers(rows, chosen)) == k
    (alone,) = ediem_scores(
        LoraAdapter(adapter.config, {name_of(2): adapter.modules[name_of(2)]}),
        base,
        aligned,
        config,
    )
    assert alone in rows
