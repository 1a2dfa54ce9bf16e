"""``resize_adapter``: exact for larger ranks, and the best approximation for smaller ranks."""

import copy
import time

import peft
import pytest
import torch
from made_adapters import SHAPES, Q, V, adapter, delta
from test_value import CASES, assert_peft_finds_every_key, peft_model

from lora_ext.adapter import LoraAdapter, merge_adapters, resize_adapter
from lora_ext.pool import AdapterPool

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smaller_rank_is_the_best_approximation_with_its_error(dtype):
    value = adapter(ranks={Q: 6, V: 3}, dtype=dtype, scale=-1.5)
    small, errors = resize_adapter(value, 2)
    for name in SHAPES:
        s = torch.linalg.svdvals(delta(value, name))
        factors = small.modules[name]
        assert factors.a.shape[0] == factors.b.shape[1] == 2 and factors.a.dtype == dtype
        assert factors.scaling == value.modules[name].scaling
        change = (delta(value, name) - delta(small, name)).norm()
        assert errors[name] == pytest.approx(float(s[2:].square().sum().sqrt()), rel=1e-10)
        assert errors[name] == pytest.approx(float(change), rel=1e-6)
        assert torch.allclose(factors.a.norm(dim=1), factors.b.norm(dim=0)), "equal norms"


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"lora_bias": True}, {"use_dora": True}]
)
def test_larger_rank_changes_no_bit_of_the_update(fields):
    value = adapter(**fields)
    big, errors = resize_adapter(value, 9)
    assert errors == {Q: 0.0, V: 0.0}
    for name, old in value.modules.items():
        new = big.modules[name]
        assert torch.equal(new.a[:4], old.a) and torch.equal(new.b[:, :4], old.b)
        assert not new.b[:, 4:].any() and new.scaling == old.scaling
        assert (new.a[4:] != 0).all() and new.a[4:].abs().max() <= 20**-0.5
        assert new.bias is old.bias and new.after is old.after
    assert big == resize_adapter(value, 9)[0], "expected deterministic new rows"
    other, _ = resize_adapter(value, 9, torch.Generator().manual_seed(1))
    assert big != other


def test_growing_and_shrinking_back_is_lossless():
    value = adapter()
    big, _ = resize_adapter(value, 16)
    back, errors = resize_adapter(big, 4)
    for name in SHAPES:
        assert torch.allclose(delta(back, name), delta(value, name), atol=1e-5)
        assert errors[name] < 1e-12


def test_ranks_by_name_leave_other_modules_unchanged():
    value = adapter()
    found, errors = resize_adapter(value, {V: 2})
    assert found.modules[Q].a is value.modules[Q].a and errors[Q] == 0.0
    assert found.modules[V].a.shape == (2, 20) and errors[V] > 0
    same, errors = resize_adapter(value, 4)
    assert same == value and same.modules[V].b is value.modules[V].b


def test_rank_zero_removes_the_module():
    value = adapter()
    found, errors = resize_adapter(value, {V: 0})
    assert found.modules.keys() == {Q} and set(found.config.target_modules) == {Q}
    assert errors[V] == pytest.approx(float(delta(value, V).norm()))


def test_rank_may_exceed_the_size_of_the_layer():
    value = adapter(shapes={Q: (3, 5)}, ranks=7)
    small, errors = resize_adapter(value, 6)
    assert small.modules[Q].a.shape == (6, 5) and errors[Q] < 1e-12
    assert torch.allclose(delta(small, Q), delta(value, Q), atol=1e-5)


def test_resizing_leaves_its_input_unchanged():
    value = adapter()
    before = copy.deepcopy(value)
    resize_adapter(value, 2)
    resize_adapter(value, 8)
    assert value == before


@pytest.mark.parametrize("rank", [3, 9, "mixed"])
@pytest.mark.parametrize("case", CASES)
def test_peft_and_the_pool_load_resized_adapters(case, rank, tmp_path):
    base = CASES[case][0]()
    peft_model(case).save_pretrained(tmp_path / "old")
    names = sorted(LoraAdapter.load(tmp_path / "old").modules)
    ranks = {name: 1 + i for i, name in enumerate(names)} if rank == "mixed" else rank
    found, _ = resize_adapter(tmp_path / "old", ranks)
    found.save(tmp_path / "new")
    assert_peft_finds_every_key(base, tmp_path / "new")
    AdapterPool(base, max_slots=1, max_rank=64).load("new", tmp_path / "new")
    assert LoraAdapter.load(tmp_path / "new") == found


def test_errors_name_invalid_ranks_and_values():
    value = adapter()
    for rank, found in ((-1, "-1"), (2.0, "2.0"), (True, "True"), (None, "None")):
        with pytest.raises(ValueError, match=rf"resize_adapter: rank: .* integer .*found {found}"):
            resize_adapter(value, rank)
    with pytest.raises(ValueError, match=r"rank: expected names .* found 'q_proj'"):
        resize_adapter(value, {"q_proj": 2})
    value.modules[V].a[0, 0] = float("inf")
    with pytest.raises(ValueError, match=rf"resize_adapter: {V}: a: expected finite"):
        resize_adapter(value, 2)


@pytest.mark.slow
def test_large_adapters_are_merged_and_resized_within_seconds():
    # 24 modules of size (3072, 768) with rank 64 take less than 3 s on one core.
    shapes = {f"layers.{i}.mlp": (3072, 768) for i in range(24)}
    values = [adapter(i, ranks=64, shapes=shapes) for i in range(2)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        merge_adapters(values, [0.5, 0.5], "delta_svd")
        merged = time.process_time()
        resize_adapter(values[0], 16)
        resized = time.process_time()
    finally:
        torch.set_num_threads(threads)
    print(f"merged in {merged - start:.2f} s, resized in {resized - merged:.2f} s of one core")
    assert merged - start < 3 and resized - merged < 3


def test_scale_without_an_exact_alpha_changes_by_at_most_one_bit():
    value = adapter(ranks=3, shapes={Q: SHAPES[Q]}, scale=1 / 3)
    for rank in range(1, 40):
        found = resize_adapter(value, rank)[0]
        old, new = value.modules[Q].scaling, found.modules[Q].scaling
        assert abs(old - new) <= 2**-52 * abs(old)
        assert new == found.config.ranks_and_scales([Q])[0][Q][1]


def test_resized_adapter_loads_in_peft_for_any_init_scheme(tmp_path):
    # The initialisation scheme of an adapter no longer matters after training.
    model = peft.get_peft_model(
        CASES["plain"][0](),
        peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights="orthogonal"),
    )
    # The new rank is odd, which PEFT's scheme "orthogonal" does not support.
    found, _ = resize_adapter(LoraAdapter.from_model(model), 3)
    found.save(tmp_path)
    assert_peft_finds_every_key(CASES["plain"][0](), tmp_path)
