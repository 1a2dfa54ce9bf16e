"""``compare_adapters``: distance, cosine and principal angles, compared with dense matrices."""

import math

import pytest
import torch
from made_adapters import SHAPES, Q, V, adapter, delta

from lora_ext.adapter import LoraAdapter, compare_adapters, merge_adapters, prune_adapter

SQUARE = {Q: (10, 10)}


def of(a, b):
    value = adapter(shapes={Q: (b.shape[0], a.shape[1])}, ranks=a.shape[0], scale=1.0)
    return value.with_modules({Q: value.modules[Q]._replace(a=a, b=b, scaling=1.0)})


def test_distance_and_cosine_equal_those_of_the_dense_updates():
    first, second = adapter(1, ranks={Q: 4, V: 2}), adapter(2, ranks=3, scale=-0.5)
    for found in compare_adapters(first, second):
        one, two = delta(first, found.module), delta(second, found.module)
        assert found.distance == pytest.approx(float((one - two).norm()), rel=1e-12)
        assert found.norms == pytest.approx((float(one.norm()), float(two.norm())), rel=1e-12)
        cosine = float((one * two).sum() / one.norm() / two.norm())
        assert found.cosine == pytest.approx(cosine, rel=1e-9)
        assert found.ranks == tuple(v.modules[found.module].a.shape[0] for v in (first, second))


def test_distance_of_an_adapter_to_itself_is_zero():
    value = adapter()
    for found in compare_adapters(value, value):
        assert found.distance == 0.0 and found.cosine == pytest.approx(1.0, abs=1e-14)
        assert len(found.angles) == 4 and max(found.angles) < 1e-12
    rotated = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    modules = {
        n: f._replace(a=rotated.T @ f.a.double(), b=f.b.double() @ rotated)
        for n, f in value.modules.items()
    }
    for found in compare_adapters(value, value.with_modules(modules)):
        assert found.distance < 1e-12 * found.norms[0] and max(found.angles) < 1e-12


@pytest.mark.parametrize("angle", [1e-9, 1e-3, 0.5, 1.2, math.pi / 2])
def test_principal_angles_equal_known_angles(angle):
    a = torch.randn(2, 8, dtype=torch.float64)
    one, two = torch.zeros(2, 10, 2, dtype=torch.float64)
    one[0, 0] = one[1, 1] = two[1, 1] = 1
    two[0, 0], two[2, 0] = math.cos(angle), math.sin(angle)
    (found,) = compare_adapters(of(a, one), of(a, two))
    assert found.angles == pytest.approx((0.0, angle), abs=1e-12)
    wider = torch.cat([two, torch.eye(10, dtype=torch.float64)[:, 5:7]], 1)
    (found,) = compare_adapters(of(torch.randn(4, 8).double(), wider), of(a, one))
    assert found.angles == pytest.approx((0.0, angle), abs=1e-12), "expected 2, the smaller rank"


def test_zero_updates_have_no_angles():
    value = adapter(shapes=SQUARE)
    fresh = value.with_modules({Q: value.modules[Q]._replace(b=torch.zeros(10, 4))})
    (found,) = compare_adapters(value, fresh)
    assert found.cosine is None and found.angles == ()
    assert found.distance == pytest.approx(found.norms[0])
    twice = merge_adapters([value, value], [0.5, 0.5])  # factors of rank 8, update of rank 4
    (found,) = compare_adapters(twice, value)
    assert found.ranks == (8, 4) and len(found.angles) == 4 and max(found.angles) < 1e-5


def test_module_of_only_one_adapter_has_rank_zero_in_the_other():
    value = adapter()
    found = compare_adapters(prune_adapter(value, [V]), value)
    assert [each.module for each in found] == [V, Q]
    assert found[1].ranks == (0, 4) and found[1].angles == () and found[1].cosine is None
    assert found[1].distance == pytest.approx(float(delta(value, Q).norm()))


def test_folders_are_accepted_and_progress_is_reported(tmp_path):
    value = adapter()
    value.save(tmp_path)
    seen = []
    compare_adapters(tmp_path, value, progress=lambda names: (seen.append(n) or n for n in names))
    assert sorted(seen) == sorted(SHAPES)


def test_errors_name_modules_that_cannot_be_compared():
    value, other = adapter(), adapter(shapes={Q: (24, 19)})
    with pytest.raises(ValueError, match=rf"second: {Q}: expected 20 inputs and 24 .* found 19"):
        compare_adapters(value, other)
    bad = LoraAdapter(value.config, value.modules)
    bad.modules[V].b[0, 0] = float("nan")
    with pytest.raises(ValueError, match=rf"compare_adapters: first: {V}: b: expected finite"):
        compare_adapters(bad, adapter())
