"""``prune_adapter``: removal of modules; the kept modules share their tensors with the original."""

import copy
import warnings

import peft
import pytest
import torch
from made_adapters import Q, V, adapter
from test_value import CASES, assert_peft_finds_every_key, peft_model
from torch import nn

from lora_ext.adapter import LoraAdapter, prune_adapter
from lora_ext.pool import AdapterPool

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("mode", ["remove", "zero"])
@pytest.mark.parametrize("keep", [[Q], {Q}, lambda name: "q_proj" in name, iter([Q])])
def test_kept_modules_share_their_tensors(mode, keep):
    value = adapter(lora_bias=True)
    before = copy.deepcopy(value)
    if not callable(keep) and not isinstance(keep, list | set):
        keep = iter([Q])
    found = prune_adapter(value, keep, mode)
    assert found.modules[Q] is value.modules[Q]
    assert value == before
    if mode == "remove":
        assert found.modules.keys() == {Q} and set(found.config.target_modules) == {Q}
    else:
        a, b, scaling, bias, *_ = found.modules[V]
        assert a is value.modules[V].a and scaling == value.modules[V].scaling
        assert not b.any() and b.shape == (12, 4) and b.dtype == value.modules[V].b.dtype
        assert bias is not None and not bias.any()


def test_all_or_no_modules_can_be_kept():
    value = adapter()
    assert prune_adapter(value, [Q, V]) == value
    assert prune_adapter(value, lambda _: True, "zero") == value
    nothing = prune_adapter(value, [])
    assert not nothing.modules and nothing.config.target_modules == ()


def test_adapter_without_modules_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="expected LoRA factors of the base model, found none"):
        prune_adapter(adapter(), []).save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["remove", "zero"])
@pytest.mark.parametrize("case", CASES)
def test_peft_and_the_pool_load_pruned_adapters(case, mode, tmp_path):
    base = CASES[case][0]()
    peft_model(case).save_pretrained(tmp_path / "old")
    names = sorted(LoraAdapter.load(tmp_path / "old").modules)
    if case == "dora" and mode == "zero":
        with pytest.raises(
            NotImplementedError, match=rf"'remove' for {names[1]}, .*DoRA magnitude"
        ):
            prune_adapter(tmp_path / "old", names[:1], mode)
        return
    found = prune_adapter(tmp_path / "old", names[:1], mode)
    found.save(tmp_path / "new")
    theirs = assert_peft_finds_every_key(base, tmp_path / "new")
    adapted = [n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "base_layer")]
    assert adapted == names[:1] or mode == "zero"
    AdapterPool(base, max_slots=1, max_rank=8).load("new", tmp_path / "new")
    assert LoraAdapter.load(tmp_path / "new") == found


def test_kept_name_does_not_match_longer_names_with_this_suffix(tmp_path):
    shapes = {"up": (6, 5), "block.up": (6, 5), "block.down": (5, 6), "c.block.up": (6, 5)}
    base = nn.ModuleDict(
        {
            "up": nn.Linear(5, 6),
            "block": nn.ModuleDict({"up": nn.Linear(5, 6), "down": nn.Linear(6, 5)}),
            "c": nn.ModuleDict({"block": nn.ModuleDict({"up": nn.Linear(5, 6)})}),
        }
    )
    value = adapter(shapes=shapes)
    for keep in (["up"], ["up", "c.block.up"], ["block.up"], ["block.up", "block.down"]):
        found = prune_adapter(value, keep)
        found.save(tmp_path)
        theirs = assert_peft_finds_every_key(base, tmp_path)
        adapted = {
            n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "base_layer")
        }
        assert adapted == set(keep)
        AdapterPool(base, max_slots=1, max_rank=8).load("a", tmp_path)


def test_peft_loads_an_ordinary_pruned_adapter_without_warnings(tmp_path):
    peft_model("plain").save_pretrained(tmp_path / "old")
    found = prune_adapter(tmp_path / "old", lambda name: ".0." in name)
    assert found.config.exclude_modules is None
    found.save(tmp_path / "new")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(exclude|missing|ignored|Unexpected)")
        peft.PeftModel.from_pretrained(CASES["plain"][0](), tmp_path / "new")


def test_base_weight_of_a_removed_module_is_removed_too():
    value = LoraAdapter.from_model(peft_model("embedding-and-head"))
    head = next(name for name in value.modules if name.endswith("lm_head"))
    found = prune_adapter(value, [head])
    assert found.base_weights.keys() == {f"base_model.model.{head}.base_layer.weight"}
    assert len(value.base_weights) == 2


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_bias_of_a_removed_module_is_renamed_as_in_peft(bias, tmp_path):
    base = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4))
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], bias=bias, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    own, other = (torch.nn.init.normal_(model.base_model.model[i].base_layer.bias) for i in (0, 1))
    found = prune_adapter(LoraAdapter.from_model(model), ["0"])
    found.save(tmp_path)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig.from_pretrained(tmp_path))
    state = peft.load_peft_weights(tmp_path)
    assert peft.set_peft_model_state_dict(theirs, state).unexpected_keys == []
    assert peft.get_peft_model_state_dict(theirs).keys() == state.keys()
    kept, gone = theirs.base_model.model
    assert torch.equal(kept.base_layer.bias, own)
    assert torch.equal(gone.bias, base[1].bias if bias == "lora_only" else other)
    assert LoraAdapter.load(tmp_path) == found == LoraAdapter.from_model(theirs)


def test_errors_name_invalid_arguments():
    value = adapter()
    with pytest.raises(ValueError, match=r"prune_adapter: keep: expected names .* found 'q_proj'"):
        prune_adapter(value, [Q, "q_proj"])
    with pytest.raises(ValueError, match=r"prune_adapter: mode: .* found 'drop'"):
        prune_adapter(value, [Q], "drop")
    for keep in (Q, 3, None):
        with pytest.raises(TypeError, match="prune_adapter: keep: expected full names"):
            prune_adapter(value, keep)
    assert torch.equal(value.modules[Q].a, adapter().modules[Q].a)
